"""GGUF files to MLX folders: what was exported comes back, and what cannot be is told."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from convert import ConversionRequest, Quantization, convert, plan_conversion
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.gguf.blocks import BY_NUMBER
from phimlx.checkpoint.gguf.file import GgufCheckpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import ConversionError, PhimlxError, TokenizerError
from phimlx.hub.resolve import NANO
from phimlx.models import registry
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from tests.checkpoint.gguf.test_file import GOLDENS, PHI, written
from tests.checkpoint.gguf.writer import Described, Written
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.convert.tiny import MINI, PHI_4, parameters, weights_of, write_model
from tests.prompt.conftest import tiny_tokenizer_json

TINY = {**PHI_4, "vocab_size": 280}


def write_source(folder: Path, config: dict[str, Any], dtype: mx.Dtype = mx.float32) -> Path:
    config = {**config, "vocab_size": 280}
    write_model(folder, config, parameters(config, dtype))
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json()))
    settings = {"eos_token": "<|end|>", "bos_token": "<|endoftext|>", "chat_template": "{{ 1 }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def exported(folder: Path, source: Path, layout: str = "gguf") -> Path:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    convert(source, folder / "x.gguf", layout=layout)
    return folder / "x.gguf"


@pytest.mark.parametrize("config", [PHI_4, MINI, PHI], ids=["phi-4", "mini", "phi"])
def test_what_was_exported_comes_back(tmp_path: Path, config: dict[str, Any]) -> None:
    source = write_source(tmp_path / "source", config)
    file = exported(tmp_path, source)
    result = convert(file, tmp_path / "back")
    before, after = weights_of(source), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, array in before.items():
        kept = array.astype(mx.float16) if array.ndim > 1 else array
        assert mx.array_equal(after[name], kept), name
    architecture = registry.of_config(config)
    found = Checkpoint(tmp_path / "back").config
    assert architecture.read_config(found) == architecture.read_config(
        {**config, "vocab_size": 280}
    )
    assert result.source == file
    ours, theirs = (Tokenizer.load(folder) for folder in (tmp_path / "back", source))
    assert ours.control_tokens == theirs.control_tokens
    for text in ("the heathen", "<|user|> \n Hi<|end|>", "<|tool|>\nx", "Größe"):
        assert ours.encode(text, control=True) == theirs.encode(text, control=True)
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ 1 }}"
    assert (settings["bos_token"], settings["eos_token"]) == ("<|endoftext|>", "<|end|>")
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [260, 258]


def test_bfloat16_norms_become_the_type_of_the_matrices(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", MINI, mx.bfloat16)
    file = exported(tmp_path, source)
    assert convert(file, tmp_path / "half").dtype == "float16"
    for dtype in ("float32", "bfloat16"):
        assert convert(file, tmp_path / dtype, dtype=dtype).dtype == dtype
    for name, array in weights_of(tmp_path / "float32").items():
        assert mx.array_equal(array, weights_of(source)[name].astype(mx.float32))


def test_nano_answers_as_before(tmp_path: Path) -> None:
    file = exported(tmp_path, NANO, "gguf-q8_0")
    runner = CliRunner()
    result = runner.invoke(cli, ["convert", str(file), "--mlx-path", str(tmp_path / "out")])
    assert (result.exit_code, result.stderr.count("\n")) == (0, 1), result.output
    said = [
        runner.invoke(
            cli, ["generate", "--model", model, "--prompt", "Hello!", "--max-tokens", "9"]
        )
        for model in ("nano", str(tmp_path / "out"))
    ]
    assert said[0].stdout == said[1].stdout != ""
    templates = [ChatTemplate.load(f, Tokenizer.load(f)) for f in (NANO, tmp_path / "out")]
    turns = [{"role": "user", "content": "Hi <|end|>"}]
    assert templates[0].encode(turns) == templates[1].encode(turns)


@pytest.mark.parametrize(
    "kind", [kind for kind in BY_NUMBER.values() if kind.unpack], ids=lambda kind: kind.name
)
def test_matrices_of_every_type(tmp_path: Path, kind: Any) -> None:
    """Rows are read in blocks; the numbers are the package's."""
    gguf = pytest.importorskip("gguf")
    golden = mx.load(str(GOLDENS / "blocks.safetensors"))
    packed = np.array(golden[f"{kind.name}.packed"])
    config = {**PHI_4, "hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256}
    number = next(number for number, each in BY_NUMBER.items() if each is kind)
    made = written(config)
    tensors, expected = [], {}
    for each in made.tensors:
        if len(each.shape) == 1:
            tensors.append(each)
            continue
        count = each.shape[0] * each.shape[1] // kind.numbers
        blocks = np.roll(np.resize(packed, (count, kind.nbytes)), len(tensors), axis=0)
        data = blocks.tobytes()
        tensors.append(Described(each.name, each.shape, number, data))
        rows = np.frombuffer(data, np.uint8).reshape(each.shape[0], -1)
        expected[each.name] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(number))
    file = tmp_path / "x.gguf"
    file.write_bytes(Written(made.settings, tensors).bytes())
    shutil.copyfile(NANO / "tokenizer.json", tmp_path / "tokenizer.json")
    checkpoint = GgufCheckpoint(file, "float32")
    plan = plan_conversion(
        ConversionRequest(file, tmp_path / "out", dtype="float32", tokenizer=small(tmp_path))
    )
    assert plan.bytes_before == sum(len(each.data) for each in tensors)
    plan.run()
    for folder in (checkpoint.weights(), weights_of(tmp_path / "out")):
        for name, array in expected.items():
            ours = {"token_embd": "model.embed_tokens", "output": "lm_head"}.get(
                name.removesuffix(".weight"), name
            )
            if not ours.startswith("blk"):
                assert np.array_equal(np.array(folder[f"{ours}.weight"]), array)
        name = "model.layers.0.mlp.down_proj.weight"
        assert np.array_equal(np.array(folder[name]), expected["blk.0.ffn_down.weight"])


