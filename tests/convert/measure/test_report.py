"""What a conversion cost: against plain computations with whole models, and bits against bits."""

from __future__ import annotations

import ast
import json
import math
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from convert import Quantization, Recipe, convert
from convert.measure.compare import Agreement, LayerError, Windows, choose_windows
from convert.measure.report import BUNDLED_TEXT, COLUMNS, QualityReport, measure
from convert.quantize.recipe import recipes_of
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.errors import PhimlxError, TokenizerError
from phimlx.hub.resolve import NANO
from phimlx.models import registry
from phimlx.models.config import ModelConfig
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from tests.convert.tiny import MINI, PHI_4, parameters, write_model

RECIPES = recipes_of(registry.of_config({"model_type": "phi3"}))

TOKENS = 560  # two windows up to nano's step at 128 tokens, and one past it
FORMS = [Quantization(64, bits) for bits in (2, 3, 4, 5, 6, 8)]
OTHERS = [Quantization(32, 4, "mxfp4"), Quantization(32, 8, "mxfp8"), Quantization(16, 4, "nvfp4")]
TINY = {**PHI_4, "vocab_size": 1536}


Reports = dict[Quantization | None, QualityReport]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Quantization | None, Path]:
    """phi-4-nano in every form; None is bfloat16, as it came."""
    home = tmp_path_factory.mktemp("nano")
    made: dict[Quantization | None, Path] = {}
    for form in (None, *FORMS, *OTHERS):
        made[form] = home / str(len(made))
        convert(NANO, made[form], form)
    return made


@pytest.fixture(scope="module")
def reports(
    folders: dict[Quantization | None, Path],
) -> Iterator[Reports]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield {form: measure(NANO, folder, None, TOKENS) for form, folder in folders.items()}
    mx.set_default_device(device)


def log_softmax(logits: mx.array) -> mx.array:
    return mx.log(mx.softmax(logits, axis=-1))


def plainly(
    reference: Path, converted: Path, windows: list[list[int]]
) -> tuple[float, float, float, float]:
    """Perplexities, KL and top-1 with both models whole in memory, and all logits of a window."""
    models = [load_model(Checkpoint(folder), mx.float32) for folder in (reference, converted)]
    rows: dict[str, list[mx.array]] = {"before": [], "after": [], "kl": [], "top": []}
    for window in windows:
        p, q = (log_softmax(model(mx.array([window]))[0, :-1]) for model in models)
        places = mx.arange(len(window) - 1)
        rows["before"].append(p[places, mx.array(window[1:])])
        rows["after"].append(q[places, mx.array(window[1:])])
        rows["kl"].append((mx.exp(p) * (p - q)).sum(axis=-1))
        rows["top"].append(p.argmax(axis=-1) == q.argmax(axis=-1))
    means = {key: float(mx.concatenate(value).mean()) for key, value in rows.items()}
    return math.exp(-means["before"]), math.exp(-means["after"]), means["kl"], means["top"]


