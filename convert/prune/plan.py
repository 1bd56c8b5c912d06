"""What is to stay of a model, checked before anything is measured, and then chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from convert.prune.layers import Advance, LayerChoice, check_layers, choose_layers
from convert.prune.others import Lost
from convert.prune.widths import WidthChoice, choose_widths, width_counts
from convert.quantize.calibration import CalibrationWindows
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model
from phimlx.errors import ConfigError, ConversionError
from phimlx.models.config import hub_dialect
from phimlx.models.registry import Architecture

SAMPLES, LENGTH = 16, 512  # windows of calibration text, and tokens in each


@dataclass(frozen=True)
class Pruning:
    """What stays of a model: all of it, but what choices leave out.

    Attributes:
        layers: None where all stay.
        widths: by the names of the architecture's widths, of the layers that stay.
    """

    layers: LayerChoice | None = None
    widths: Mapping[str, WidthChoice] = field(default_factory=dict)


@dataclass(frozen=True)
class PruningPlan:
    """How much is to stay of a model, which can do with that.

    Attributes:
        layers: that stay; None for all.
        counts: units of each layer that stay, by the names of the architecture's widths.
        method: by which layers are chosen.
        split: whether the result is written in the layout with split projections, in which other
            programs read fewer heads.
        lost: programs that run the whole model, and will not run the result.
        note: what is not looked at when its parts are measured; None for nothing.
    """

    checkpoint: Checkpoint
    layers: int | None
    counts: Mapping[str, int]
    method: str
    split: bool
    lost: Lost
    note: str | None

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        layers: int | None = None,
        widths: Mapping[str, int | float] | None = None,
        method: str = "influence",
    ) -> PruningPlan:
        """Check what is wanted.

        Args:
            widths: a number, or a part of all, by the names of the architecture's widths.

        Raises:
            ConversionError: where the model cannot do with so little.
        """
        checkpoint.check_runs()
        model = build_model(checkpoint.config)
        architecture, shapes = model.architecture, model.config.layer_shapes
        if any(shape != shapes[0] for shape in shapes):
            raise ConversionError(
                f"{checkpoint.folder}: the layers of {model.model_type} are of several kinds and "
                "need each other, so nothing of them can be left out.",
                hint="Prune a model whose layers are alike, such as phi-4 or phi-4-mini.",
            )
        if layers is not None:
            check_layers(model, layers)
        counts = width_counts(checkpoint, model, widths or {})
        states = any(architecture.widths[name].stated for name in counts)
        split = states and _splits(checkpoint)
        lost = Lost.of(model, states, split)
        return cls(checkpoint, layers, counts, method, split, lost, _unmeasured(architecture))

    def choose(self, text: str | None, advance: Advance = lambda percent: None) -> Pruning:
        """Measure on a calibration text, and choose what stays.

        Widths are measured in a model of the layers that stay, as by two commands in turn.

        Args:
            text: in which control tokens are recognised; the bundled one where None.
            advance: called with hundredths of this work.

        Raises:
            ConversionError: where the text is too short.
        """
        found = CalibrationWindows.of(self.checkpoint, text, SAMPLES, LENGTH, past_step=False)
        parts = (self.layers is not None) + bool(self.counts)

        def step(percent: float) -> None:
            advance(percent / parts)

        layers = None
        if self.layers is not None:
            layers = choose_layers(self.checkpoint, self.layers, self.method, found.windows, step)
        if not self.counts:
            return Pruning(layers)
        count = build_model(self.checkpoint.config).config.num_hidden_layers
        kept = range(count) if layers is None else layers.kept
        widths = choose_widths(self.checkpoint, self.counts, kept, found.windows, step)
        return Pruning(layers, widths)


def _unmeasured(architecture: Architecture) -> str | None:
    if not architecture.takes_media:
        return None
    return "Measured on text alone: what matters for pictures and sounds may be other parts."


def _splits(checkpoint: Checkpoint) -> bool:
    """Whether the layout with split projections can tell this model."""
    architecture = build_model(checkpoint.config).architecture
    if architecture.split_config is None:
        return False
    try:
        architecture.in_split_layout(hub_dialect(checkpoint.config))
    except ConfigError:
        return False
    return True
