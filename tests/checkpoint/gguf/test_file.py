"""GGUF files as models: transformers' logits, split files, settings and names."""

from __future__ import annotations

import math
import os
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert import Quantization, convert
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.gguf.file import GgufCheckpoint
from phimlx.checkpoint.gguf.find import find_gguf
from phimlx.checkpoint.gguf.header import read_header
from phimlx.checkpoint.gguf.names import gguf_name
from phimlx.checkpoint.load import load_model, map_model
from phimlx.errors import CheckpointError, ConfigError, PhimlxError
from phimlx.models import registry
from phimlx.models.phi import PhiConfig
from phimlx.models.phi3 import Phi3Config
from tests.checkpoint.gguf.writer import Described, Written
from tests.convert.tiny import MINI, PHI_4, parameters

GOLDENS = Path(__file__).parents[2] / "goldens" / "gguf"
NAMES = ("llama", "phi3", "phi2")


def logits_differ(model: Any, name: str) -> float:
    """The largest difference from transformers' logits, over the largest of them."""
    golden, worst = mx.load(str(GOLDENS / "logits.safetensors")), 0.0
    for length in (12, 40):
        ids, expected = golden[f"{name}.{length}.ids"], golden[f"{name}.{length}.logits"]
        difference = mx.abs(model(ids[None])[0] - expected).max() / mx.abs(expected).max()
        worst = max(worst, float(difference))
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers(name: str) -> None:
    model = map_model(GgufCheckpoint(GOLDENS / f"{name}.gguf", "float32"))
    assert logits_differ(model, name) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_what_is_converted(name: str, tmp_path: Path) -> None:
    convert(GOLDENS / f"{name}.gguf", tmp_path / "whole", dtype="float32")
    assert logits_differ(load_model(Checkpoint(tmp_path / "whole")), name) < 2e-6
    convert(GOLDENS / f"{name}.gguf", tmp_path / "half")
    half = load_model(Checkpoint(tmp_path / "half"), mx.float32)
    assert 2e-6 < logits_differ(half, name) < 2e-3
    convert(GOLDENS / f"{name}.gguf", tmp_path / "eight", Quantization(32, 8))
    eight = load_model(Checkpoint(tmp_path / "eight"), mx.float32)
    assert 2e-6 < logits_differ(eight, name) < 5e-2


