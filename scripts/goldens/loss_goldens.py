"""How far torch's float32 cross-entropy is from float64 over a published vocabulary.

    python scripts/goldens/loss_goldens.py tests/goldens/loss.json

Writes the largest relative error of a row's loss, and the relative error of the gradients with
respect to the logits and to the hidden states, for rows of random logits in which the target is
likely. Tests draw the same numbers (`seed`, `spread`, `target`) and may be no further off. Needs
torch, which phimlx itself never does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROWS, VOCABULARY, SEED = 4, 200_064, 17
SPREADS, TARGETS = (2, 3), (14, 15, 16, 17, 18)


def main() -> None:
    torch.set_num_threads(1)
    cases = [measure(spread, target) for spread in SPREADS for target in TARGETS]
    record = {"torch": torch.__version__, "seed": SEED, "rows": ROWS, "cases": cases}
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n")


def measure(spread: int, target: int) -> dict[str, Any]:
    random = np.random.default_rng([SEED, spread, target])
    logits = (spread * random.standard_normal((ROWS, VOCABULARY))).astype(np.float32)
    targets = random.integers(0, VOCABULARY, ROWS)
    logits[np.arange(ROWS), targets] = target
    exact, single = (losses(torch.tensor(logits, dtype=kind), targets) for kind in KINDS)
    loss, *gradients = zip(exact, single, strict=True)
    errors = [float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in gradients]
    return {
        "spread": spread,
        "target": target,
        "loss": float(np.abs(loss[1] / loss[0] - 1).max()),
        "logits": errors[0],
        "hidden": errors[1],
    }


KINDS = (torch.float64, torch.float32)


def losses(logits: torch.Tensor, targets: np.ndarray) -> list[np.ndarray]:
    """Each row's loss, and gradients of their sum: of the head's weight, and of hidden states.

    The hidden states are the rows of an identity matrix and the head's weight holds the logits, so
    the weight's gradient is that of the logits.
    """
    hidden = torch.eye(ROWS, dtype=logits.dtype, requires_grad=True)
    weight = logits.T.contiguous().requires_grad_()
    made = torch.nn.functional.linear(hidden, weight)
    found = torch.nn.functional.cross_entropy(made, torch.tensor(targets), reduction="none")
    found.sum().backward()
    return [each.detach().double().numpy() for each in (found, weight.grad, hidden.grad)]


if __name__ == "__main__":
    main()