def small(folder: Path) -> Path:
    """A tokenizer of fewer tokens than the tiny models have."""
    made = tiny_tokenizer_json(())
    vocabulary = {text: number for text, number in made["model"]["vocab"].items() if number < 40}
    made["model"] |= {"vocab": vocabulary, "merges": []}
    (folder / "small").mkdir()
    (folder / "small" / "tokenizer.json").write_text(json.dumps(made))
    return folder / "small"


def test_quantized_at_once(tmp_path: Path) -> None:
    """As the model's unpacked folder, quantized."""
    file = GOLDENS / "phi3.gguf"
    convert(file, tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "two", Quantization(32, 4))
    convert(file, tmp_path / "one", Quantization(32, 4))
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(mx.array_equal(array, two[name]) for name, array in one.items())


def test_an_adapter_is_fused(tmp_path: Path) -> None:
    """As into the model's unpacked folder."""
    file = GOLDENS / "llama.gguf"
    convert(file, tmp_path / "whole", dtype="float32")
    adapter = adapter_for(tmp_path / "whole", tmp_path / "a", SETTINGS["lora"])
    convert(tmp_path / "whole", tmp_path / "two", adapter=adapter)
    convert(file, tmp_path / "one", dtype="float32", adapter=adapter)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(mx.array_equal(array, two[name]) for name, array in one.items())
    changed = weights_of(tmp_path / "whole")
    assert not all(mx.array_equal(array, changed[name]) for name, array in one.items())


def test_a_folder_that_holds_one(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "llama.gguf", tmp_path)
    assert convert(tmp_path, tmp_path / "out").tensors == 15
    assert load_model(Checkpoint(tmp_path / "out")).config.num_hidden_layers == 2
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json"),
    }