@pytest.mark.parametrize("block_bytes", [1, 300, 2000, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_same_in_blocks_of_any_size(name: str, block_bytes: int) -> None:
    for tensor in GgufCheckpoint(GOLDENS / f"{name}.gguf").tensors.values():
        whole = tensor.whole(lambda rows: rows.array(rows.read()))
        count = max(1, block_bytes // tensor.row_bytes)
        blocks = []
        for first in range(0, tensor.count, count):
            last = min(first + count, tensor.count)
            parts = [rows.array(rows.read()) for rows in tensor.reads(first, last)]
            blocks.append(tensor.rows(first, last, parts))
        assert mx.array_equal(mx.concatenate(blocks), whole)
        assert whole.shape == tensor.shape


def test_types_of_what_is_converted() -> None:
    """Packed matrices become float16; norms do where that loses nothing."""
    packed = GgufCheckpoint(GOLDENS / "phi3.gguf").tensors
    assert packed["model.layers.0.mlp.down_proj.weight"].dtype == "F16"
    assert packed["model.norm.weight"].dtype == "F32"  # of random numbers
    for dtype, name in (("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")):
        tensors = GgufCheckpoint(GOLDENS / "phi3.gguf", dtype).tensors.values()
        assert {tensor.dtype for tensor in tensors} == {name}


def test_a_sparse_file_is_not_read_to_be_refused(tmp_path: Path) -> None:
    """A vector as large as a file can say it is."""
    made = written()
    numbers = 1 << 38
    huge = Described("output_norm.weight", (numbers,), 0)
    tensors = [each for each in made.tensors if each.name != huge.name]
    file = tmp_path / "x.gguf"
    file.write_bytes(Written(made.settings, [*tensors, huge]).bytes())
    os.truncate(file, file.stat().st_size + 4 * numbers)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        map_model(GgufCheckpoint(file))
    assert time.process_time() - start < 2
    assert str(caught.value) == (
        f"model.norm.weight has shape [{numbers}]; config.json makes it [64]."
    )


# Files made here: settings and names.

NUMBERS = {0: np.float32, 1: np.float16}


def settings_of(config: Any, form: registry.GGUF) -> dict[str, Any]:
    rope, arch = config.rope, form.architecture
    norm = {"rms": "layer_norm_rms_epsilon", "layer": "layer_norm_epsilon"}[form.norm]
    return {
        "general.architecture": arch,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.{norm}": config.norm_eps,
        f"{arch}.rope.dimension_count": rope.dims,
        f"{arch}.rope.freq_base": rope.theta,
        f"{arch}.rope.scaling.original_context_length": (
            rope.original_max_position_embeddings or config.max_position_embeddings
        ),
    }


def written(
    config: dict[str, Any] = PHI_4,
    changes: dict[str, Any] | None = None,
    without: tuple[str, ...] = (),
    extra: tuple[Described, ...] = (),
    number: int = 0,
    keep: slice = slice(None),
) -> Written:
    """A file of random weights in the form that llama.cpp writes, with changes."""
    architecture = registry.of_config(config)
    form, read = architecture.gguf, architecture.read_config(config)
    assert form is not None
    tensors = [
        tensor(gguf_name(name, form), np.array(array), 0 if array.ndim == 1 else number)
        for name, array in parameters(config).items()
    ]
    for which in ("long", "short"):
        if factors := getattr(read.rope, f"{which}_factor"):
            tensors.append(tensor(f"rope_factors_{which}.weight", np.array(factors, np.float32)))
    settings = {**settings_of(read, form), **(changes or {})}
    return Written(
        {key: value for key, value in settings.items() if key not in without},
        [each for each in (*tensors, *extra) if each.name not in without][keep],
    )


def tensor(name: str, array: np.ndarray, number: int = 0) -> Described:
    return Described(name, array.shape, number, array.astype(NUMBERS[number]).tobytes())


def opened(folder: Path, *arguments: Any, **keywords: Any) -> GgufCheckpoint:
    file = folder / "x.gguf"
    file.write_bytes(written(*arguments, **keywords).bytes())
    return GgufCheckpoint(file)


def failing(folder: Path, *arguments: Any, **keywords: Any) -> PhimlxError:
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        map_model(opened(folder, *arguments, **keywords))
    assert len(str(caught.value)) < 400
    return caught.value


PHI: dict[str, Any] = {
    **{key: value for key, value in PHI_4.items() if "rms" not in key and "rope_s" not in key},
    "model_type": "phi",
    "layer_norm_eps": 1e-5,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.4,
    "hidden_size": 160,
}


@pytest.mark.parametrize("config", [PHI_4, MINI, PHI], ids=["phi-4", "mini", "phi"])
@pytest.mark.parametrize("number", [0, 1])
def test_config_and_weights_come_back(tmp_path: Path, config: dict[str, Any], number: int) -> None:
    checkpoint = opened(tmp_path, config, number=number)
    architecture = registry.of_config(config)
    found = architecture.read_config(checkpoint.config)
    assert found == architecture.read_config(config)
    weights, expected = checkpoint.weights(), parameters(config)
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        kept = array.astype(mx.float16 if number and array.ndim > 1 else mx.float32)
        assert mx.array_equal(weights[name], kept), name


@pytest.mark.parametrize(("heads", "dims"), [(n, d) for n in (2, 7) for d in range(2, 98, 2)])
def test_every_part_of_a_head_comes_back(tmp_path: Path, heads: int, dims: int) -> None:
    config = {**PHI_4, "num_attention_heads": heads, "num_key_value_heads": heads}
    config |= {"hidden_size": heads * 98, "num_hidden_layers": 1, "vocab_size": 4}
    changes = {"phi3.rope.dimension_count": dims}
    checkpoint = opened(tmp_path, config, changes, number=1)
    assert Phi3Config.from_dict(checkpoint.config).rope.dims == dims


def test_attention_factor(tmp_path: Path) -> None:
    """One that follows from the lengths does so in full precision; another is kept."""
    follows = math.sqrt(1 + math.log(256 / 32) / math.log(32))
    key = "phi3.rope.scaling.attn_factor"
    for changes in ({}, {key: follows}):
        config = opened(tmp_path, MINI, changes).config
        assert Phi3Config.from_dict(config).rope.attention_factor == follows
    config = opened(tmp_path, MINI, {key: 1.25}).config
    assert Phi3Config.from_dict(config).rope.attention_factor == 1.25


def test_factors_for_any_length(tmp_path: Path) -> None:
    """`rope_freqs` divides the frequencies, whatever the length; of ones it says nothing."""
    ones, others = np.ones(8, np.float32), np.linspace(1, 4, 8, dtype=np.float32)
    plain = opened(tmp_path, extra=(tensor("rope_freqs.weight", ones),)).config
    assert Phi3Config.from_dict(plain) == Phi3Config.from_dict(PHI_4)
    rope = Phi3Config.from_dict(
        opened(tmp_path, extra=(tensor("rope_freqs.weight", others),)).config
    ).rope
    assert rope.long_factor == rope.short_factor
    assert np.array_equal(np.array(rope.long_factor, np.float32), others)
    assert rope.attention_factor == 1
    assert not rope.is_long(256)


def test_windows(tmp_path: Path) -> None:
    key = "phi3.attention.sliding_window"
    for changes, window in (({}, None), ({key: 0}, None), ({key: 100}, 100)):
        assert opened(tmp_path, PHI_4, changes).config["sliding_window"] == window
    old = opened(tmp_path, {**PHI_4, "max_position_embeddings": 4096}).config
    assert old["sliding_window"] == 2047  # Phi-3, whose first files did not say it


def test_head_sizes_of_its_own(tmp_path: Path) -> None:
    config = {**PHI_4, "head_dim": 32}
    lengths = {"phi3.attention.key_length": 32, "phi3.attention.value_length": 32}
    read = opened(tmp_path, config, {**lengths, "phi3.rope.dimension_count": 32}).config
    assert Phi3Config.from_dict(read).head_dim == 32
    error = failing(tmp_path, config, {"phi3.attention.key_length": 32})
    assert str(error) == "x.gguf: phi3.attention.value_length is 16, and keys have 32."


def test_head_counts_by_layer(tmp_path: Path) -> None:
    key = "phi3.attention.head_count_kv"
    assert opened(tmp_path, PHI_4, {key: [2, 2]}).config["num_key_value_heads"] == 2
    error = failing(tmp_path, PHI_4, {key: [2, 1]})
    assert str(error) == f"x.gguf: {key} is array([2, 1], dtype=int32), not one whole number."


def test_split_projections_of_phi3(tmp_path: Path) -> None:
    qkv = np.array(parameters(PHI_4)["model.layers.0.self_attn.qkv_proj.weight"])
    rows = zip("qkv", np.split(qkv, [64, 96]), strict=True)
    extra = tuple(tensor(f"blk.0.attn_{name}.weight", part) for name, part in rows)
    checkpoint = opened(tmp_path, without=("blk.0.attn_qkv.weight",), extra=extra)
    found = checkpoint.weights()["model.layers.0.self_attn.qkv_proj.weight"]
    assert np.array_equal(np.array(found), qkv)


INFINITY = struct.pack("<If", 6, math.inf)
NAN = struct.pack("<If", 6, math.nan)
HUGE = struct.pack("<IQ", 10, 2**64 - 1)
DOUBLE = struct.pack("<Id", 12, 1e300)
BAD = [
    ({"phi3.rope.freq_base": NAN}, (), "phi3.rope.freq_base is nan, not a number."),
    ({"phi3.rope.freq_base": INFINITY}, (), "phi3.rope.freq_base is inf, not a number."),
    (
        {"phi3.rope.freq_base": DOUBLE},
        (),
        "phi3.rope.freq_base is 1e+300, not a number of 32 bits.",
    ),
    (
        {"phi3.rope.freq_base": "x" * 999},
        (),
        f"phi3.rope.freq_base is '{'x' * 56}..., not a number.",
    ),
    ({"phi3.attention.layer_norm_rms_epsilon": NAN}, (), None),
    (
        {"phi3.attention.layer_norm_rms_epsilon": 0.0},
        (),
        "rms_norm_eps is 0.0, not a number above 0.",
    ),
    ({"phi3.block_count": HUGE}, (), None),
    ({"phi3.block_count": 0}, (), None),
    ({"phi3.block_count": True}, (), "phi3.block_count is True, not one whole number."),
    ({"phi3.block_count": []}, (), None),
    ({"phi3.attention.head_count": 0}, (), None),
    ({"phi3.attention.head_count": HUGE}, (), None),
    ({"phi3.attention.head_count_kv": 3}, (), None),
    ({"phi3.embedding_length": HUGE}, (), None),
    ({"phi3.context_length": 0}, (), None),
    ({"phi3.context_length": HUGE}, (), None),
    ({"phi3.rope.dimension_count": 0}, (), None),
    ({"phi3.rope.dimension_count": 7}, (), None),
    ({"phi3.rope.dimension_count": HUGE}, (), None),
    ({}, ("phi3.block_count",), "phi3.block_count is missing."),
    ({}, ("phi3.context_length",), "phi3.context_length is missing."),
    (
        {"phi3.expert_count": 8},
        (),
        "phi3.expert_count is 8, but Phi models have 0.",
    ),
    (
        {"phi3.rope.scaling.type": "yarn", "phi3.rope.scaling.factor": 4.0},
        (),
        "phi3.rope.scaling.type is 'yarn', and LongRoPE is the only scaling that is read of GGUF "
        "files.",
    ),
    ({"phi3.rope.scaling.type": 3}, (), "phi3.rope.scaling.type is 3, not text."),
    ({}, ("token_embd.weight",), "The file holds no embedding, so it is not a whole model."),
]


@pytest.mark.parametrize(("changes", "without", "message"), BAD)
def test_bad_settings(
    tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...], message: str | None
) -> None:
    error = failing(tmp_path, PHI_4, changes, without)
    assert str(error).startswith("x.gguf: ")
    assert message is None or str(error) == f"x.gguf: {message}"
    assert error.hint == "Get the original model's folder, and convert that."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phi3.rope.scaling.original_context_length": 0}, None),
        ({"phi3.rope.scaling.original_context_length": 1}, None),
        ({"phi3.rope.scaling.original_context_length": HUGE}, None),
        (
            {"phi3.rope.scaling.attn_factor": -1.0},
            "attention_factor is -1.0, not a number above 0.",
        ),
        (
            {"phi3.rope.scaling.attn_factor": NAN},
            "phi3.rope.scaling.attn_factor is nan, not a number.",
        ),
    ],
)
def test_bad_longrope(tmp_path: Path, changes: dict[str, Any], message: str | None) -> None:
    error = failing(tmp_path, MINI, changes)
    assert message is None or str(error) == f"x.gguf: {message}"


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(5, np.float32), "long_factor needs 6 numbers, one a frequency; it has 5."),
        (np.full(6, np.nan, np.float32), "long_factor is nan, not a number above 0."),
        (np.zeros(6, np.float32), "long_factor is 0.0, not a number above 0."),
        (None, "The file lacks rope_factors_long.weight, beside the other factors."),
    ],
)
def test_bad_factors(tmp_path: Path, factors: np.ndarray | None, message: str) -> None:
    name = "rope_factors_long.weight"
    file = tmp_path / "x.gguf"
    made = written(MINI, without=(name,))
    extra = [] if factors is None else [tensor(name, factors)]
    file.write_bytes(Written(made.settings, [*made.tensors, *extra]).bytes())
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        GgufCheckpoint(file)
    assert str(caught.value) == f"x.gguf: {message}"


