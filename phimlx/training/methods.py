"""Ways to learn, by the name of `--method`: what rows each takes, and the numbers of its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

RowForm = Literal["examples", "pairs", "answers", "prompts"]
"""What rows are: text to imitate, a better and a worse answer, an answer with its label, or a
prompt that the model answers itself."""


@dataclass(frozen=True)
class Method:
    """A way to learn.

    Attributes:
        rows: that it takes.
        source: paper and equation of its loss; of its defaults too, where nothing else is said.
        has_reference: whether its loss compares with the model as it was before training.
        numbers: of its loss, by the name of the setting, and what they are where nothing is said.
        metrics: further means that it tells beside the loss.
    """

    rows: RowForm
    source: str = ""
    has_reference: bool = False
    numbers: Mapping[str, float] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()


METHODS: dict[str, Method] = {
    "sft": Method("examples"),
    "dpo": Method(
        "pairs",
        "arXiv 2305.18290, equation 7",
        has_reference=True,
        numbers={"beta": 0.1},
        metrics=("accuracy", "margin"),
    ),
    "orpo": Method(
        "pairs",
        "arXiv 2403.07691, equations 6 and 7; λ of its Mistral",
        numbers={"lambda_": 0.1},
        metrics=("accuracy", "margin", "nll"),
    ),
    "simpo": Method(
        "pairs",
        "arXiv 2405.14734, equation 6; β and γ of its Llama 3",
        numbers={"beta": 2.0, "gamma": 1.0},
        metrics=("accuracy", "margin"),
    ),
    "cpo": Method(
        "pairs",
        "arXiv 2401.08417, equations 4 and 5; weights of the authors' code",
        numbers={"beta": 0.1, "lambda_": 1.0},
        metrics=("accuracy", "margin", "nll"),
    ),
    "kto": Method(
        "answers",
        "arXiv 2402.01306, equation 8",
        has_reference=True,
        numbers={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        metrics=("accuracy", "margin", "kl"),
    ),
    "grpo": Method(
        "prompts",
        "arXiv 2402.03300, equations 3 and 4, and its section 4.2; ε of PPO, 1707.06347",
        has_reference=True,
        numbers={"beta": 0.04, "epsilon": 0.2},
        metrics=("reward", "reward_std", "length", "kl", "clipped"),
    ),
}

NUMBERS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.numbers))


def takers(number: str) -> list[str]:
    """Return the methods that have a number."""
    return [name for name, method in METHODS.items() if number in method.numbers]
