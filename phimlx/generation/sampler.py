"""Logits -> the next token: bias, penalties, temperature, top-k, top-p, min-p, in that order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from phimlx.errors import GenerationError, shortened


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token. The defaults are greedy and change nothing.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together hold this probability.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the
            prompt or the reply already holds (CTRL, arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens that the reply holds.
        frequency_penalty: subtracted once for each time that the reply holds them.
        logit_bias: token -> what is added to its logit, from -100 to 100. A key may be written as
            text, as in JSON.

    Raises:
        GenerationError: for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, (allows, what) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not allows(value):
                raise GenerationError(f"{name} is {value!r}; it must be {what}.")
        object.__setattr__(self, "logit_bias", _read_bias(self.logit_bias))

    @property
    def penalizes(self) -> bool:
        """Whether tokens that prompt or reply hold lose or gain."""
        added = self.presence_penalty != 0 or self.frequency_penalty != 0
        return added or self.repetition_penalty != 1

    @property
    def is_greedy(self) -> bool:
        """Whether the token of the largest logit is always taken."""
        return self.temperature == 0 and not self.penalizes and not self.logit_bias

    @classmethod
    def defaults(cls, generation_config: Mapping[str, Any], usual: Mapping[str, Any]) -> Sampling:
        """Read a model's own settings: `generation_config.json` over what is usual for it.

        Args:
            generation_config: as `GenerationConfig.read` understands it.
            usual: settings that its makers advise; None where they advise nothing.

        Raises:
            GenerationError: for a value outside its range.
        """
        values: dict[str, Any] = {k: v for k, v in usual.items() if v is not None}
        if generation_config.get("do_sample") is False:
            values = {"temperature": 0.0}
        elif generation_config.get("do_sample"):
            values.setdefault("temperature", 1.0)
        for name in RANGES:
            value = generation_config.get(name)
            if value is not None and generation_config.get("do_sample") is not False:
                values[name] = value
        return cls(**values)

    def override(self, **given: Any) -> Sampling:
        """The same settings with those changed that are not None."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})


def _read_bias(given: Any) -> dict[int, float]:
    if not isinstance(given, Mapping):
        raise GenerationError(f"logit_bias is {shortened(given)}; it must be {BIAS}.")
    found: dict[int, float] = {}
    for key, value in given.items():
        written = isinstance(key, str) and key.isascii() and key.isdecimal()
        token = int(key) if written and len(key) < MAX_DIGITS else key
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise GenerationError(f"logit_bias has the key {shortened(key)}; it must be {BIAS}.")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -MAX_BIAS <= value <= MAX_BIAS:
            raise GenerationError(
                f"logit_bias of token {shortened(key)} is {shortened(value)}; it must be from "
                f"-{MAX_BIAS} to {MAX_BIAS}."
            )
        if token in found:
            raise GenerationError(f"logit_bias has token {token} twice.")
        found[token] = float(value)
    return found


def _finite(value: float) -> bool:
    return math.isfinite(value)


MAX_BIAS = 100
MAX_DIGITS = 10  # of a token written as text
BIAS = "a table of tokens (whole numbers, 0 or more) and numbers"

RANGES = {
    "temperature": (lambda v: _finite(v) and v >= 0, "0 or more"),
    "top_k": (lambda v: isinstance(v, int) and v >= 0, "a whole number, 0 for no limit"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "min_p": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda v: _finite(v) and v > 0, "above 0"),
    "presence_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
    "frequency_penalty": (lambda v: -2 <= v <= 2, "from -2 to 2"),
}