def test_no_architecture(tmp_path: Path) -> None:
    made = written()
    settings = {**made.settings}
    del settings["general.architecture"]
    (tmp_path / "x.gguf").write_bytes(Written(settings, made.tensors).bytes())
    with pytest.raises(ConfigError) as caught:
        GgufCheckpoint(tmp_path / "x.gguf")
    assert str(caught.value) == "x.gguf does not say which architecture its model has."
    assert caught.value.hint == "Get the original model's folder, and convert that."


@pytest.mark.parametrize("name", ["gemma3", "qwen2", "", 3, "x" * 9999])
def test_other_architectures(tmp_path: Path, name: Any) -> None:
    made = written()
    settings = {**made.settings, "general.architecture": name}
    (tmp_path / "x.gguf").write_bytes(Written(settings, made.tensors).bytes())
    with pytest.raises(ConfigError) as caught:
        GgufCheckpoint(tmp_path / "x.gguf")
    assert str(caught.value).startswith("x.gguf holds a model of the architecture ")
    assert str(caught.value).endswith("GGUF files of the Phi family: phi3, llama, phi2.")
    assert len(str(caught.value)) < 250
    assert caught.value.hint == "Use llama.cpp for it, or give a Phi model."


def test_types_that_are_not_read(tmp_path: Path) -> None:
    packed = Described("blk.0.ffn_up.weight", (192, 256), 23, bytes(192 * 136))
    error = failing(tmp_path, without=("blk.0.ffn_up.weight",), extra=(packed,))
    # named twice: without it first, and then with it
    assert str(error) == "The checkpoint lacks model.layers.0.mlp.gate_up_proj.weight."
    made = written()
    tensors = [packed if each.name == packed.name else each for each in made.tensors]
    (tmp_path / "x.gguf").write_bytes(Written(made.settings, tensors).bytes())
    with pytest.raises(CheckpointError) as caught:
        map_model(GgufCheckpoint(tmp_path / "x.gguf"))
    assert str(caught.value) == (
        "x.gguf: blk.0.ffn_up.weight is stored as IQ4_XS, which phimlx does not read."
    )
    assert caught.value.hint == (
        "Get the same model as Q4_K_M, Q8_0 or F16, or the original model's folder."
    )