def assert_plain(agreement: Agreement, expected: tuple[float, float, float, float]) -> None:
    found = (
        agreement.perplexity_before,
        agreement.perplexity_after,
        agreement.divergence,
        agreement.top1,
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_what_is_measured_on_text(
    reports: Reports, folders: dict[Quantization | None, Path]
) -> None:
    tokens = Tokenizer.load(NANO).encode(BUNDLED_TEXT.read_text("utf-8"))
    form = Quantization(64, 4)
    short, long = reports[form].agreements
    assert (short.windows, short.length, short.long, short.tokens) == (2, 128, False, 254)
    assert (long.windows, long.length, long.long, long.tokens) == (1, 256, True, 255)
    assert_plain(short, plainly(NANO, folders[form], [tokens[:128], tokens[-128:]]))
    assert_plain(long, plainly(NANO, folders[form], [tokens[:256]]))


def test_the_bundled_text_holds_many_scripts_and_code() -> None:
    text = BUNDLED_TEXT.read_text("utf-8")
    assert 15_000 < len(text.encode()) < 30_000
    scripts = {unicodedata.name(letter).split()[0] for letter in set(text) if letter.isalpha()}
    assert {"LATIN", "CYRILLIC", "GREEK", "CJK", "HIRAGANA", "HANGUL", "ARABIC"} <= scripts
    ast.parse(text[text.index("def longest_run") : text.index("\nThe function above")])


@pytest.mark.slow
def test_more_bits_are_closer(reports: Reports) -> None:
    for fewer, more in pairwise(FORMS):
        worse, better = reports[fewer], reports[more]
        for a, b in zip(worse.agreements, better.agreements, strict=True):
            assert 0 < b.divergence < a.divergence
        for c, d in zip(worse.layers, better.layers, strict=True):
            assert c.name == d.name
            assert 0 < d.error < c.error
        assert worse.bytes_after < better.bytes_after


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_mixed_recipe_is_closer_than_a_uniform_one_of_its_size(
    reports: Reports, recipe: Recipe, tmp_path: Path
) -> None:
    """Between two numbers of bits, a uniform one's logarithm of KL is taken to fall evenly."""
    convert(NANO, tmp_path / "out", recipe)
    found = measure(NANO, tmp_path / "out", None, TOKENS)
    size = found.bytes_after
    uniform = [reports[form] for form in FORMS]
    pairs = pairwise(uniform)
    less, more = next(pair for pair in pairs if pair[0].bytes_after < size < pair[1].bytes_after)
    share = (size - less.bytes_after) / (more.bytes_after - less.bytes_after)
    for mixed, a, b in zip(found.agreements, less.agreements, more.agreements, strict=True):
        assert mixed.divergence < a.divergence ** (1 - share) * b.divergence**share


@pytest.mark.slow
def test_more_bits_are_closer_in_the_other_modes(reports: Reports) -> None:
    mxfp4, mxfp8, nvfp4 = (reports[form] for form in OTHERS)
    for worse in (mxfp4, nvfp4):
        for a, b in zip(worse.agreements, mxfp8.agreements, strict=True):
            assert 0 < b.divergence < a.divergence
        for c, d in zip(worse.layers, mxfp8.layers, strict=True):
            assert 0 < d.error < c.error


@pytest.mark.slow
def test_the_same_weights_cost_nothing(reports: Reports) -> None:
    report = reports[None]
    for agreement in report.agreements:
        assert agreement.divergence == 0
        assert agreement.top1 == 1
        assert agreement.perplexity_after == agreement.perplexity_before
    assert [layer.error for layer in report.layers] == [0] * 17
    assert report.bits_after == report.bits_before == 16


@pytest.mark.slow
@pytest.mark.parametrize("form", [Quantization(64, 4), *OTHERS])
def test_errors_and_bits_of_layers(
    form: Quantization, reports: Reports, folders: dict[Quantization | None, Path]
) -> None:
    report = reports[form]
    plain = Checkpoint(NANO).weights()
    model = load_model(Checkpoint(folders[form]), mx.float32)
    layers = {f"{path}.weight": module for path, module in model.named_modules()}
    for found in report.layers:
        layer, weight = layers[found.name], plain[found.name].astype(mx.float32)
        assert isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding)
        again = mx.dequantize(
            layer.weight,
            layer.scales,
            layer.get("biases"),
            layer.group_size,
            layer.bits,
            layer.mode,
            dtype=mx.float32,
        )
        exact, stored = (np.array(array, np.float64) for array in (weight, again))
        expected = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
        assert found.error == pytest.approx(expected, rel=1e-6)
        shared = 32 if form.mode == "affine" else 8
        assert found.bits_after == form.bits + shared / form.group_size
        assert found.bits_before == 16
    kinds = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
    assert sorted(layer.name for layer in report.layers) == sorted(
        [
            "model.embed_tokens.weight",
            *(f"model.layers.{n}.{kind}.weight" for n in range(4) for kind in kinds),
        ]
    )
    assert [layer.layer for layer in report.layers if layer.kind == "o_proj"] == [0, 1, 2, 3]
    assert report.bytes_after == (folders[form] / "model.safetensors").stat().st_size - header(
        folders[form]
    )
    assert report.parameters == sum(array.size for array in plain.values())


