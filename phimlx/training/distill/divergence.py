"""How far a student's probabilities are from a teacher's, of which the largest are known.

Of each position the teacher's k likeliest tokens are known, and the probability of all others
together. That rest is one more class, and the student's probabilities are summed up to the same
k + 1 classes: what is compared are two true distributions, and the student is told how much to
leave to the tokens that nobody named. Renormalizing the k instead would teach it to leave them
nothing. (A "ghost token" in arXiv 2503.16870, which shows the bias of plain top-k; that the
divergence of the summed-up classes is never above that of all tokens is the log sum inequality,
Cover and Thomas, Elements of Information Theory, theorem 2.7.1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from phimlx.machine.reductions import split_logsumexp
from phimlx.training.loss import Criterion, Values, cross_entropy

KINDS = ("forward-kl", "reverse-kl", "jsd")

LEFT_OUT = -1e30  # a logit whose exponential is 0, and which leaves sums finite


@dataclass(frozen=True)
class Divergence:
    """A loss of distillation.

    Attributes:
        kind: "forward-kl", KL(teacher ‖ student), covers all that the teacher may say;
            "reverse-kl", KL(student ‖ teacher), keeps to what it is sure of (arXiv 2306.08543);
            "jsd" lies between (arXiv 2306.13649, equation 1).
        beta: weight of the teacher in the mixture of "jsd".
        temperature: that both sides' logits are divided by. The divergence is multiplied by its
            square, so that gradients keep their size (arXiv 1503.02531, section 2).
        sft: part of the loss that is cross-entropy with the text's own tokens.
    """

    kind: str = "forward-kl"
    beta: float = 0.5
    temperature: float = 1.0
    sft: float = 0.0

    def criterion(self, targets: mx.array, tokens: mx.array, teacher: mx.array) -> Criterion:
        """Make the loss of logits, which has the divergence and the cross-entropy beside it.

        Args:
            targets: `[n]`, the text's own tokens.
            tokens: `[n, k]`, the teacher's likeliest.
            teacher: float32 `[n, k + 1]`, log-probabilities of these, and of all others together,
                at the temperature.
        """

        def criterion(logits: mx.array, here: slice) -> tuple[Values, mx.array]:
            entropy, excess = cross_entropy(logits, targets[here])
            divergence, slope = self.compare(logits, tokens[here], teacher[here])
            weight = (1 - self.sft) * self.temperature**2
            loss = self.sft * entropy + weight * divergence
            gradient = self.sft * excess.astype(mx.float32) + weight * slope
            return (loss, divergence, entropy), gradient.astype(logits.dtype)

        return criterion

    def compare(
        self, logits: mx.array, tokens: mx.array, teacher: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Each row's divergence `[rows]`, and its gradient with respect to `[rows, vocab]` logits.

        With u the derivative by the student's log-probability of each class, the gradient at a
        token that is a class is u − (Σu) q, and at any other its part of the rest's u in place of
        the u.
        """
        wide = logits.astype(mx.float32) / self.temperature
        largest, log_total = split_logsumexp(wide)
        others = mx.put_along_axis(wide, tokens, mx.array(LEFT_OUT), axis=-1)
        rest_largest, rest_total = split_logsumexp(others)
        chosen = mx.take_along_axis(wide, tokens, axis=-1)
        student = mx.concatenate(
            [(chosen - largest) - log_total, (rest_largest - largest) + (rest_total - log_total)],
            axis=-1,
        )  # [rows, k + 1]
        divergence, slopes = COMPARISONS[self.kind](teacher, student, self.beta)
        of_rest = slopes[:, -1:] * mx.exp((others - rest_largest) - rest_total)
        by_token = mx.put_along_axis(of_rest, tokens, slopes[:, :-1], axis=-1)
        likelihoods = mx.exp((wide - largest) - log_total)
        gradient = by_token - slopes.sum(axis=-1, keepdims=True) * likelihoods
        return divergence, gradient / self.temperature


def _forward(teacher: mx.array, student: mx.array, _: float) -> tuple[mx.array, mx.array]:
    p = mx.exp(teacher)
    return (p * (teacher - student)).sum(axis=-1), -p


def _reverse(teacher: mx.array, student: mx.array, _: float) -> tuple[mx.array, mx.array]:
    each = mx.exp(student) * (student - teacher)
    return each.sum(axis=-1), each  # that Σq is always 1 has no slope


def _jensen_shannon(teacher: mx.array, student: mx.array, beta: float) -> tuple[mx.array, mx.array]:
    mixture = mx.logaddexp(teacher + math.log(beta), student + math.log(1 - beta))
    from_teacher = mx.exp(teacher) * (teacher - mixture)
    from_student = (1 - beta) * mx.exp(student) * (student - mixture)
    return (beta * from_teacher + from_student).sum(axis=-1), from_student


Comparison = Callable[[mx.array, mx.array, float], tuple[mx.array, mx.array]]
COMPARISONS: dict[str, Comparison] = {
    "forward-kl": _forward,
    "reverse-kl": _reverse,
    "jsd": _jensen_shannon,
}
"""Of log-probabilities `[rows, k + 1]` of teacher and student the divergence of each row, and its
derivative by the student's."""
