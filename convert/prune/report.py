"""What pruning costs and what it brings: numbers before and after, and their picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert.measure.compare import Agreement, agreements, choose_windows
from convert.measure.report import BUNDLED_TEXT, MAX_TOKENS, shared_tokens
from convert.prune.layers import Advance
from convert.prune.plan import Pruning
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import PhimlxError
from phimlx.extras import import_extra
from phimlx.files import replacing, translate_write_errors
from phimlx.sizes import size_text

PICTURE = "prune.png"
UNITS = {"influence": "", "divergence": ", nats"}


@dataclass(frozen=True)
class PruneReport:
    """A pruned model beside the whole one.

    Attributes:
        bytes_before, bytes_after: of the weights.
        speeds: tokens a second of decoding, before and after; None where they were not measured.
        lost: programs that run the whole model, and do not run the pruned one.
    """

    out: Path
    pruning: Pruning
    bytes_before: int
    bytes_after: int
    agreements: tuple[Agreement, ...]
    speeds: tuple[float, float] | None = None
    lost: tuple[str, ...] = ()

    def layer_rows(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the table of layers."""
        columns = ["Layer"]
        layers = self.pruning.layers
        columns += [] if layers is None else [layers.method.capitalize(), ""]
        columns += [f"{name.capitalize()}, share that stays" for name in self.pruning.widths]
        count = self._kept[-1] + 1 if layers is None else len(layers.importance)
        shares = [
            dict(zip(self._kept, choice.shares, strict=True))
            for choice in self.pruning.widths.values()
        ]
        rows = []
        for number in range(count):
            row = [str(number)]
            if layers is not None:
                stays = "stays" if number in layers.kept else "goes"
                row += [f"{layers.importance[number]:.4f}", stays]
            rows.append(row + [_percent(share.get(number)) for share in shares])
        return columns, rows

    def rows(self) -> list[tuple[str, str, str]]:
        """The table of measures, under "Measure", "Before" and "After"."""
        table = [("Weights", size_text(self.bytes_before), size_text(self.bytes_after))]
        for name, choice in self.pruning.widths.items():
            table.append((name.capitalize(), f"{choice.units:,}", f"{choice.count:,}"))
        if self.speeds is not None:
            before, after = self.speeds
            table.append(("Tokens a second", f"{before:,.1f}", f"{after:,.1f}"))
        return table + agreement_rows(self.agreements)

    @property
    def summary(self) -> str:
        """What stays, in a few words."""
        layers, widths = self.pruning.layers, self.pruning.widths
        parts = [] if layers is None else [f"{len(layers.kept)} of {len(layers.importance)} layers"]
        parts += [f"{each.count:,} of {each.units:,} {name}" for name, each in widths.items()]
        return ", ".join(parts)

    def as_object(self) -> dict[str, Any]:
        """What `--json` prints."""
        layers = self.pruning.layers
        told = {} if layers is None else {
            "method": layers.method,
            "kept": list(layers.kept),
            "importance": list(layers.importance),
        }  # fmt: skip
        return {
            "path": str(self.out),
            **told,
            "widths": {
                name: {"before": each.units, "after": each.count, "shares": list(each.shares)}
                for name, each in self.pruning.widths.items()
            },
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "tokens_per_second": None if self.speeds is None else list(self.speeds),
            "agreements": [asdict(each) for each in self.agreements],
            "does_not_load_in": list(self.lost),
        }

    def draw(self, path: Path) -> None:
        """Write a PNG: the importance of layers, the shares of widths, and both models.

        Raises:
            PhimlxError: where matplotlib is not installed or the file cannot be written.
        """
        without = "A picture of what was pruned needs matplotlib, which is not installed."
        figure_class = import_extra("matplotlib.figure", "plots", without).Figure
        layers, widths = self.pruning.layers, self.pruning.widths
        panels = (layers is not None) + bool(widths) + 1
        figure = figure_class(figsize=(4 * panels, 4), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        title = f"{self.out.name}: {size_text(self.bytes_before)} to {size_text(self.bytes_after)}"
        figure.suptitle(title, parse_math=False, wrap=True)  # a name may hold $
        if layers is not None:
            drawn = axes.pop(0)
            colours = ["C0" if n in layers.kept else "C7" for n in range(len(layers.importance))]
            drawn.bar(range(len(layers.importance)), layers.importance, color=colours)
            drawn.set_title(f"{layers.method} of layers{UNITS[layers.method]}; grey ones go")
            _number_layers(drawn)
        if widths:
            drawn = axes.pop(0)
            for name, choice in widths.items():
                label = f"{choice.count:,} of {choice.units:,} {name}"
                drawn.plot(self._kept, [100 * each for each in choice.shares], "o-", label=label)
            drawn.set_title("importance that stays, %")
            _number_layers(drawn)
            drawn.set_ylim(0, 105)
            drawn.legend(frameon=False)
        pairs: dict[str, tuple[float, float]] = {"size": (self.bytes_before, self.bytes_after)}
        if self.speeds is not None:
            pairs["tokens a second"] = self.speeds
        for each in self.agreements:
            past = ", long" if each.long else ""
            pairs[f"perplexity{past}"] = (each.perplexity_before, each.perplexity_after)
        # Where all is left out that matters, a perplexity is no number any more.
        ratios = {
            name: after / before
            for name, (before, after) in pairs.items()
            if math.isfinite(before) and math.isfinite(after)
        }
        drawn = axes.pop(0)
        labels = [f"{name} × {ratio:.3g}" for name, ratio in ratios.items()]
        drawn.barh(labels, list(ratios.values()), color="C0")
        drawn.axvline(1, color="k", linestyle="--")
        drawn.invert_yaxis()
        drawn.set_title("after / before")
        with translate_write_errors(path, PhimlxError), replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)

    @property
    def _kept(self) -> tuple[int, ...]:
        """Numbers of the layers that stay."""
        layers = self.pruning.layers
        if layers is not None:
            return layers.kept
        choice = next(iter(self.pruning.widths.values()))
        return tuple(range(len(choice.kept)))


def agreement_rows(found: tuple[Agreement, ...]) -> list[tuple[str, str, str]]:
    """Rows of what two models say of a text."""
    rows = []
    for each in found:
        past = ", past the LongRoPE step" if each.long else ""
        perplexities = f"{each.perplexity_before:.3f}", f"{each.perplexity_after:.3f}"
        rows += [(f"Perplexity{past}", *perplexities)]
        rows += [(f"KL divergence{past}", "", f"{each.divergence:.3g} nats")]
        rows += [(f"Same likeliest token{past}", "", f"{each.top1:.2%}")]
    return rows


def report_tokens(checkpoint: Checkpoint, text: str | None) -> list[int]:
    """Read the text that both models are measured on.

    Args:
        text: in which control tokens are recognised; the bundled one where None.

    Raises:
        PhimlxError: where it is too short, or the tokenizer is another model's.
    """
    text = BUNDLED_TEXT.read_text("utf-8") if text is None else text
    vocabulary = build_model(checkpoint.config).config.vocab_size
    return shared_tokens(checkpoint, checkpoint, text, vocabulary)


def compare(
    before: Checkpoint, after: Checkpoint, tokens: list[int], advance: Advance
) -> tuple[Agreement, ...]:
    """Perplexity of both on a text's tokens, and how far the pruned one is from the other."""
    windows = choose_windows(len(tokens), build_model(before.config).config, MAX_TOKENS)
    return agreements(before, after, tokens, windows, advance)


def _number_layers(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
