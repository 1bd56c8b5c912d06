"""Folders that pruning makes of the tiny checkpoints, for tests and for the maker of their goldens.

python -m tests.convert.pruned MODELS OUT
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load_file

from convert.prune.layers import LayerChoice
from convert.prune.plan import Pruning, PruningPlan
from convert.prune.widths import WidthChoice
from convert.prune.write import write_pruned
from phimlx.checkpoint.folder import Checkpoint
from phimlx.hub.resolve import NANO

GOLDENS = Path(__file__).parents[1] / "goldens"
IMPORTANCE = load_file(GOLDENS / "prune.safetensors")


@dataclass(frozen=True)
class Case:
    """What is left of a model.

    Attributes:
        model: the name of a tiny checkpoint, or none for phi-4-nano.
        layers: that stay; all where there are none.
        counts: units that stay of each layer, the most important ones by transformers' own numbers.
    """

    model: str
    layers: tuple[int, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()

    def write(self, models: Path, out: Path) -> tuple[Checkpoint, PruningPlan]:
        """Write it; returns it and what was planned."""
        checkpoint = Checkpoint(models / self.model if self.model else NANO)
        counts = dict(self.counts)
        plan = PruningPlan.of(checkpoint, len(self.layers) or None, dict(counts))
        layers = LayerChoice("influence", (), self.layers) if self.layers else None
        widths = {
            name: WidthChoice.of(self._importance(name, checkpoint), count)
            for name, count in counts.items()
        }
        write_pruned(checkpoint, out, Pruning(layers, widths), lambda nbytes: None, plan.split)
        return Checkpoint(out), plan

    def _importance(self, name: str, checkpoint: Checkpoint) -> list[list[float]]:
        if self.model:
            found: list[list[float]] = IMPORTANCE[f"{self.model}.{name}"].tolist()
            return found
        heads = checkpoint.config["num_key_value_heads"]
        return [list(range(heads))] * checkpoint.config["num_hidden_layers"]


CASES = {
    "phi-4, fewer layers": Case("tiny-phi4", (1,)),
    "phi-4, narrower": Case("tiny-phi4", (), (("mlp", 64), ("heads", 1))),
    "mini, fewer layers": Case("tiny-phi4-mini", (1,)),
    "mini, narrower": Case("tiny-phi4-mini", (), (("mlp", 64),)),
    "phi-2, fewer layers": Case("tiny-phi2", (0, 2)),
    "phi-2, narrower": Case("tiny-phi2", (), (("mlp", 64), ("heads", 2))),
    "nano, fewer heads": Case("", (), (("heads", 1),)),
}

if __name__ == "__main__":
    for name, case in CASES.items():
        case.write(Path(sys.argv[1]), Path(sys.argv[2]) / name)
