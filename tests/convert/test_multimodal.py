"""Conversions of Phi-4-multimodal: the base quantized, the rest kept, and both layouts read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from huggingface_hub import constants
from mlx.utils import tree_flatten

from convert import Quantization, Recipe, convert, read_recipe
from convert import plan as plan_module
from convert.measure.report import measure
from convert.quantize.recipe import Rule, mixed, recipes_of
from convert.streaming import stream_model
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import CheckpointError, ConversionError
from phimlx.hub.client import Remote
from phimlx.models import registry
from phimlx.models.phi4mm.model import Phi4MMForCausalLM
from phimlx.models.registry import part_of
from tests.checkpoint.test_multimodal import write_native
from tests.convert.tiny import failing, plan, same_bits, weights_of, write_config, write_index
from tests.hub.loopback_hub import Hub, serve
from tests.multimodal import multimodal_folder

PHI4MM = registry.of_config({"model_type": "phi4mm"})

EIGHT = Quantization(32, 8)
CASES = ("text", "image", "audio", "both", "two_audio_padded", "audio45s")
PHI4MM = registry.of_config({"model_type": "phi4mm"})
TOWER = "model.embed_tokens_extend.image_embed.img_processor."
UNUSED = (f"{TOWER}head.", f"{TOWER}post_layernorm.", f"{TOWER}encoder.layers.2.")
BAKED = (
    "{} holds no adapters: they were merged into its base, where they change every answer and can "
    "no longer be switched."
)
BAKED_HINT = (
    "Make a conversion that keeps them: phimlx convert microsoft/Phi-4-multimodal-instruct "
    "--mlx-path OUT -q"
)


@pytest.fixture(scope="module")
def source(data: Path) -> Path:
    return data / "tiny" / "tiny-phi4mm-remote"


@pytest.fixture(scope="module")
def weights(source: Path) -> dict[str, mx.array]:
    return weights_of(source)


@pytest.fixture(scope="module")
def oracle(source: Path) -> dict[str, dict[str, mx.array]]:
    """What the original code was given and answered, by case."""
    cases: dict[str, dict[str, mx.array]] = {case: {} for case in CASES}
    for name, array in dict(mx.load(str(source / "oracle.safetensors"))).items():
        case, _, key = name.partition(".")
        cases[case][key] = array
    return cases


def load(folder: Path) -> Phi4MMForCausalLM:
    model = load_model(Checkpoint(folder))
    assert isinstance(model, Phi4MMForCausalLM)
    return model


def logits(model: Phi4MMForCausalLM, case: Mapping[str, mx.array]) -> np.ndarray[Any, Any]:
    given = {key: array for key, array in case.items() if key not in ("input_ids", "logits")}
    answer: np.ndarray[Any, Any] = np.array(model(case["input_ids"], **given))[0]
    return answer


def used(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {name: array for name, array in weights.items() if not name.startswith(UNUSED)}


def forms(folder: Path) -> dict[str, int]:
    """Bits of each quantized layer."""
    modules = load(folder).named_modules()
    return {path: module.bits for path, module in modules if hasattr(module, "bits")}


# Plain


def test_every_oracle_case_after_a_conversion(
    source: Path, tmp_path: Path, oracle: Mapping[str, Mapping[str, mx.array]]
) -> None:
    convert(source, tmp_path / "out")
    model = load(tmp_path / "out")
    for name in CASES:
        expected = np.array(oracle[name]["logits"])
        difference = np.abs(logits(model, oracle[name]) - expected).max()
        assert difference < 1e-4 * np.abs(expected).max(), name


def test_tensors_keep_every_bit_and_unused_ones_stay_behind(
    source: Path, tmp_path: Path, weights: dict[str, mx.array]
) -> None:
    result = convert(source, tmp_path / "out")
    assert same_bits(weights_of(tmp_path / "out"), used(weights))
    assert len(weights) - result.tensors == 11 + 2 + 16
    convert(source, tmp_path / "hub", layout="hf")  # as published, whole
    assert same_bits(weights_of(tmp_path / "hub"), weights)
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model_type"] == "phi4mm"


def test_the_published_config_says_the_same(data: Path, tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == {**before, "torch_dtype": "float32"}


def test_companions(data: Path, tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    multimodal_folder(data, folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        text = (data / "hf" / "Phi-4-multimodal-instruct" / name).read_text()
        (folder / name).write_text(text)
    (folder / "modeling_phi4mm.py").write_text("import os")
    (folder / "speech-lora").mkdir()
    convert(folder, tmp_path / "out")
    names = {path.name for path in folder.iterdir()} - {"modeling_phi4mm.py", "speech-lora"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "README.md"}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_another_dtype(source: Path, tmp_path: Path, weights: dict[str, mx.array]) -> None:
    convert(source, tmp_path / "out", dtype="bfloat16")
    expected = {name: array.astype(mx.bfloat16) for name, array in used(weights).items()}
    assert same_bits(weights_of(tmp_path / "out"), expected)


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_the_native_layout_becomes_the_published_one(
    source: Path, tmp_path: Path, weights: dict[str, mx.array], prefix: str
) -> None:
    native = write_native(tmp_path / "native", weights, prefix)
    convert(native, tmp_path / "out", EIGHT)
    convert(source, tmp_path / "expected", EIGHT)
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "expected"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "phi4mm"
    assert (config["vision_lora"], config["speech_lora"]) == (
        {"r": 8, "lora_alpha": 16},
        {"r": 10, "lora_alpha": 20},
    )
    first, second = load(tmp_path / "out"), load(tmp_path / "expected")
    assert first.config == second.config


# Quantized


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_reloading_changes_nothing(
    source: Path, tmp_path: Path, oracle: Mapping[str, Mapping[str, mx.array]], bits: int
) -> None:
    """Logits equal those of the same layers quantized in memory, in every mode of the model."""
    convert(source, tmp_path / "out", Quantization(32, bits))
    model = load(tmp_path / "out")
    expected = load(source)
    nn.quantize(
        expected,
        32,
        bits,
        class_predicate=lambda path, module: (
            path.endswith(".base_layer") or path == "model.embed_tokens"
        ),
    )
    arrays = dict(tree_flatten(model.parameters()))
    assert same_bits(arrays, dict(tree_flatten(expected.parameters())))
    for case in ("text", "image", "audio", "both"):
        assert np.array_equal(logits(model, oracle[case]), logits(expected, oracle[case])), case


@pytest.mark.slow
def test_at_8_bits_text_says_what_the_original_says(
    source: Path, tmp_path: Path, oracle: Mapping[str, Mapping[str, mx.array]]
) -> None:
    """Baked adapters leave 0 % of these; the numbers' own grid costs little."""
    convert(source, tmp_path / "out", EIGHT)
    model, original = load(tmp_path / "out"), load(source)
    tokens = mx.array([[(7 * i * i + 3 * i) % 509 for i in range(200)]])
    same = mx.argmax(model(tokens), -1) == mx.argmax(original(tokens), -1)
    assert same.mean().item() >= 0.85
    for case in ("image", "audio", "both"):
        expected = np.array(oracle[case]["logits"])
        agreement = (logits(model, oracle[case]).argmax(-1) == expected.argmax(-1)).mean()
        assert agreement >= 0.85, case