def test_dequantizing_is_what_happens_anyway(tmp_path: Path) -> None:
    for name, dequantize in (("one", True), ("two", False)):
        convert(GOLDENS / "llama.gguf", tmp_path / name, dequantize=dequantize)
    files = [tmp_path / name / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_hub_layout(tmp_path: Path) -> None:
    convert(GOLDENS / "llama.gguf", tmp_path / "hf", layout="hf")
    convert(GOLDENS / "llama.gguf", tmp_path / "apart", layout="hf", split_projections=True)
    one, two = (load_model(Checkpoint(tmp_path / name)) for name in ("hf", "apart"))
    ids = mx.arange(9)[None]
    assert mx.array_equal(one(ids), two(ids))
    assert "model.layers.1.self_attn.q_proj.weight" in mx.load(
        str(tmp_path / "apart/model.safetensors")
    )
    assert json.loads((tmp_path / "hf/config.json").read_text())["architectures"] == [
        "Phi3ForCausalLM"
    ]


def failing(source: Path, out: Path, **keywords: Any) -> PhimlxError:
    with pytest.raises(PhimlxError) as caught:
        convert(source, out, **keywords)
    assert not out.exists()
    assert [path.name for path in out.parent.glob(".*")] == []
    return caught.value


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    made = written(TINY, number=1)
    bad = made.tensors[3]
    data = bytearray(bad.data)
    data[8:10] = b"\x00\x7c"
    tensors = [*made.tensors[:3], Described(bad.name, bad.shape, 1, bytes(data))]
    (tmp_path / "x.gguf").write_bytes(Written(made.settings, [*tensors, *made.tensors[4:]]).bytes())
    error = failing(tmp_path / "x.gguf", tmp_path / "out", tokenizer=small(tmp_path))
    assert isinstance(error, ConversionError)
    assert "holds NaN or infinity: this model is damaged." in str(error)


def test_a_file_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(written(TINY).bytes())
    error = failing(tmp_path / "x.gguf", tmp_path / "out")
    assert isinstance(error, TokenizerError)
    assert str(error) == ("The file's tokenizer is of the kind None, and gpt2 and llama are read.")
    assert error.hint == "Take the tokenizer from the original model: --tokenizer FOLDER_OR_ID"


def test_a_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", TINY)
    (tmp_path / "x.gguf").write_bytes(written(TINY).bytes())
    convert(tmp_path / "x.gguf", tmp_path / "out", tokenizer=source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    convert(source, tmp_path / "other", tokenizer=small(tmp_path))
    found = (tmp_path / "other/tokenizer.json").read_bytes()
    assert found == (tmp_path / "small/tokenizer.json").read_bytes()
    assert not (tmp_path / "other/tokenizer_config.json").exists()


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    error = failing(GOLDENS / "phi3.gguf", tmp_path / "out", tokenizer=NANO)
    assert str(error) == f"The tokenizer of {NANO} has 1532 tokens, and the model 320."
    assert error.hint == "Give the folder of the model's own tokenizer."
    source = write_source(tmp_path / "source", TINY)
    error = failing(GOLDENS / "phi3.gguf", tmp_path / "out", tokenizer=source)
    assert str(error) == (
        f"The tokenizer of {source} is another model's: its '<|endoftext|>' is 258, and the file's "
        "is 257."
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["convert", "x.gguf", "--mlx-path", "out", "--report"],
            2,
            "--report compares with the original, and x.gguf is a GGUF file: convert it to a "
            "folder first, without -q.",
        ),
        (
            ["convert", "x.gguf", "--mlx-path", "out", "-q", "--q-method", "gptq"],
            2,
            "--q-method reads the model many times, and x.gguf is a GGUF file: convert it to a "
            "folder first, without -q.",
        ),
        (
            ["convert", "x.gguf", "--mlx-path", "y.gguf", "--export", "gguf"],
            1,
            "x.gguf is a GGUF file already.\nHint: Convert it to a folder first, and then that "
            "folder to GGUF.",
        ),
        (
            ["generate", "--model", "x.gguf", "--prompt", "Hi"],
            1,
            "x.gguf is a GGUF file, which phimlx runs when it is converted.\nHint: Convert it "
            "with: phimlx convert x.gguf --mlx-path OUT -q",
        ),
        (
            ["convert", "none.gguf", "--mlx-path", "out"],
            1,
            "There is no file none.gguf, and no model of that name.\nHint: Give a model's folder, "
            "or an alias such as phi-4-mini.",
        ),
        (
            ["convert", ".", "--mlx-path", "out"],
            1,
            ". holds 2 GGUF files: x.gguf, z.gguf.\nHint: Name the one that is meant.",
        ),
        (
            ["convert", "z.gguf", "--mlx-path", "out"],
            1,
            "z.gguf is GGUF version 0, and versions 2 and 3 are read.\nHint: Get the original "
            "model's folder, or a GGUF file that llama.cpp made since.",
        ),
    ],
)
def test_commands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if "gguf" in arguments:
        pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDENS / "phi3.gguf", "x.gguf")
    Path("z.gguf").write_bytes(b"GGUF" + bytes(60))
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == code
    assert result.stderr.endswith(f"Error: {message}\n")
    assert sorted(os.listdir()) == ["x.gguf", "z.gguf"]


