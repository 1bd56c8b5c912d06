"""Models for ONNX Runtime: what is refused, what a failing builder leaves, and tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from convert import convert, plan_conversion
from convert.export import onnx as ours
from convert.request import ConversionRequest
from phimlx.errors import ConversionError
from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from tests.convert.tiny import PHI_4, failing, write_model

TOKENIZER = NANO / "tokenizer.json"
BUILDER = """
import pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = pathlib.Path(given["-o"])
out.mkdir()
assert (pathlib.Path(given["-i"]) / "model.safetensors").is_file()
(out / "model.onnx").write_text(given["-p"])
print("halfway")
{end}
(out / "genai_config.json").write_text("{{}}")
"""


def write_source(folder: Path, config: dict[str, Any] = PHI_4) -> Path:
    write_model(folder, config)
    shutil.copy(TOKENIZER, folder)
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of a builder that stands in for the real one, which takes half a minute."""
    monkeypatch.setattr(ours, "NEEDED", ())
    monkeypatch.setattr(ours, "version", lambda name: "1.2.3")
    builder = tmp_path / "packages" / "onnxruntime_genai" / "models" / "builder.py"
    builder.parent.mkdir(parents=True)
    builder.write_text(BUILDER.format(end=""))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return builder


def test_without_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "NEEDED", ("a_module_that_is_nowhere",))
    error = failing(write_source(tmp_path / "source"), tmp_path / "out", layout="onnx")
    assert str(error) == (
        "ONNX models are made by onnxruntime-genai's builder, which is not installed."
    )
    assert error.hint == "Install it with: pip install 'phimlx[onnx]'"


PHI: dict[str, Any] = {
    **{key: PHI_4[key] for key in PHI_4 if key != "rms_norm_eps"},
    "model_type": "phi",
    "architectures": ["PhiForCausalLM"],
    "partial_rotary_factor": 1.0,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "gelu_new",
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {**PHI_4, "partial_rotary_factor": 0.75},
            "turns 12 channels of each head, and ONNX Runtime turns them in multiples of 16.",
        ),
        (
            {**PHI_4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "has linear scaling, which onnxruntime-genai's builder leaves out.",
        ),
        (
            {**PHI_4, "vocab_size": 128},
            "has a projection of 128 rows, as many as tokens, which onnxruntime-genai's builder "
            "would take for the output head.",
        ),
        (
            {**PHI, "qk_layernorm": True},
            "norms queries and keys, which onnxruntime-genai's builder leaves out.",
        ),
    ],
)
def test_what_would_be_computed_otherwise(
    tmp_path: Path, installed: Path, config: dict[str, Any], reason: str
) -> None:
    source = write_source(tmp_path / "source", config)
    error = failing(source, tmp_path / "out", layout="onnx")
    assert str(error) == f"{source} {reason}"
    assert error.hint == "Write another layout: --export hf or gguf."


def test_a_model_that_the_builder_does_not_make_whole(tmp_path: Path, installed: Path) -> None:
    error = failing(NANO_MULTIMODAL, tmp_path / "out", layout="onnx")
    assert str(error) == (
        f"{NANO_MULTIMODAL} is a phi4mm model, which onnxruntime-genai's builder does not make "
        "whole: there is no ONNX export of such a model."
    )


def test_without_a_tokenizer(tmp_path: Path, installed: Path) -> None:
    source = write_model(tmp_path / "source", PHI_4)
    error = failing(source, tmp_path / "out", layout="onnx-int4")
    assert str(error) == (f"{source} has no tokenizer.json, which a model for ONNX Runtime holds.")


@pytest.mark.parametrize(("layout", "type"), [("onnx", "fp32"), ("onnx-int4", "int4")])
def test_the_folder_holds_what_the_builder_made(
    tmp_path: Path, installed: Path, layout: str, type: str
) -> None:
    source = write_source(tmp_path / "source")
    (source / "LICENSE").write_text("MIT")
    result = convert(source, tmp_path / "out", layout=layout)
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"model.onnx", "genai_config.json", "LICENSE", "README.md"}
    assert (tmp_path / "out" / "model.onnx").read_text() == type
    assert (result.dtype, result.bytes_after) == (type, 4)
    assert "onnxruntime-genai\n1.2.3." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("end", ["raise SystemExit('no such op')", "sys.exit(0)"])
def test_a_builder_that_fails_leaves_nothing(tmp_path: Path, installed: Path, end: str) -> None:
    installed.write_text(BUILDER.format(end=end))
    source = write_source(tmp_path / "source")
    error = failing(source, tmp_path / "out", layout="onnx")
    last = "no such op" if "op" in end else "halfway"
    assert str(error) == f"onnxruntime-genai's builder made no model of {source}; it says: {last}"


def test_a_killed_run_goes_on_with_the_weights_that_are_there(
    tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source")
    request = ConversionRequest(source, tmp_path / "out", layout="onnx")

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    plan = plan_conversion(request)
    monkeypatch.setattr(ours.OnnxPlan, "_build", die)
    monkeypatch.setattr("convert.folder.discard", lambda folder: None)  # as SIGKILL leaves it
    with pytest.raises(Killed):
        plan.run()
    monkeypatch.undo()
    monkeypatch.setattr(ours, "NEEDED", ())
    monkeypatch.setattr(ours, "version", lambda name: "1.2.3")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    result = plan_conversion(request).run()
    assert result.continued == result.bytes_before > 0
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "packages", "source"]


def turned_whole(folder: Path) -> Path:
    """Nano with all channels turned, since ONNX Runtime does not turn 24 of 32."""
    folder.mkdir()
    for file in NANO.iterdir():
        if file.name in ("model.safetensors", "config.json") or "token" in file.name:
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["partial_rotary_factor"] = 1.0
    config["rope_scaling"] |= {
        "short_factor": [1.0 + 0.01 * i for i in range(16)],
        "long_factor": [1.0 + 0.7 * i for i in range(16)],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_onnx_runtimes_tokens_are_ours_on_both_sides_of_the_step(tmp_path: Path) -> None:
    reason = "is not installed: pip install 'phimlx[onnx]'"
    for name in ("onnx_ir", "torch"):
        pytest.importorskip(name, reason=f"{name} {reason}")
    og = pytest.importorskip("onnxruntime_genai", reason=f"onnxruntime-genai {reason}")
    import mlx.core as mx

    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.checkpoint.load import load_model

    source = turned_whole(tmp_path / "source")
    result = convert(source, tmp_path / "out", layout="onnx")
    assert len(result.remarks) == 1
    runs, ours_ = og.Model(str(tmp_path / "out")), load_model(Checkpoint(source), mx.float32)
    for length, count in ((8, 20), (60, 40), (127, 1), (129, 20), (300, 30)):
        prompt = [(length * 31 + 97 * i) % 1500 for i in range(length)]
        request = Request(prompt, Sampler(Sampling(), seed=0), count)
        Engine(ours_).run_all([request])
        settings = og.GeneratorParams(runs)
        settings.set_search_options(max_length=length + count, do_sample=False)
        generator = og.Generator(runs, settings)
        generator.append_tokens(prompt)
        found: list[int] = []
        while not generator.is_done():
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        expected = request.reply.tokens
        assert found, length
        assert found == expected[: len(found)], length


def test_quantizing_is_onnx_runtimes() -> None:
    from convert import Quantization

    with pytest.raises(ConversionError) as caught:
        ConversionRequest("a", "b", Quantization(bits=4), layout="onnx-int4")
    assert str(caught.value) == "A model is either quantized or written in ONNX."