def test_tensors_of_no_phi_model(tmp_path: Path) -> None:
    bias = tensor("blk.0.attn_qkv.bias", np.ones(128, np.float32))
    error = failing(tmp_path, extra=(bias,))
    assert str(error) == (
        "The checkpoint holds model.layers.0.self_attn.qkv_proj.bias, which this architecture does "
        "not have."
    )
    error = failing(tmp_path, extra=(tensor("v.patch", np.ones(8, np.float32)),))
    assert str(error) == "The checkpoint holds v.patch, which this architecture does not have."
    error = failing(tmp_path, without=("blk.1.ffn_norm.weight",))
    assert str(error) == ("The checkpoint lacks model.layers.1.post_attention_layernorm.weight.")


def test_half_of_split_projections(tmp_path: Path) -> None:
    part = tensor("blk.0.attn_k.weight", np.ones((32, 64), np.float32))
    error = failing(tmp_path, without=("blk.0.attn_qkv.weight",), extra=(part,))
    assert str(error) == (
        "x.gguf holds blk.0.attn_k.weight, but lacks blk.0.attn_q.weight, blk.0.attn_v.weight."
    )


def test_other_heights(tmp_path: Path) -> None:
    short = tensor("blk.0.attn_qkv.weight", np.ones((64, 160), np.float32))
    error = failing(tmp_path, PHI, without=tuple(
        f"blk.0.attn_{name}.{kind}" for name in "qkv" for kind in ("weight", "bias")
    ), extra=(short,))  # fmt: skip
    assert str(error) == "x.gguf: blk.0.attn_qkv.weight has 64 rows, its settings make 160."
    assert PhiConfig.from_dict(PHI).head_dim == 40


