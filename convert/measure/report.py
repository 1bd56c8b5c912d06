"""Quality and size of a model before and after a conversion, as table, JSON and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import phimlx
from convert.measure.compare import (
    Agreement,
    LayerError,
    agreements,
    choose_windows,
    layer_errors,
    length_past,
    longrope_step,
    paired_tensors,
)
from convert.quantize.recipe import PARTS
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import PhimlxError
from phimlx.extras import import_extra
from phimlx.files import replacing, translate_write_errors
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.sizes import counted, size_text

BUNDLED_TEXT = Path(phimlx.__file__).parent / "assets" / "calibration.txt"
MAX_TOKENS = 2048
LEAST_TOKENS = 32

METHOD = (
    "Measured in float32 on one text, before and after the conversion. Perplexity: exp of the mean "
    "negative log-likelihood of each next token. KL divergence: mean of KL(before ‖ after) over "
    "the whole vocabulary. Error: ‖after - before‖ / ‖before‖ of a weight matrix, mean over the "
    "layers."
)
COLUMNS = ("Measure", "Before", "After", "Difference")


@dataclass(frozen=True)
class QualityReport:
    """Two model folders compared.

    Attributes:
        agreements: one of windows up to the LongRoPE step, and one past it where that was measured.
        longrope_step: tokens above which the model rotates otherwise; None where it has no step.
        layers: every weight matrix, in the model's order.
    """

    reference: Path
    converted: Path
    parameters: int
    bytes_before: int
    bytes_after: int
    longrope_step: int | None
    agreements: tuple[Agreement, ...]
    layers: tuple[LayerError, ...]

    @property
    def bits_before(self) -> float:
        return 8 * self.bytes_before / self.parameters

    @property
    def bits_after(self) -> float:
        return 8 * self.bytes_after / self.parameters

    @property
    def note(self) -> str | None:
        """Tells what was not measured, and how it would be; None where nothing is missing."""
        notes = []
        if any(layer.kind in PARTS for layer in self.layers):
            notes.append("Measured on text alone, which passes no adapter and no encoder.")
        step = self.longrope_step
        if step is not None and not any(agreement.long for agreement in self.agreements):
            length = length_past(step)
            notes.append(
                f"Not measured past the LongRoPE step at {step:,} tokens: that takes a text of "
                f"{length:,} tokens and a limit of {2 * length:,}."
            )
        return " ".join(notes) or None

    def as_object(self) -> dict[str, Any]:
        """Everything, as `json` writes it."""
        return {
            **asdict(self),
            "reference": str(self.reference),
            "converted": str(self.converted),
            "bits_before": self.bits_before,
            "bits_after": self.bits_after,
            "note": self.note,
        }

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table for a person, under `COLUMNS`."""
        growth = self.bytes_after / self.bytes_before - 1
        rows = [
            (
                "Weights",
                size_text(self.bytes_before),
                size_text(self.bytes_after),
                f"{growth:+.1%}",
            ),
            ("Bits per weight", f"{self.bits_before:.2f}", f"{self.bits_after:.2f}", ""),
        ]
        for agreement in self.agreements:
            before, after = agreement.perplexity_before, agreement.perplexity_after
            where = _where(agreement)
            rows += [
                (
                    f"Perplexity, {where}",
                    f"{before:.3f}",
                    f"{after:.3f}",
                    f"{after / before - 1:+.2%}",
                ),
                (f"KL divergence, {where}", "", "", f"{agreement.divergence:.3g} nats"),
                (f"Same likeliest token, {where}", "", "", f"{agreement.top1:.2%}"),
            ]
        for kind, errors in self._by_kind().items():
            worst = max(errors, key=lambda layer: layer.error)
            text = f"{fmean(layer.error for layer in errors):.3%}"
            if len(errors) > 1:
                where = "" if worst.layer is None else f" (layer {worst.layer})"
                text += f", at most {worst.error:.3%}{where}"
            before_bits = _span([layer.bits_before for layer in errors])
            after_bits = _span([layer.bits_after for layer in errors])
            rows.append((f"Error of {kind}", before_bits, after_bits, text))
        return rows

    def markdown(self) -> str:
        """A section for the model card."""
        table = [COLUMNS, ("---", *("---:",) * 3), *self.rows()]
        lines = [f"| {' | '.join(row)} |" for row in table]
        notes = [METHOD, *([] if self.note is None else [self.note])]
        return "\n".join(["## Quality", "", *lines, "", "\n\n".join(notes), ""])

    def chart(self, path: str | Path) -> None:
        """Write a PNG of every weight matrix's error, layer by layer.

        Raises:
            PhimlxError: where matplotlib is not installed or the file cannot be written.
        """
        without = "A chart needs matplotlib, which is not installed."
        figure_module = import_extra("matplotlib.figure", "plots", without)
        figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for number, (kind, errors) in enumerate(self._by_kind().items()):
            colour = f"C{number}"
            values = [100 * layer.error for layer in errors]
            layers = [layer.layer for layer in errors]
            if None in layers or len(set(layers)) < len(layers):  # no layer's own, or many of one
                axes.axhline(fmean(values), color=colour, linestyle="--", label=kind)
            else:
                axes.plot(layers, values, color=colour, marker="o", markersize=4, label=kind)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("relative error of the weights, %")
        title = f"{self.converted.name}: {self.bits_after:.2f} bits per weight"
        axes.set_title(title, parse_math=False)  # a name may hold $
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", frameon=False)
        path = Path(path)
        with translate_write_errors(path, PhimlxError), replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)

    def _by_kind(self) -> dict[str, list[LayerError]]:
        kinds: dict[str, list[LayerError]] = {}
        for layer in self.layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return kinds


