"""GGUF files, read back with the `gguf` package's own reader."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from convert import ConversionRequest, Quantization, plan_conversion
from convert import convert as convert_model
from convert.export import gguf as ours
from phimlx.checkpoint.gguf.names import gguf_name
from phimlx.cli.group import cli
from phimlx.errors import ConversionError
from phimlx.hub.resolve import NANO
from phimlx.models import registry
from phimlx.prompt.tokenizer.gguf import SPLITS
from tests.convert.tiny import MINI, PHI_4, parameters, weights_of, write_model

PHI3 = registry.of_config({"model_type": "phi3"}).gguf
assert PHI3 is not None

SPLIT = SPLITS["dbrx"]
TOKENIZER: dict[str, Any] = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Split", "pattern": {"Regex": SPLIT}}],
    },
    "added_tokens": [
        {"id": 40, "content": "<|endoftext|>", "special": True},
        {"id": 41, "content": "<|tool|>", "special": False},
        {"id": 42, "content": "word", "special": False},
    ],
}


def write_source(folder: Path, config: dict[str, Any] = PHI_4, **tokenizer: Any) -> Path:
    write_model(folder, config, parameters(config, mx.bfloat16))
    (folder / "tokenizer.json").write_text(json.dumps({**TOKENIZER, **tokenizer}))
    return folder


def plan_gguf(source: Path, out: Path, kind: str = "F16", **keywords: Any) -> Any:
    layout = {"F16": "gguf", "Q8_0": "gguf-q8_0"}[kind]
    return plan_conversion(ConversionRequest(source, out, layout=layout, **keywords))


def failing(source: Path, out: Path, **keywords: Any) -> ConversionError:
    before = sorted(out.parent.iterdir())
    with pytest.raises(ConversionError) as caught:
        plan_gguf(source, out, **keywords).run()
    assert sorted(out.parent.iterdir()) == before
    return caught.value


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    error = failing(write_source(tmp_path / "source"), tmp_path / "out.gguf")
    assert str(error) == "GGUF files are written by the gguf package, which is not installed."
    assert error.hint == "Install it with: pip install 'phimlx[gguf]'"


gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")


def fields_of(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("config", [PHI_4, MINI])
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_the_reader_finds_every_weight(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    np = pytest.importorskip("numpy")
    source = write_source(tmp_path / "source", config)
    result = plan_gguf(source, tmp_path / "out.gguf", kind).run()
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    expected = {
        gguf_name(name, PHI3): np.array(array.astype(mx.float32))
        for name, array in weights_of(source).items()
    }
    if config is MINI:
        for which in ("long", "short"):
            factors = config["rope_scaling"][f"{which}_factor"]
            expected[f"rope_factors_{which}.weight"] = np.array(factors, np.float32)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        stored = "F32" if array.ndim == 1 else kind
        assert found[name].tensor_type.name == stored
        assert list(found[name].shape) == list(reversed(array.shape))
        packed = gguf.quants.quantize(array, gguf.GGMLQuantizationType[stored])
        assert found[name].data.tobytes() == packed.tobytes()
    factors = sum(a.nbytes for name, a in expected.items() if "rope" in name)
    assert sum(tensor.data.nbytes for tensor in found.values()) - factors <= result.bytes_after


def test_names_are_llama_cpps() -> None:
    known = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.PHI3]
    names = {gguf.TENSOR_NAMES[tensor].format(bid=1) + ".weight" for tensor in known}
    assert {
        gguf_name(name, PHI3).replace("blk.0.", "blk.1.") for name in parameters(PHI_4)
    } <= names


def test_settings(tmp_path: Path) -> None:
    plan_gguf(write_source(tmp_path / "source", MINI), tmp_path / "out.gguf").run()
    fields = fields_of(tmp_path / "out.gguf")
    expected = {
        "general.architecture": "phi3",
        "general.file_type": 1,
        "phi3.context_length": 256,
        "phi3.rope.scaling.original_context_length": 32,
        "phi3.embedding_length": 64,
        "phi3.feed_forward_length": 96,
        "phi3.block_count": 2,
        "phi3.attention.head_count": 4,
        "phi3.attention.head_count_kv": 2,
        "phi3.rope.dimension_count": 12,
        "phi3.rope.freq_base": 10000.0,
        "phi3.attention.sliding_window": 0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "dbrx",
        "tokenizer.ggml.merges": ["a b"],
    }
    assert {name: fields[name] for name in expected} == expected
    # sqrt(1 + ln(256 / 32) / ln(32))
    assert fields["phi3.rope.scaling.attn_factor"] == pytest.approx(1.6**0.5)
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == 48
    assert list(zip(tokens, types, strict=True))[:4] == [
        ("a", 1),
        ("b", 1),
        ("ab", 1),
        ("[PAD3]", 5),
    ]
    assert list(zip(tokens, types, strict=True))[40:43] == [
        ("<|endoftext|>", 3),
        ("<|tool|>", 3),
        ("word", 4),
    ]


def test_nano(tmp_path: Path) -> None:
    plan_gguf(NANO, tmp_path / "nano.gguf", "Q8_0").run()
    fields = fields_of(tmp_path / "nano.gguf")
    assert fields["general.name"] == "nano"
    assert fields["tokenizer.ggml.pre"] == "gpt-4o"
    assert fields["tokenizer.ggml.eos_token_id"] == 1520
    assert fields["tokenizer.ggml.tokens"][1520] == "<|endoftext|>"
    assert "<|assistant|>" in fields["tokenizer.chat_template"]


def test_blocks_of_any_size_give_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source")
    plan_gguf(source, tmp_path / "a.gguf", "Q8_0").run()
    monkeypatch.setattr(ours, "BLOCK_BYTES", 1000)
    plan_gguf(source, tmp_path / "b.gguf", "Q8_0").run()
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


KILLED = """
import os, signal, sys
from convert import ConversionRequest, plan_conversion
from convert.export import gguf
gguf.BLOCK_BYTES, gguf.JOURNAL_BYTES = 1000, int(sys.argv[4])
done = []
def advance(nbytes):
    done.append(nbytes)
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
request = ConversionRequest(sys.argv[1], sys.argv[2], layout="gguf-q8_0")
plan_conversion(request).run(advance)
"""


def killed(source: Path, out: Path, blocks: int, journal_bytes: int) -> Path:
    """What a run leaves that is killed when it has dealt with so many blocks."""
    arguments = [str(source), str(out), str(blocks), str(journal_bytes)]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    return out.parent / f".{out.name}.partial"


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "journal_bytes"), [(1, 1), (30, 1), (101, 1), (101, 20_000)])
def test_a_killed_export_goes_on_to_the_same_bytes(
    tmp_path: Path, blocks: int, journal_bytes: int
) -> None:
    source, out = write_source(tmp_path / "source", MINI), tmp_path / "out.gguf"
    plan_gguf(source, tmp_path / "whole.gguf", "Q8_0").run()
    leftover = killed(source, out, blocks, journal_bytes)
    done = json.loads((leftover / ".journal.json").read_text())["done"]
    with (leftover / out.name).open("ab") as opened:
        opened.write(b"half a tensor")
    seen: list[int] = []
    planned = plan_gguf(source, out, "Q8_0")
    result = planned.run(seen.append)
    assert result.continued == sum(step.nbytes for step in planned.tensors.conversions[:done]) > 0
    assert sum(seen) == planned.bytes_before
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.gguf", "whole.gguf"}


def test_a_killed_export_of_another_kind_is_not_continued(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out.gguf"
    killed(source, out, 101, 1)
    assert plan_gguf(source, out, "F16").run().continued == 0
    assert fields_of(out)["general.file_type"] == 1


def test_a_journal_without_its_file_is_not_continued(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out.gguf"
    (killed(source, out, 101, 1) / out.name).unlink()
    assert plan_gguf(source, out, "Q8_0").run().continued == 0


def test_quantized_sources_are_dequantized_when_asked(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    convert_model(source, tmp_path / "four", Quantization(32, 4))
    error = failing(tmp_path / "four", tmp_path / "out.gguf")
    assert str(error) == f"{tmp_path}/four is already quantized, to 4 bits."
    plan_gguf(tmp_path / "four", tmp_path / "direct.gguf", dequantize=True).run()
    convert_model(tmp_path / "four", tmp_path / "plain", dequantize=True)
    plan_gguf(tmp_path / "plain", tmp_path / "roundabout.gguf").run()
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "roundabout.gguf").read_bytes()


def test_weights_too_large_for_half_precision(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    weights = parameters(PHI_4, mx.bfloat16)
    weights["lm_head.weight"][0, 0] = 1e6
    write_model(source, PHI_4, weights)
    error = failing(source, tmp_path / "out.gguf")
    assert str(error) == "lm_head.weight holds numbers too large for float16."
    plan_gguf(source, tmp_path / "out.gguf", "Q8_0").run()


def test_two_at_once(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out.gguf"
    first, second = plan_gguf(source, out), plan_gguf(source, out)
    errors = []

    def in_between(nbytes: int) -> None:
        with pytest.raises(ConversionError) as caught:
            second.run()
        errors.append(str(caught.value))

    first.run(in_between)
    assert set(errors) == {f"{out} is being written by another process."}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.gguf"}
    assert "phi3.block_count" in fields_of(out)


def test_a_file_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("precious")
    error = failing(write_source(tmp_path / "source"), tmp_path / "out.gguf")
    assert str(error) == f"{tmp_path}/out.gguf exists already."
    assert (tmp_path / "out.gguf").read_text() == "precious"


UNKNOWN = "tokenizer.json is not one that llama.cpp would read as it is meant ({})."


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"pre_tokenizer": None}, "TypeError \"'NoneType' object is not subscriptable\""),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
            "IndexError 'list index out of range'",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [{"pattern": {"Regex": r"\w+"}}],
                }
            },
            "StopIteration ''",
        ),
        ({"model": {"vocab": {"a": 48}}}, "IndexError 'a has the id 48'"),
        ({"model": {"vocab": {"a": -1}}}, "IndexError 'a has the id -1'"),
        ({"model": {"vocab": ["a"]}}, "AttributeError \"'list' object has no attribute 'items'\""),
        ({"added_tokens": [{"id": 1}]}, "KeyError \"'content'\""),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_know(
    tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    error = failing(write_source(tmp_path / "source", **changes), tmp_path / "out.gguf")
    assert str(error) == UNKNOWN.format(what)


def test_no_tokenizer(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source")
    error = failing(source, tmp_path / "out.gguf")
    assert str(error) == f"{source} has no tokenizer.json, which a GGUF file holds."


def test_the_command(tmp_path: Path) -> None:
    source, out = write_source(tmp_path / "source"), tmp_path / "out.gguf"
    arguments = ["convert", str(source), "--out", str(out), "--export", "gguf-q8_0"]
    result = CliRunner().invoke(cli, arguments, prog_name="phimlx")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{out}: ")
    assert result.stderr == ""
    assert fields_of(out)["general.file_type"] == 7
    result = CliRunner().invoke(cli, [*arguments, "--dtype", "float16"], prog_name="phimlx")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: --export gguf-q8_0 says the type of the weights: leave --dtype out.\n"
    )