# Models in several files.


def split(folder: Path, count: int = 3) -> list[Path]:
    whole = written()
    files = []
    for number in range(count):
        settings: dict[str, Any] = {
            "split.no": struct.pack("<IH", 2, number),
            "split.count": struct.pack("<IH", 2, count),
            "split.tensors.count": struct.pack("<Ii", 5, len(whole.tensors)),
        }
        part = Written(
            {**(whole.settings if number == 0 else {}), **settings},
            whole.tensors[number::count],
        )
        files.append(folder / f"x-{number + 1:05d}-of-{count:05d}.gguf")
        files[-1].write_bytes(part.bytes())
    return files


def test_a_model_in_several_files(tmp_path: Path) -> None:
    files = split(tmp_path)
    expected = parameters(PHI_4)
    for checkpoint in (GgufCheckpoint(files[0]), GgufCheckpoint(find_gguf(tmp_path))):
        assert checkpoint.files == files
        weights = checkpoint.weights()
        assert weights.keys() == expected.keys()
        assert all(mx.array_equal(weights[name], expected[name]) for name in expected)


def test_files_that_are_missing_or_mixed_up(tmp_path: Path) -> None:
    files = split(tmp_path)
    shutil.move(files[1], tmp_path / "away")
    with pytest.raises(CheckpointError) as caught:
        GgufCheckpoint(files[0])
    assert str(caught.value) == (
        "x-00001-of-00003.gguf is one of 3 files that are one model, and x-00002-of-00003.gguf is "
        "not beside it."
    )
    assert caught.value.hint == "Download all of them into one folder."
    shutil.copy(files[2], files[1])
    with pytest.raises(CheckpointError) as caught:
        GgufCheckpoint(files[0])
    assert str(caught.value) == (
        "x-00002-of-00003.gguf is not a whole GGUF file: it does not say that it is number 2 of 3."
    )
    shutil.move(files[0], tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError) as caught:
        GgufCheckpoint(tmp_path / "renamed.gguf")
    assert str(caught.value) == (
        "renamed.gguf is one of 3 files that are one model, and its name does not tell which: it "
        "should end in -00001-of-00003.gguf."
    )