def test_what_is_quantized(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "base", EIGHT)
    base = forms(tmp_path / "base")
    assert base.keys() == {
        "model.embed_tokens",
        *(
            f"model.layers.{layer}.{path}.base_layer"
            for layer in range(2)
            for path in (
                "self_attn.qkv_proj",
                "self_attn.o_proj",
                "mlp.gate_up_proj",
                "mlp.down_proj",
            )
        ),
    }
    four = Quantization(32, 4)
    convert(source, tmp_path / "adapters", four, parts=["adapters"])
    adapters = forms(tmp_path / "adapters")
    beside = {path: bits for path, bits in adapters.items() if path not in base}
    assert {bits for path, bits in adapters.items() if path in base} == {4}
    # The ranks of this model, 8 and 10, are too small for groups of 32; so lora_B stays.
    assert len(beside) == 16
    assert all(".lora_A." in path and bits == 8 for path, bits in beside.items())
    convert(source, tmp_path / "encoders", four, parts=["encoders"])
    encoders = forms(tmp_path / "encoders")
    beside = {path: bits for path, bits in encoders.items() if path not in base}
    assert set(beside.values()) == {8}
    assert all(part_of(path) == "encoders" for path in beside)
    assert "model.embed_tokens_extend.audio_embed.encoder.embed.out" in beside
    assert not any("bias_values" in path or "_embedding" in path for path in beside)


def test_quantized_encoders_and_adapters_still_see_and_hear(
    source: Path, tmp_path: Path, oracle: Mapping[str, Mapping[str, mx.array]]
) -> None:
    convert(source, tmp_path / "out", EIGHT, parts=["adapters", "encoders"])
    model = load(tmp_path / "out")
    for case in ("image", "audio", "both"):
        expected = np.array(oracle[case]["logits"])
        difference = np.abs(logits(model, oracle[case]) - expected).max()
        assert difference < 0.05 * np.abs(expected).max(), case


