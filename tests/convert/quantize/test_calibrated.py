"""Calibrated quantization: against rounding on phi-4-nano, and what is refused before it begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner

from convert import CalibrationSettings, Quantization, Recipe, convert
from convert.measure.report import measure
from convert.quantize import calibrated as calibrated
from convert.quantize import layerwise
from convert.quantize.calibration import CalibrationWindows
from convert.quantize.recipe import Rule
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.errors import ConversionError, TokenizerError
from phimlx.hub.resolve import NANO
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from tests.convert.tiny import (
    MINI,
    PHI_4,
    failing,
    parameters,
    plan,
    same_bits,
    weights_of,
    write_model,
)

WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1536}
UNTIED = {**PHI_4, **WIDE}
TIED = {**MINI, **WIDE}
FOUR = Quantization(32, 4)


def tiny(folder: Path, config: Mapping[str, Any] = UNTIED) -> Path:
    """A model with phi-4-nano's vocabulary, in bfloat16."""
    write_model(folder, config, parameters(config, mx.bfloat16))
    shutil.copy(NANO / "tokenizer.json", folder)
    return folder


def conversations(first: int, count: int) -> str:
    """Text of the kind that phi-4-nano knows, every second conversation from `first` on."""
    tokenizer = Tokenizer.load(NANO)
    template = ChatTemplate.load(NANO, tokenizer)
    lines = (NANO / "heldout.jsonl").read_text("utf-8").splitlines()[first::2][:count]
    rows = [json.loads(line) for line in lines]
    return "".join(
        tokenizer.decode(
            template.encode(
                [*row["messages"], {"role": "assistant", "content": row["answer"]}],
                row.get("tools"),
                add_generation_prompt=False,
            )
        )
        for row in rows
    )


def divergences(folder: Path) -> list[float]:
    """From phi-4-nano, on conversations that nothing was learned from, in both LongRoPE regimes."""
    report = measure(NANO, folder, conversations(1, 40), 640)
    assert [agreement.long for agreement in report.agreements] == [False, True]
    return [agreement.divergence for agreement in report.agreements]


@pytest.mark.slow
@pytest.mark.parametrize(
    "learning",
    [
        CalibrationSettings("gptq", conversations(0, 60), samples=16, length=128),
        CalibrationSettings(
            "dwq", conversations(0, 60), samples=16, length=128, steps=6, learning_rate=1e-4
        ),
    ],
    ids=lambda learning: learning.method,
)
def test_nano_is_closer_than_rounded(tmp_path: Path, learning: CalibrationSettings) -> None:
    form = Quantization(64, 4)
    rounded = convert(NANO, tmp_path / "rounded", form)
    made = convert(NANO, tmp_path / "learned", form, calibration=learning)
    assert made.bytes_after == rounded.bytes_after
    before, after = divergences(tmp_path / "rounded"), divergences(tmp_path / "learned")
    assert all(a < b for a, b in zip(after, before, strict=True)), (before, after)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_gptq_of_both_kinds_is_whole_and_repeatable(
    tmp_path: Path, config: Mapping[str, Any]
) -> None:
    source = tiny(tmp_path / "source", config)
    eight = Quantization(32, 8)
    recipe = Recipe("own", FOUR, (Rule("*.o_proj", eight), Rule("*.qkv_proj", None)))
    learning = CalibrationSettings("gptq", samples=8, length=32)
    made = convert(source, tmp_path / "one", recipe, calibration=learning)
    convert(source, tmp_path / "two", recipe, calibration=learning)
    convert(source, tmp_path / "rounded", recipe)
    one, rounded = weights_of(tmp_path / "one"), weights_of(tmp_path / "rounded")
    assert same_bits(one, weights_of(tmp_path / "two"))
    assert made.bytes_after == sum(array.nbytes for array in rounded.values())
    changed = {name for name in one if not same_bits({name: one[name]}, {name: rounded[name]})}
    kinds = {name.removesuffix(".weight").split(".")[-1] for name in changed if "weight" in name}
    assert kinds == {"o_proj", "gate_up_proj", "down_proj"} | (
        set() if config["tie_word_embeddings"] else {"lm_head"}
    )
    assert Checkpoint(tmp_path / "one").config == Checkpoint(tmp_path / "rounded").config
    assert {file.name for file in (tmp_path / "one").iterdir()} == {
        file.name for file in (tmp_path / "rounded").iterdir()
    }
    digest = CalibrationWindows.of(Checkpoint(source), None, 8, 32, True).digest
    card = (tmp_path / "one" / "README.md").read_text("utf-8")
    assert "\n## Calibrated quantization\n\nGPTQ on 8" in card
    assert f"(SHA-256 `{digest}`); seed 0.\n" in card
    logits = load_model(Checkpoint(tmp_path / "one"), mx.float32)(mx.array([[1, 2, 3]]))
    assert mx.all(mx.isfinite(logits)).item()