def header(folder: Path) -> int:
    """Bytes of a weight file that are no weights."""
    with (folder / "model.safetensors").open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def with_tokenizer(folder: Path) -> Path:
    shutil.copy(NANO / "tokenizer.json", folder)
    return folder


def test_an_untied_model_in_shards(tmp_path: Path) -> None:
    """Tensors stand in other files, in another order; the model has a head and no step."""
    weights = parameters(TINY)
    source = with_tokenizer(write_model(tmp_path / "source", TINY, weights, shards=3))
    convert(source, tmp_path / "out", Quantization(32, 3))
    done: list[float] = []
    text = "\n".join(BUNDLED_TEXT.read_text("utf-8").splitlines()[:2])
    report = measure(source, tmp_path / "out", text, 400, done.append)
    tokens = Tokenizer.load(NANO).encode(text)
    assert 256 < len(tokens) < 400
    (agreement,) = report.agreements
    assert (agreement.windows, agreement.length) == (1, 256)  # the model's context
    assert_plain(agreement, plainly(source, tmp_path / "out", [tokens[:256]]))
    assert report.longrope_step is None
    assert report.note is None
    assert [layer.kind for layer in report.layers if layer.layer is None] == [
        "embed_tokens",
        "lm_head",
    ]
    assert sum(done) == pytest.approx(100)
    assert min(done) > 0


def test_control_tokens_are_recognised(tmp_path: Path) -> None:
    turn = "<|user|>What is the capital of France?<|end|><|assistant|>"
    report = measure(NANO, whole_copy(tmp_path), turn * 4, 40)
    count = len(Tokenizer.load(NANO).encode(turn * 4, control=True))
    assert report.agreements[0].length == min(40, count)
    assert count < len(Tokenizer.load(NANO).encode(turn * 4))


def test_a_quantized_reference(
    folders: dict[Quantization | None, Path],
) -> None:
    """Requantizing costs, too; sizes and bits are those of the two folders."""
    six, three = folders[Quantization(64, 6)], folders[Quantization(64, 3)]
    report = measure(six, three, None, 64)
    assert report.agreements[0].divergence > 0
    assert {layer.bits_before for layer in report.layers} == {6.5}
    assert {layer.bits_after for layer in report.layers} == {3.5}


def config(values: Mapping[str, Any]) -> ModelConfig:
    return build_model(values).config