class Sampler:
    """Chooses the tokens of one reply, the same ones for the same seed.

    Nothing here waits for a value: the chosen token may feed the next step before it is known.

    Args:
        sampling: the settings.
        seed: of this reply's own random stream; the process's is neither used nor changed.
        prompt: tokens that the repetition penalty counts as already there.
    """

    def __init__(self, sampling: Sampling, seed: int, prompt: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.seed = seed
        self.key = mx.random.key(seed)
        self.prompt = prompt
        self.counts: mx.array | None = None  # [vocab], how often the reply holds each token
        self.in_prompt: mx.array | None = None  # [vocab]
        self._bias: mx.array | None = None  # [vocab]
        self._drawn: list[tuple[mx.array, mx.array | None]] = []  # key and counts after each draw

    def draw(self, logits: mx.array) -> mx.array:
        """Draw tokens for consecutive places, `[length]` for logits `[length, vocab]`.

        Each is what it would be if those before it stood in the reply; `keep` says how many do.
        """
        self._drawn = []
        if logits.shape[0] > 1 and self.sampling.is_greedy:
            return mx.argmax(logits, axis=-1)
        tokens = []
        for place in range(logits.shape[0]):
            tokens.append(self(logits[place : place + 1]))
            self._drawn.append((self.key, self.counts))
        return mx.concatenate(tokens)

    def keep(self, count: int) -> None:
        """Go on as if only the first `count` tokens of the last `draw` had been drawn."""
        if self._drawn:
            self.key, self.counts = self._drawn[count - 1]

    def rewind(self, tokens: Sequence[int]) -> None:
        """Go on as if these were all the tokens that have been drawn."""
        self._drawn, self._bias = [], None
        self.key = mx.random.key(self.seed)
        if self.sampling.temperature:
            for _ in tokens:
                self.key, _ = mx.random.split(self.key)
        if self.counts is not None:
            vocabulary = self.counts.size
            self._count_prompt(vocabulary)
            self.counts = mx.zeros(vocabulary).at[mx.array(list(tokens), mx.int32)].add(1)

    def __call__(self, logits: mx.array) -> mx.array:
        """The next token, `[1]`, for logits `[1, vocab]`."""
        settings = self.sampling
        logits = logits.astype(mx.float32)
        if settings.logit_bias:
            logits = logits + self._bias_of(logits.shape[-1])
        if settings.penalizes:
            logits = self._penalize(logits)
        if settings.temperature == 0:
            token = mx.argmax(logits, axis=-1)
        else:
            self.key, key = mx.random.split(self.key)
            token = mx.random.categorical(restrict(logits, settings), key=key)
        if settings.penalizes:
            assert self.counts is not None
            self.counts = self.counts.at[token].add(1)
        return token

    def _bias_of(self, vocabulary: int) -> mx.array:
        if self._bias is None:
            tokens, values = zip(*self.sampling.logit_bias.items(), strict=True)
            self._bias = mx.zeros(vocabulary).at[mx.array(tokens)].add(mx.array(values))
        return self._bias

    def _penalize(self, logits: mx.array) -> mx.array:
        if self.counts is None:
            self.counts = mx.zeros(logits.shape[-1])
            self._count_prompt(logits.shape[-1])
        assert self.in_prompt is not None
        settings, held = self.sampling, self.counts > 0
        if settings.repetition_penalty != 1:
            penalty = float(settings.repetition_penalty)  # MLX takes no whole number beyond int64
            weaker = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(held | self.in_prompt, weaker, logits)
        return logits - settings.presence_penalty * held - settings.frequency_penalty * self.counts

    def _count_prompt(self, vocabulary: int) -> None:
        # What stands for media may be no token of the vocabulary.
        prompt = [token for token in self.prompt if token >= 0]
        self.in_prompt = mx.zeros(vocabulary).at[mx.array(prompt, dtype=mx.int32)].add(1) > 0


def restrict(logits: mx.array, settings: Sampling) -> mx.array:
    """Divide by the temperature and set to -inf what top-k, top-p and min-p leave out.

    Args:
        logits: float32 `[1, vocab]`.
    """
    vocabulary = logits.shape[-1]
    logits = logits / float(settings.temperature)
    if 0 < settings.top_k < vocabulary:
        least = mx.partition(logits, -settings.top_k, axis=-1)[..., -settings.top_k, None]
        logits = mx.where(logits < least, -mx.inf, logits)
    if settings.top_p < 1:
        order = mx.argsort(-logits, axis=-1)
        kept = nucleus(mx.take_along_axis(logits, order, axis=-1), settings.top_p)
        logits = mx.where(
            mx.put_along_axis(mx.zeros_like(kept), order, kept, axis=-1), logits, -mx.inf
        )
    if settings.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + math.log(settings.min_p)
        logits = mx.where(logits < least, -mx.inf, logits)
    return logits


def nucleus(logits: mx.array, top_p: float) -> mx.array:
    """Whether each token is among the likeliest that together hold the probability `top_p`.

    Likelihoods are added as whole numbers, which is exact in any order and on any device: near 1 a
    float32 sum is coarser than a token of a large vocabulary. Each token is judged by what it and
    those after it hold, for that is the smaller side, whose digits a float32 keeps.

    Args:
        logits: float32 `[..., vocab]`, falling.

    Source: nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    vocabulary = logits.shape[-1]
    unit = 2.0 ** -(62 - vocabulary.bit_length())  # so that all of them together stay below 2^62
    likelihoods = mx.exp(logits - logits[..., :1])
    counts = (likelihoods / unit).astype(mx.int64)
    up_to_here = mx.cumsum(counts, axis=-1)
    total = up_to_here[..., -1:]
    rest = (total - up_to_here + counts).astype(mx.float32)
    # The likeliest token stays whatever rounding makes of it.
    return (rest > (1 - top_p) * total.astype(mx.float32)) | (mx.arange(vocabulary) == 0)