def test_gptq_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    learning = CalibrationSettings("gptq", samples=8, length=32)
    convert(source, tmp_path / "whole", FOUR, calibration=learning)
    seen: list[float] = []

    def stop(percent: float) -> None:
        seen.append(percent)
        if len(seen) == 6:  # in the second decoder layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(source, tmp_path / "out", FOUR, calibration=learning).run(calibrating=stop)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial").is_dir()
    again: list[float] = []
    plan(source, tmp_path / "out", FOUR, calibration=learning).run(calibrating=again.append)
    assert sum(again) == pytest.approx(100)
    assert again[0] == pytest.approx(sum(seen[:4]))  # the first decoder layer, at once
    assert same_bits(weights_of(tmp_path / "out"), weights_of(tmp_path / "whole"))
    assert not (tmp_path / ".out.partial").exists()


def test_an_interrupted_dwq_leaves_nothing(tmp_path: Path) -> None:
    def stop(percent: float) -> None:
        raise KeyboardInterrupt

    source = tiny(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        plan(source, tmp_path / "out", FOUR, calibration="dwq").run(calibrating=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_sensitivity_reaches_the_bits_that_are_wanted(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    learning = CalibrationSettings("sensitivity", samples=8, length=32, target_bits=6.0)
    made = convert(source, tmp_path / "out", FOUR, calibration=learning)
    assert 5.5 < made.bits_per_weight <= 6
    assert made.recipe == "sensitivity-6"
    table = Checkpoint(tmp_path / "out").config["quantization"]
    assert {value["bits"] for value in table.values() if isinstance(value, dict)} == {6}
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "seed 0, target bits per weight 6.\n" in card


def test_dwq_that_makes_it_worse_is_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source")
    learning = CalibrationSettings("dwq", samples=16, length=64, steps=2, learning_rate=0.9)
    error = failing(source, tmp_path / "out", FOUR, calibration=learning)
    assert str(error).startswith(
        "DWQ made the model no better: on text kept from training its KL divergence from the "
        "original went from "
    )
    assert error.hint == "Choose a lower --learning-rate, or a longer calibration text."


@pytest.mark.slow
def test_a_damaged_weight_stops_it(tmp_path: Path) -> None:
    weights = parameters(UNTIED, mx.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][3, 5] = mx.nan
    source = write_model(tmp_path / "source", UNTIED, weights)
    shutil.copy(NANO / "tokenizer.json", source)
    for method in ("gptq", "dwq"):
        error = failing(source, tmp_path / "out", FOUR, calibration=method)
        assert str(error) == f"{name} holds NaN or infinity: this model is damaged."


def test_windows_know_the_longrope_step() -> None:
    checkpoint = Checkpoint(NANO)  # its step is at 128 tokens
    both = CalibrationWindows.of(checkpoint, conversations(0, 60), 12, 512, past_step=True)
    assert [len(window) for window in both.windows[:2]] == [512, 512]  # past the step by request
    short = CalibrationWindows.of(checkpoint, conversations(0, 60), 12, 100, past_step=True)
    assert [len(window) for window in short.windows] == [96] * 12 + [256]
    alone = CalibrationWindows.of(checkpoint, conversations(0, 60), 12, 100, past_step=False)
    assert alone.windows == short.windows[:12]
    tokens = Tokenizer.load(NANO).encode(conversations(0, 60), control=True)
    assert alone.windows[0] == tuple(tokens[:96])
    assert alone.windows[-1] == tuple(tokens[-96:])


def test_each_window_is_rotated_by_its_own_table() -> None:
    model = load_model(Checkpoint(NANO), mx.float32)
    short, long = (tuple(range(length)) for length in (128, 160))
    stacks = layerwise.embed_windows(model, [short, short, long])
    assert [stack.x.shape for stack in stacks] == [(2, 128, 256), (1, 160, 256)]
    rope = model.config.rope
    for stack, table in zip(stacks, (False, True), strict=True):
        cos, _ = rope(mx.arange(stack.x.shape[1])[None], [table])
        assert mx.array_equal(stack.forward.rope[0], cos).item()


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"method": "awq"}, "There is no method 'awq'; there is gptq, dwq, sensitivity."),
    ({"method": "gptq", "samples": 7}, "samples is 7; it must be 8 at least."),
    ({"method": "gptq", "length": 31}, "length is 31; it must be 32 at least."),
    ({"method": "dwq", "steps": 0}, "steps is 0; it must be 1 at least."),
    (
        {"method": "dwq", "learning_rate": 1.0},
        "learning_rate is 1.0; it must be between 0 and 1.",
    ),
    (
        {"method": "gptq", "target_bits": 4.0},
        "target_bits says how large a model by sensitivity becomes: it goes with that method, "
        "which needs it.",
    ),
    (
        {"method": "sensitivity"},
        "target_bits says how large a model by sensitivity becomes: it goes with that method, "
        "which needs it.",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError) as caught:
        CalibrationSettings(**settings)
    assert str(caught.value) == message


SENSITIVITY = CalibrationSettings("sensitivity", target_bits=20.0)
MIXED = Recipe("own", FOUR, (Rule("*.o_proj", Quantization(32, 6)),))
REFUSED: list[tuple[Any, Any, str, str | None]] = [
    ("gptq", None, "GPTQ quantizes, but no quantization is chosen.", "Add -q or --recipe."),
    (
        "gptq",
        Quantization(32, 4, "mxfp4"),
        "GPTQ calibrates affine quantization, not mxfp4.",
        "Leave --q-mode out.",
    ),
    (
        "dwq",
        Quantization(32, 8),
        "DWQ calibrates weights of 2, 3, 4, 5 or 6 bits, not of 8.",
        "Choose other bits, or another --q-method.",
    ),
    (
        "dwq",
        Quantization(32, 4, "mxfp4"),
        "DWQ calibrates affine quantization, not mxfp4.",
        "Leave --q-mode out.",
    ),
    (
        SENSITIVITY,
        MIXED,
        "Bits by sensitivity chooses the layers that get more bits: it goes with -q, not with a "
        "recipe.",
        "Choose -q and --q-target-bits instead of --recipe.",
    ),
    (
        SENSITIVITY,
        FOUR,
        "20 bits per weight cannot be had from layers of 4 and 6 bits, which make 5.01 to 7.01.",
        "Choose other --q-bits or another --q-target-bits.",
    ),
    (
        CalibrationSettings("gptq", " \n"),
        FOUR,
        "The calibration text is empty.",
        "Give a text like those that the model will read, or none.",
    ),
    (
        CalibrationSettings("gptq", "a\0b" * 9999),
        FOUR,
        "The calibration text holds NUL characters, so it is no text.",
        "Give a file of plain text in UTF-8.",
    ),
    (
        CalibrationSettings("gptq", "<|end|>" * 2047),
        FOUR,
        "The calibration text has 2,047 tokens; calibration takes 2,048 at least, and 50,000 are "
        "better.",
        "Give a longer text, or none.",
    ),
]


@pytest.mark.parametrize(("method", "recipe", "message", "hint"), REFUSED)
def test_what_is_refused(
    tmp_path: Path, method: Any, recipe: Any, message: str, hint: str | None
) -> None:
    source = tiny(tmp_path / "source")
    error = failing(source, tmp_path / "out", recipe, calibration=method)
    assert (str(error), error.hint) == (message, hint)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    convert(tiny(tmp_path / "source"), tmp_path / "six", Quantization(32, 6))
    error = failing(tmp_path / "six", tmp_path / "out", FOUR, calibration="gptq")
    assert str(error) == (
        f"GPTQ calibrates the original weights, but {tmp_path / 'six'} is already quantized, to 6 "
        "bits."
    )
    assert error.hint == "Convert the original model."


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    source = tiny(tmp_path / "source", {**UNTIED, "vocab_size": 48})
    with pytest.raises(TokenizerError) as caught:
        convert(source, tmp_path / "out", FOUR, calibration="gptq")
    assert not (tmp_path / "out").exists()
    highest = Tokenizer.load(NANO).vocab_size - 1
    assert str(caught.value) == (
        f"The tokenizer in {source} has the token {highest}, but the model's vocabulary has 48."
    )
    assert caught.value.hint == "Get the tokenizer files that belong to the model into its folder."


def bundled_text() -> str:
    from convert.measure.report import BUNDLED_TEXT

    return BUNDLED_TEXT.read_text("utf-8")


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path / "source")
    need = {
        method: calibrated.ESTIMATES[method](lesson)
        for method in ("gptq", "dwq")
        if (lesson := plan(source, tmp_path / "out", FOUR, calibration="gptq").calibration)
        is not None
    }
    monkeypatch.setattr(calibrated, "machine_memory", lambda: 1_000_000)
    error = failing(source, tmp_path / "out", FOUR, calibration="dwq")
    assert str(error).startswith("DWQ needs about ")
    assert str(error).endswith(" of memory for this model, and this machine has 1.00 MB.")
    assert error.hint == "Leave --q-method out: plain quantization takes 250 MB."
    assert need["gptq"] < need["dwq"]
    monkeypatch.setattr(calibrated, "machine_memory", lambda: need["gptq"] + 1_000_000)
    error = failing(source, tmp_path / "out", FOUR, calibration="dwq")
    assert error.hint is not None
    assert error.hint.startswith("--q-method gptq needs ")