def test_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDENS / "phi3.gguf", "x.gguf")
    result = CliRunner().invoke(cli, ["show", "x.gguf"])
    assert result.exit_code == 0
    assert "  file          x.gguf\n  architecture  phi3\n" in result.stdout
    found = re.search(r"15\.12 bits per weight \((\S+)\)\n", result.stdout)
    assert found is not None
    types = {"Q8_0", "Q4_0", "F16", "Q5_1", "BF16", "Q4_1", "F32", "Q5_0"}
    assert set(found[1].split("/")) == types
    assert result.stderr == "Convert it with: phimlx convert x.gguf --mlx-path OUT -q\n"
    about = json.loads(CliRunner().invoke(cli, ["show", "x.gguf", "--json"]).stdout)
    assert (about["vocabulary"], about["context_length"], about["tied"]) == (320, 64, True)


PLACES = (
    *("block_count", "head_count", "embedding_length", "context_length", "dimension_count"),
    *("freq_base", "epsilon", "original_context_length", "attn_factor", "feed_forward_length"),
    *("token_type", "tokens", "merges", "eos_token_id", "chat_template", "pre", "model", "name"),
    *("attn_q", "attn_qkv", "token_embd", "rope_factors_long", "output_norm", "architecture"),
)
VALUES = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    255,
    65535,
    2**31,
    2**32 - 1,
    2**60,
    2**64 - 1,
    0x7FC00000,
    0x7F800000,
)


@pytest.mark.parametrize("name", ["llama", "phi3", "phi2"])
def test_any_damage_is_told_or_read(tmp_path: Path, name: str) -> None:
    """Numbers in and around settings, tensors and tokens, changed at random."""
    whole, file, out = (
        (GOLDENS / f"{name}.gguf").read_bytes(),
        tmp_path / "x.gguf",
        tmp_path / "out",
    )
    pick = random.Random(name)
    refused = 0
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(pick.choice((1, 1, 2, 4))):
            place = pick.choice(PLACES).encode()
            at = data.find(place) + len(place) + pick.randint(-12, 30)
            size = pick.choice((1, 2, 4, 8))
            data[at : at + size] = struct.pack("<Q", pick.choice(VALUES))[:size]
        file.write_bytes(data)
        try:
            plan_conversion(ConversionRequest(file, out)).run()
        except PhimlxError as error:
            refused += 1
            told = str(error)
        else:
            told = ""
            shutil.rmtree(out)
        assert len(told) < 400
        assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    assert 10 < refused < 80


KILLED = """
import os, sys
from convert import ConversionRequest, plan, plan_conversion
plan.BATCH_BYTES, plan.JOURNAL_BYTES = 4096, 1
done = 0
def advance(nbytes):
    global done
    done += nbytes
    if done > 60_000:
        os.kill(os.getpid(), 9)
plan_conversion(ConversionRequest(sys.argv[1], sys.argv[2])).run(advance)
"""


def test_a_killed_conversion_goes_on(tmp_path: Path) -> None:
    file, out = GOLDENS / "phi3.gguf", tmp_path / "out"
    run = subprocess.run([sys.executable, "-c", KILLED, str(file), str(out)], timeout=60)
    assert run.returncode == -9
    assert not out.exists()
    result = convert(file, out)
    assert 0 < result.continued < result.bytes_before
    convert(file, tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "phi3", "phi2"])
def test_mlx_lm_loads_what_is_converted(tmp_path: Path, name: str) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    convert(GOLDENS / f"{name}.gguf", tmp_path / "out", dtype="float32")
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    ours = load_model(Checkpoint(tmp_path / "out"))
    ids = mx.arange(10, 22)[None]
    difference = mx.abs(model(ids) - ours(ids)).max() / mx.abs(ours(ids)).max()
    assert float(difference) < 1e-5 or name == "phi3"  # whose long factors mlx-lm always uses
    text = "the <|user|>cat<|end|>"
    expected = Tokenizer.load(tmp_path / "out").encode(text, control=True)
    assert tokenizer.encode(text) == expected
    assert 258 in tokenizer.eos_token_ids