def test_twice_the_same_bytes(source: Path, tmp_path: Path) -> None:
    recipe = mixed(4, 6, PHI4MM).in_groups_of(32)
    for name in ("a", "b"):
        convert(source, tmp_path / name / "out", recipe, parts=["adapters", "encoders"])
    files = sorted(path.name for path in (tmp_path / "a" / "out").iterdir())
    for name in files:
        one, other = (tmp_path / run / "out" / name for run in "ab")
        assert one.read_bytes() == other.read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("nbytes", [1, 5000])
def test_blocks_of_rows_change_nothing(
    source: Path, tmp_path: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole", EIGHT, parts=["encoders"])
    monkeypatch.setattr(plan_module, "BATCH_BYTES", 4 * nbytes)
    convert(source, tmp_path / "rows", EIGHT, parts=["encoders"])
    assert same_bits(weights_of(tmp_path / "rows"), weights_of(tmp_path / "whole"))


def test_there_and_back(source: Path, tmp_path: Path, weights: dict[str, mx.array]) -> None:
    convert(source, tmp_path / "small", EIGHT, parts=["adapters", "encoders"])
    convert(tmp_path / "small", tmp_path / "plain", dequantize=True)
    packed, plain = weights_of(tmp_path / "small"), weights_of(tmp_path / "plain")
    assert plain.keys() == used(weights).keys()
    for name, array in plain.items():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in packed and name.endswith(".weight"):
            scales, biases = packed[f"{path}.scales"], packed[f"{path}.biases"]
            expected = mx.dequantize(packed[name], scales, biases, 32, 8)
        else:
            expected = weights[name]
        assert mx.array_equal(array, expected), name


def test_further_down(source: Path, tmp_path: Path) -> None:
    """What was not quantized stays so; adapters at 8 bits keep their bits."""
    convert(source, tmp_path / "eight", EIGHT, parts=["adapters"])
    convert(tmp_path / "eight", tmp_path / "three", Quantization(32, 3))
    before, after = forms(tmp_path / "eight"), forms(tmp_path / "three")
    assert before.keys() == after.keys()
    assert {bits for path, bits in after.items() if ".lora_" in path} == {8}
    assert {bits for path, bits in after.items() if ".lora_" not in path} == {3}
    old, new = weights_of(tmp_path / "eight"), weights_of(tmp_path / "three")
    kept = [name for name in old if part_of(name) is not None]
    assert same_bits({name: old[name] for name in kept}, {name: new[name] for name in kept})


# Recipes


def test_named_recipes_protect_the_base_and_leave_the_rest(source: Path, tmp_path: Path) -> None:
    assert recipes_of(PHI4MM) == recipes_of(registry.of_config({"model_type": "phi3"}))
    blocks = 16
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    plain = [f"model.layers.{block}.{layer}" for block in range(blocks) for layer in layers]
    beside = [f"{path}.lora_{side}.vision" for path in plain for side in "AB"]
    beside += [f"{TOWER}encoder.layers.{n}.mlp.fc1" for n in range(3)]
    beside += ["model.embed_tokens_extend.image_embed.img_projection.0"]
    based = ["model.embed_tokens", *(f"{path}.base_layer" for path in plain)]
    assigned, _ = mixed(4, 6, PHI4MM).assign(dict.fromkeys([*based, *beside], 3072), blocks)
    expected, _ = mixed(4, 6, PHI4MM).assign(
        dict.fromkeys(["model.embed_tokens", *plain], 3072), blocks
    )
    assert {path: assigned[path] for path in based} == dict(
        zip(based, expected.values(), strict=True)
    )
    assert {assigned[path] for path in beside} == {None}
    convert(source, tmp_path / "out", "mixed-4-6", group_size=32, parts=["adapters"])
    found = forms(tmp_path / "out")
    assert found["model.embed_tokens"] == 6
    assert found["model.layers.0.mlp.gate_up_proj.base_layer"] == 6
    assert found["model.layers.1.mlp.gate_up_proj.base_layer"] == 4
    assert found["model.layers.1.mlp.gate_up_proj.lora_A.speech"] == 8


@pytest.mark.parametrize(
    ("match", "reached"),
    [
        ("*", "model.layers.*.base_layer"),
        ("model.layers.0.*", "model.layers.0.*.base_layer"),
        ("*.down_proj", "*.down_proj.base_layer"),
        ("*.lora_A.speech", "*.lora_A.speech"),
        ("*o_proj.lora_*", "*.o_proj.lora_*"),
        ("model.embed_tokens_extend.*fc1", "*.fc1"),
        ("*.fc1", "nothing"),
    ],
)
def test_what_a_pattern_reaches(match: str, reached: str) -> None:
    paths = [
        f"model.layers.{layer}.{path}{end}"
        for layer in range(2)
        for path in ("self_attn.o_proj", "mlp.down_proj")
        for end in (".base_layer", ".lora_A.vision", ".lora_A.speech", ".lora_B.speech")
    ]
    paths += [f"{TOWER}encoder.layers.0.mlp.fc1", f"{TOWER}encoder.layers.0.self_attn.q_proj"]
    rule = Rule(match, None)
    found = {path for path in paths if rule.applies(path, 2)}
    assert found == {path for path in paths if fnmatchcase(path, reached)}


def test_a_recipe_of_ones_own(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'bits = 4\ngroup_size = 32\n[[layers]]\nmatch = "*.lora_A.vision"\nbits = 6\n'
        '[[layers]]\nmatch = "*.down_proj"\nkeep = true\n'
    )
    convert(source, tmp_path / "out", read_recipe(file))
    found = forms(tmp_path / "out")
    adapters = {path for path in found if ".lora_" in path}
    assert adapters
    assert all(path.endswith(".lora_A.vision") for path in adapters)
    assert {found[path] for path in adapters} == {6}
    assert not any(path.endswith("down_proj.base_layer") for path in found)


def test_groups_of_adapters() -> None:
    """Of 64 at most, which divide the ranks of 256 and 320, and of 32 at least, as affine has."""
    for groups, expected in ((32, 32), (64, 64), (128, 64)):
        recipe = Recipe("own", Quantization(groups, 4)).with_parts(PHI4MM, ["adapters"])
        assert recipe.rules == (Rule("*.lora_*", Quantization(expected, 8)),)
    recipe = Recipe("own", Quantization(16, 4, "nvfp4")).with_parts(PHI4MM, ["encoders"])
    assert recipe.rules == (Rule("*model.embed_tokens_extend.*", Quantization(32, 8)),)


# The model card


CARD = """\
## Layers

| Layers | Weights |
| --- | --- |
| adapters, 16 layers | 8 bits in groups of 32 |
| adapters, 16 layers | not quantized |
| encoders, 35 layers | not quantized |
| all others | 4 bits in groups of 32 |
"""


def test_card(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", Quantization(32, 4), parts=["adapters"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'pipeline_tag: "image-text-to-text"' in card
    assert ": weights at 4 bits in groups of 32.\n" in card
    _, _, table = card.partition("## Layers\n")
    assert sorted(table.split("\n")) == sorted(CARD.partition("## Layers\n")[2].split("\n"))


# Straight from the Hub

REPO = "someone/Phi-4-multimodal"


@pytest.fixture
def hub(
    source: Path, weights: dict[str, mx.array], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Hub]:
    """A Hub with the model in three files, and the folders that only hold its adapters again."""
    folder = tmp_path / "published"
    folder.mkdir()
    names, weight_map = list(weights), {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        members = {name: weights[name] for name in names[shard::3]}
        mx.save_safetensors(str(folder / file), members, {"format": "pt"})
        weight_map.update(dict.fromkeys(members, file))
    write_index(folder, weight_map)
    write_config(folder, json.loads((source / "config.json").read_text()))
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        running.repos[REPO] = {file.name: file.read_bytes() for file in folder.iterdir()}
        for name in ("speech-lora", "vision-lora"):
            running.repos[REPO][f"{name}/adapter_model.safetensors"] = b"twice"
        yield running


def test_shards_are_converted_as_they_arrive(hub: Hub, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with stream_model(REPO, out, Remote(wait=lambda seconds: None)) as model:
        plan(model.folder, out, EIGHT, parts=["adapters"], files=model).run()
    convert(source, tmp_path / "expected", EIGHT, parts=["adapters"])
    assert same_bits(weights_of(out), weights_of(tmp_path / "expected"))
    assert not any("lora" in name for name in hub.requested)
    assert {path.name for path in tmp_path.iterdir()} == {"published", "out", "expected"}


# What is refused


def mlx_vlm_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-vlm 0.7.10 leaves in config.json: the source's, and its quantization table."""
    table = {"group_size": 32, "bits": 8, "mode": "affine"}
    ending = {"eos_token_id": [200020, 199999]}
    both = {"quantization": table, "quantization_config": table}
    return {**config, **ending, "generation_config": ending, **both}


def baked(weights: Mapping[str, mx.array], packed: bool = True) -> dict[str, mx.array]:
    """What mlx-vlm 0.7.10 leaves of a model: its own names, no adapter, no separators."""
    prefixes = {
        "model.embed_tokens_extend.audio_embed.encoder.": "audio_encoder.",
        "model.embed_tokens_extend.audio_embed.": "",
        TOWER: "vision_tower.vision_tower.",
        "model.embed_tokens_extend.image_embed.img_projection.": "mm_projector.",
        "model.": "language_model.model.",
    }
    left = {}
    for name, array in weights.items():
        if ".lora_" in name or "_GN" in name or f"{TOWER}head." in name:
            continue
        start = next(prefix for prefix in prefixes if name.startswith(prefix))
        new = name.replace(start, prefixes[start], 1).replace(".base_layer", "")
        if packed and new.startswith("language_model") and array.ndim == 2:
            path = new.removesuffix(".weight")
            parts = zip(("weight", "scales", "biases"), mx.quantize(array, 32, 8), strict=True)
            left.update({f"{path}.{part}": value for part, value in parts})
        else:
            left[new] = array
    return left


@pytest.mark.parametrize("packed", [True, False])
def test_a_conversion_that_baked_the_adapters_in(
    source: Path, weights: dict[str, mx.array], tmp_path: Path, packed: bool
) -> None:
    config = json.loads((source / "config.json").read_text())
    folder = tmp_path / "theirs"
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "model.safetensors"), baked(weights, packed), {"format": "mlx"}
    )
    write_config(folder, mlx_vlm_config(config) if packed else config)
    dequantize = {"dequantize": True} if packed else {}
    for arguments in (
        {"quantization": Quantization(32, 4)},
        dequantize,
        {**dequantize, "layout": "hf"},
    ):
        with pytest.raises(CheckpointError) as caught:
            convert(folder, tmp_path / "out", **arguments)
        assert str(caught.value) == BAKED.format(folder)
        assert caught.value.hint == BAKED_HINT
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


def test_no_gguf(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    with pytest.raises(ConversionError) as caught:
        plan(source, tmp_path / "out.gguf", layout="gguf")
    assert str(caught.value) == (
        f"{source} sees and hears, with an adapter for each, which llama.cpp does not run: there "
        "is no GGUF file of such a model."
    )
    assert caught.value.hint == "Write another layout: --export hf, or MLX's without --export."


def test_parts_that_a_model_does_not_have(data: Path, tmp_path: Path) -> None:
    text = data / "tiny" / "tiny-phi4"
    error = failing(text, tmp_path / "out", EIGHT, parts=["adapters", "encoders"])
    assert str(error) == f"{text} takes text only, so it has no adapters and no encoders."
    assert error.hint == "Leave --q-adapters and --q-encoders out."


def test_groups_that_divide_nothing(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    folder = tmp_path / "source"
    folder.mkdir()
    write_config(folder, config)
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    error = failing(folder, tmp_path / "out", Recipe("own", EIGHT, (Rule("*", None),)))
    assert str(error) == "Groups of 32 divide the width of no layer of this model (64, 128)."


# The report


def test_report(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    multimodal_folder(data, folder)
    convert(folder, tmp_path / "out", Quantization(32, 4), parts=["adapters"])
    report = measure(folder, tmp_path / "out", "the quick brown fox. " * 20)
    assert {layer.kind for layer in report.layers} == {
        "embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "adapters", "encoders",
    }  # fmt: skip
    errors = {layer.name: layer.error for layer in report.layers}
    layer = "model.layers.0.mlp.down_proj."
    assert 0.02 < errors[f"{layer}base_layer.weight"] < 0.2
    assert 0 < errors[f"{layer}lora_A.vision.weight"] < 0.01
    assert errors[f"{layer}lora_B.vision.weight"] == 0
    assert 0 < report.agreements[0].divergence < 0.1
    assert report.note == (
        "Measured on text alone, which passes no adapter and no encoder. Not measured past the "
        "LongRoPE step at 4,096 tokens: that takes a text of 4,608 tokens and a limit of 9,216."
    )
    text = report.markdown()
    assert "| Error of encoders | 32.00 bits | 32.00 bits | 0.000%, at most 0.000% |" in text