USAGE_ERRORS = [
    (["-q", "--calibration", "t.txt"], "--calibration goes with --q-method gptq or dwq or"),
    (["-q", "--q-method", "rtn", "--learning-rate", "0.1"], "--learning-rate goes with --q-method"),
    (["-q", "--q-method", "sensitivity"], "--q-method sensitivity needs --q-target-bits."),
    (["--q-method", "gptq"], "--q-method goes with -q, which quantizes the weights."),
    (
        ["-q", "--q-method", "gptq", "--report"],
        "--report would measure on the text that the weights are calibrated on: give another one "
        "with --report-text or --calibration.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), USAGE_ERRORS)
def test_options_that_do_not_go_together(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(
        cli, ["convert", "nano", "--mlx-path", str(tmp_path / "out"), *arguments]
    )
    assert result.exit_code == 2
    assert f"Error: {message}" in result.stderr


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "noise.bin").write_bytes(b"\xff\xfe\x00\x80")
    arguments = ["--calibration", str(tmp_path / "noise.bin"), "-q", "--q-method", "gptq"]
    result = CliRunner().invoke(
        cli, ["convert", "nano", "--mlx-path", str(tmp_path / "out"), *arguments]
    )
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path / 'noise.bin'} is not UTF-8 text.\n"


def test_what_a_person_reads(tmp_path: Path) -> None:
    source, out = tiny(tmp_path / "source"), tmp_path / "out"
    arguments = ["-q", "--q-group-size", "32", "--q-method", "gptq", "--calibration-samples", "8"]
    result = CliRunner().invoke(
        cli,
        [
            *("convert", str(source), "--mlx-path", str(out)),
            *arguments,
            *("--calibration-length", "32"),
        ],
    )
    assert result.exit_code == 0, result.stderr
    first, second = result.stderr.splitlines()
    assert first.startswith("GPTQ needs about ")
    assert second == f"Try it: phimlx chat --model {out}"
    assert result.stdout.startswith(f"{out}: ")