WIDE = {**PHI_4, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384}
PHI_4_MINI = {**MINI, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("values", "tokens", "limit", "expected"),
    [
        (WIDE, 5000, 2048, [Windows(512, False, (0, 1496, 2992, 4488))]),
        (WIDE, 1000, 2048, [Windows(512, False, (0,))]),
        (WIDE, 100, 2048, [Windows(100, False, (0,))]),
        (WIDE, 5000, 60, [Windows(60, False, (0,))]),
        (PHI_4, 1000, 512, [Windows(256, False, (0, 744))]),
        (MINI, 200, 128, [Windows(32, False, (0, 168)), Windows(64, True, (0,))]),
        (MINI, 200, 127, [Windows(32, False, (0, 84, 168))]),
        (MINI, 64, 128, [Windows(32, False, (0, 32)), Windows(64, True, (0,))]),
        (MINI, 63, 128, [Windows(32, False, (0,))]),
        (PHI_4_MINI, 6000, 2048, [Windows(512, False, (0, 1829, 3658, 5488))]),
        (
            PHI_4_MINI,
            6000,
            9216,
            [
                Windows(512, False, tuple(5488 * n // 8 for n in range(9))),
                Windows(4608, True, (0,)),
            ],
        ),
    ],
)
def test_windows(values: dict[str, Any], tokens: int, limit: int, expected: list[Windows]) -> None:
    assert choose_windows(tokens, config(values), limit) == expected


LAYERS = (
    LayerError("model.embed_tokens.weight", None, "embed_tokens", 0.01, 16.0, 8.5),
    LayerError("model.layers.0.self_attn.o_proj.weight", 0, "o_proj", 0.02, 16.0, 8.5),
    LayerError("model.layers.1.self_attn.o_proj.weight", 1, "o_proj", 0.1, 16.0, 4.5),
)
SMALL = QualityReport(
    reference=Path("/models/before"),
    converted=Path("/models/after $x^"),
    parameters=1_000_000,
    bytes_before=2_000_000,
    bytes_after=562_500,
    longrope_step=128,
    agreements=(
        Agreement(14, 128, False, 1778, 8.0, 8.2, 0.0123456, 0.975),
        Agreement(1, 256, True, 255, 9.0, 9.9, 0.05, 0.95),
    ),
    layers=LAYERS,
)
MARKDOWN = """\
## Quality

| Measure | Before | After | Difference |
| --- | ---: | ---: | ---: |
| Weights | 2.00 MB | 562 kB | -71.9% |
| Bits per weight | 16.00 | 4.50 |  |
| Perplexity, 14 windows of 128 tokens | 8.000 | 8.200 | +2.50% |
| KL divergence, 14 windows of 128 tokens |  |  | 0.0123 nats |
| Same likeliest token, 14 windows of 128 tokens |  |  | 97.50% |
| Perplexity, 1 window of 256 tokens, past the LongRoPE step | 9.000 | 9.900 | +10.00% |
| KL divergence, 1 window of 256 tokens, past the LongRoPE step |  |  | 0.05 nats |
| Same likeliest token, 1 window of 256 tokens, past the LongRoPE step |  |  | 95.00% |
| Error of embed_tokens | 16.00 bits | 8.50 bits | 1.000% |
| Error of o_proj | 16.00 bits | 4.50 to 8.50 bits | 6.000%, at most 10.000% (layer 1) |

Measured in float32 on one text, before and after the conversion. Perplexity: exp of the mean \
negative log-likelihood of each next token. KL divergence: mean of KL(before ‖ after) over the \
whole vocabulary. Error: ‖after - before‖ / ‖before‖ of a weight matrix, mean over the layers.
"""


def test_markdown() -> None:
    assert SMALL.markdown() == MARKDOWN


def test_rows_stand_under_columns() -> None:
    assert {len(row) for row in SMALL.rows()} == {len(COLUMNS)}


def test_what_was_not_measured() -> None:
    values = {**vars(SMALL), "longrope_step": 4096, "agreements": SMALL.agreements[:1]}
    report = QualityReport(**values)
    assert SMALL.note is None
    assert report.note == (
        "Not measured past the LongRoPE step at 4,096 tokens: that takes a text of 4,608 tokens "
        "and a limit of 9,216."
    )
    assert report.markdown().endswith(f"\n\n{report.note}\n")


def test_as_object() -> None:
    value = json.loads(json.dumps(SMALL.as_object()))
    assert value["reference"] == "/models/before"
    assert (value["bits_before"], value["bits_after"], value["note"]) == (16.0, 4.5, None)
    assert value["agreements"][1] == {
        "windows": 1,
        "length": 256,
        "long": True,
        "tokens": 255,
        "perplexity_before": 9.0,
        "perplexity_after": 9.9,
        "divergence": 0.05,
        "top1": 0.95,
    }
    assert value["layers"][2] == {
        "name": "model.layers.1.self_attn.o_proj.weight",
        "layer": 1,
        "kind": "o_proj",
        "error": 0.1,
        "bits_before": 16.0,
        "bits_after": 4.5,
    }


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the chart, and is an extra")
    SMALL.chart(tmp_path / "report.png")  # its model is named in TeX, and not read as such
    content = (tmp_path / "report.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)] == [1200, 675]
    assert [file.name for file in tmp_path.iterdir()] == ["report.png"]
    with pytest.raises(PhimlxError) as caught:
        SMALL.chart(tmp_path / "none" / "report.png")
    missing = tmp_path / "none" / "report.png"
    assert str(caught.value) == f"{missing} cannot be written: no such file or directory."


def test_chart_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PhimlxError) as caught:
        SMALL.chart(tmp_path / "report.png")
    assert str(caught.value) == "A chart needs matplotlib, which is not installed."
    assert caught.value.hint == "Install it with: pip install 'phimlx[plots]'"
    assert list(tmp_path.iterdir()) == []


def whole_copy(tmp_path: Path) -> Path:
    """phi-4-nano in another folder."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        shutil.copy(NANO / name, folder)
    return folder


def refusal(*arguments: Any) -> PhimlxError:
    with pytest.raises(PhimlxError) as caught:
        measure(*arguments)
    return caught.value


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text(tmp_path: Path, text: str) -> None:
    error = refusal(NANO, whole_copy(tmp_path), text)
    assert str(error) == "The calibration text is empty."
    assert error.hint == "Give a text of a page or more, or none."


def test_a_short_text(tmp_path: Path) -> None:
    count = len(Tokenizer.load(NANO).encode("Only this."))
    error = refusal(NANO, whole_copy(tmp_path), "Only this.")
    assert str(error) == f"The calibration text has {count} tokens; a report needs 32 at least."
    assert error.hint == "Give a text of a page or more, or none."


def test_a_low_limit(tmp_path: Path) -> None:
    error = refusal(NANO, whole_copy(tmp_path), None, 31)
    assert str(error) == "max_tokens is 31; a report needs 32 at least."


def test_one_folder_twice(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(NANO)
    error = refusal(NANO, link)
    assert str(error) == f"{NANO} and {link} are the same folder, so there is nothing to compare."
    assert error.hint == "Name the original model and the converted one."


def test_different_vocabularies(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", {**PHI_4, "vocab_size": 2048})
    source = write_model(tmp_path / "source", TINY)
    assert str(refusal(source, other)) == (
        f"{source} and {other} have different vocabularies, of 1,536 and 2,048 tokens: their "
        "logits cannot be compared."
    )


def test_different_tokenizers(tmp_path: Path) -> None:
    other = whole_copy(tmp_path)
    table = json.loads((other / "tokenizer.json").read_text())
    table["model"]["merges"] = table["model"]["merges"][:100]
    (other / "tokenizer.json").write_text(json.dumps(table))
    assert str(refusal(NANO, other)) == (
        f"{NANO} and {other} have different vocabularies: the same text becomes other tokens."
    )


def test_different_models(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", TINY)
    other = write_model(tmp_path / "other", {**TINY, "num_hidden_layers": 1})
    assert str(refusal(source, other)) == (
        f"{source} and {other} are different models: their layers have different names or shapes."
    )


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    source = with_tokenizer(write_model(tmp_path / "source", PHI_4))
    other = write_model(tmp_path / "other", PHI_4)
    highest = Tokenizer.load(NANO).vocab_size - 1
    error = refusal(source, other)
    assert str(error) == (
        f"The tokenizer in {source} has the token {highest}, but the model's vocabulary has 48."
    )
    assert error.hint == "Get the tokenizer files that belong to the model into its folder."


def test_no_tokenizer(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", TINY)
    other = write_model(tmp_path / "other", TINY)
    error = refusal(source, other)
    assert isinstance(error, TokenizerError)
    assert str(error) == f"There is no tokenizer.json in {source}."


def test_a_zero_matrix(tmp_path: Path) -> None:
    """Its error is absolute."""
    weights = parameters(TINY)
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = {**weights, name: mx.full(weights[name].shape, 0.5)}
    zero = {**weights, name: mx.zeros(weights[name].shape)}
    source = with_tokenizer(write_model(tmp_path / "source", TINY, zero))
    other = write_model(tmp_path / "other", TINY, changed)
    errors = {layer.name: layer.error for layer in measure(source, other, None, 64).layers}
    assert errors[name] == 0.5 * 64
    assert {error for layer, error in errors.items() if layer != name} == {0.0}
