#!/usr/bin/env python3
"""Distillation losses and their gradients, by torch in float64.

    python scripts/goldens/distill_goldens.py tests/goldens/distill.json

Of a teacher's logits the k largest are kept, and the rest of its probability is one more class; the
student's probabilities are summed up to the same k + 1 classes. The losses are built from these by
the papers' formulas, with torch's `kl_div` and autograd, and mixed with cross-entropy. Tests draw
the same logits from `seed`. Made with torch 2.13.0; phimlx itself never needs it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div

SEED, ROWS, VOCABULARY, SPREAD = 11, 3, 40, 3.0
SFT = 0.3  # part of cross-entropy in the mixed loss
LOSSES = (("forward-kl", 0.5), ("reverse-kl", 0.5), ("jsd", 0.5), ("jsd", 0.1))
SIZES = ((1, 1.0), (8, 1.0), (8, 2.5), (39, 1.0))  # k and temperature


def main() -> None:
    cases = [measure(name, beta, k, t) for name, beta in LOSSES for k, t in SIZES]
    about = {"torch": torch.__version__, "seed": SEED, "rows": ROWS, "vocabulary": VOCABULARY}
    about |= {"spread": SPREAD, "sft": SFT}
    Path(sys.argv[1]).write_text(json.dumps({**about, "cases": cases}) + "\n")


def measure(name: str, beta: float, k: int, temperature: float) -> dict[str, Any]:
    random = np.random.default_rng(SEED)
    drawn = random.standard_normal((2, ROWS, VOCABULARY)).astype(np.float32) * np.float32(SPREAD)
    teacher, student = torch.tensor(drawn, dtype=torch.float64)
    targets = torch.tensor(random.integers(0, VOCABULARY, ROWS))
    student.requires_grad_()
    chosen = teacher.topk(k).indices
    p, q = (classes((each / temperature).softmax(-1), chosen) for each in (teacher, student))
    divergence = DIVERGENCES[name](p, q, beta)
    entropy = cross_entropy(student, targets, reduction="none")
    loss = SFT * entropy + (1 - SFT) * temperature**2 * divergence
    loss.sum().backward()
    assert student.grad is not None
    return {
        "loss_type": name,
        "beta": beta,
        "k": k,
        "temperature": temperature,
        "divergence": divergence.tolist(),
        "entropy": entropy.tolist(),
        "loss": loss.tolist(),
        "gradient": [[float(f"{x:.7g}") for x in row] for row in student.grad.tolist()],
    }


def classes(probabilities: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Keep the chosen tokens' probabilities, and sum up all others to one class."""
    others = torch.ones_like(probabilities).scatter(-1, chosen, 0.0)
    rest = (probabilities * others).sum(-1, keepdim=True)
    return torch.cat([probabilities.gather(-1, chosen), rest], -1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) of each row."""
    return kl_div(q.log(), p, reduction="none").sum(-1)


def jsd(p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Generalized Jensen-Shannon divergence. Source: arXiv 2306.13649, equation 1."""
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


DIVERGENCES = {
    "forward-kl": lambda p, q, beta: kl(p, q),
    "reverse-kl": lambda p, q, beta: kl(q, p),
    "jsd": jsd,
}


if __name__ == "__main__":
    main()