def test_counts_of_files(tmp_path: Path) -> None:
    for count in (HUGE, -1.0, "3", struct.pack("<Ii", 5, -3)):
        file = tmp_path / "x.gguf"
        file.write_bytes(written(changes={"split.count": count}).bytes())
        with pytest.raises(CheckpointError, match=r"it is one of .* files"):
            GgufCheckpoint(file)
    assert read_header(file).settings["split.count"] == -3


def test_tensors_in_two_files_or_none(tmp_path: Path) -> None:
    files = split(tmp_path, 2)
    header = read_header(files[1])
    settings = {"split.no": struct.pack("<IH", 2, 1), "split.count": struct.pack("<IH", 2, 2)}
    files[1].write_bytes(Written(settings, written().tensors[:1]).bytes())
    with pytest.raises(CheckpointError, match="stands in both x-00001-of-00002"):
        GgufCheckpoint(files[0])
    files[1].write_bytes(Written(settings, ()).bytes())
    with pytest.raises(CheckpointError, match=r"beside it hold \d+ tensors, of \d+"):
        GgufCheckpoint(files[0])
    assert header.tensors


def test_which_file_a_folder_means(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert find_gguf(tmp_path) == tmp_path / "a.gguf"
    assert find_gguf(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    (tmp_path / "B.GGUF").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError) as caught:
        find_gguf(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds 2 GGUF files: B.GGUF, a.gguf."
    assert caught.value.hint == "Name the one that is meant."
    (tmp_path / "config.json").touch()
    assert find_gguf(tmp_path) is None