def measure(
    reference: str | Path,
    converted: str | Path,
    text: str | None = None,
    max_tokens: int = MAX_TOKENS,
    advance: Callable[[float], object] = lambda percent: None,
) -> QualityReport:
    """Compare a converted model with the one that it was made from.

    In memory are one decoder layer at a time, the two output heads, and logits of 128 positions.

    Args:
        reference, converted: model folders, in Hub layout or MLX's, quantized or not.
        text: to predict, in which control tokens are recognised; the bundled one where None.
        max_tokens: how many of its tokens each model reads at most. Windows are spread over the
            whole text. Where it is at least twice what a window past the LongRoPE step takes
            (the step and up to 512 more), one such window is measured too.
        advance: called with what has been done, in hundredths of the whole.

    Raises:
        PhimlxError: where the text is too short, or the two are not one model in two forms.
        ConfigError, CheckpointError, TokenizerError: where a folder is not a whole model with a
            tokenizer.
    """
    reference, converted = Path(reference), Path(converted)
    before, after = Checkpoint(reference), Checkpoint(converted)
    if reference.samefile(converted):
        raise PhimlxError(
            f"{reference} and {converted} are the same folder, so there is nothing to compare.",
            hint="Name the original model and the converted one.",
        )
    tensors = paired_tensors(before, after)
    config = build_model(before.config).config
    text = BUNDLED_TEXT.read_text("utf-8") if text is None else text
    tokens = shared_tokens(before, after, text, config.vocab_size)
    if max_tokens < LEAST_TOKENS:
        raise PhimlxError(f"max_tokens is {max_tokens}; a report needs {LEAST_TOKENS} at least.")
    windows = choose_windows(len(tokens), config, max_tokens)
    return QualityReport(
        reference=reference,
        converted=converted,
        parameters=sum(tensor.size for tensor, _ in tensors),
        bytes_before=sum(tensor.nbytes for tensor, _ in tensors),
        bytes_after=sum(tensor.nbytes for _, tensor in tensors),
        longrope_step=longrope_step(config),
        layers=tuple(layer_errors(tensors, lambda percent: advance(percent / 5))),
        agreements=agreements(
            before, after, tokens, windows, lambda percent: advance(percent * 4 / 5)
        ),
    )


def shared_tokens(before: Checkpoint, after: Checkpoint, text: str, vocab_size: int) -> list[int]:
    """The text's token ids, which are the same for both models.

    Raises:
        PhimlxError: where they are not, are too few, or are none of the model's.
    """
    if not text.strip():
        raise PhimlxError(
            "The calibration text is empty.", hint="Give a text of a page or more, or none."
        )
    tokens = Tokenizer.load(before.folder).encode(text, control=True)
    # A converted folder may lack a tokenizer, but not have another one.
    own = tokens
    if (after.folder / "tokenizer.json").exists():
        own = Tokenizer.load(after.folder).encode(text, control=True)
    if own != tokens:
        raise PhimlxError(
            f"{before.folder} and {after.folder} have different vocabularies: the same text "
            "becomes other tokens."
        )
    if len(tokens) < LEAST_TOKENS:
        raise PhimlxError(
            f"The calibration text has {len(tokens)} tokens; a report needs {LEAST_TOKENS} at "
            "least.",
            hint="Give a text of a page or more, or none.",
        )
    if max(tokens) >= vocab_size:
        raise PhimlxError(
            f"The tokenizer of {before.folder} gives tokens up to {max(tokens)}, but the model has "
            f"{vocab_size:,} only.",
            hint="Get the model's own tokenizer files into that folder.",
        )
    return tokens


def _where(agreement: Agreement) -> str:
    text = f"{counted(agreement.windows, 'window')} of {agreement.length} tokens"
    return f"{text}, past the LongRoPE step" if agreement.long else text


def _span(bits: Sequence[float]) -> str:
    """Bits per weight of all layers of a kind, which may differ."""
    least, most = f"{min(bits):.2f}", f"{max(bits):.2f}"
    return f"{least} bits" if least == most else f"{least} to {most} bits"
