"""Speed of a model on this machine, beside what its memory allows and beside mlx-lm.

What is measured goes into a `BenchReport` as it comes, so that a run that is stopped keeps it.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from phimlx.api import Phi, load
from phimlx.generation.engine import Engine
from phimlx.generation.prefill import prefill
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.machine.active_memory import ACTIVE_MEMORY
from phimlx.machine.bandwidth import Bandwidth, memory_bandwidth
from phimlx.machine.device import backend, device_name, prefill_tokens
from phimlx.machine.memory import cache_bytes, longest_context, machine_memory
from phimlx.machine.pass_cost import PassCost
from phimlx.models.base import CausalLM
from phimlx.models.features import TEXT
from phimlx.models.registry import part_of
from phimlx.models.rope import Rope

CONTEXTS = (128, 512, 4096, 16384, 32768)  # tokens of the prompt
ROWS = (1, 4, 8)
PASS_TOKENS = 32  # of the longest pass whose cost is measured
FIRST_TOKEN_SECONDS = 600  # to wait for a child's

Generate = Callable[[Sequence[int], int], tuple[float, float]]
"""Answers a prompt with so many tokens: seconds to the first one, and from there to the last."""


@dataclass(frozen=True)
class ContextSpeed:
    """Speed behind a prompt of `context` tokens; medians.

    Attributes:
        prefill, decode: tokens a second.
        bytes_per_token: read from memory for each decoded token.
        ceiling: tokens a second at which memory would be read without a pause.
        peak_memory: bytes, the weights among them.
        mlx_lm_prefill, mlx_lm_decode: mlx-lm's tokens a second; None where it was not asked.
    """

    context: int
    prefill: float
    decode: float
    bytes_per_token: int
    ceiling: float
    peak_memory: int
    mlx_lm_prefill: float | None = None
    mlx_lm_decode: float | None = None

    @property
    def share(self) -> float:
        """The part of the ceiling that decoding reaches."""
        return self.decode / self.ceiling

    @property
    def prefill_ratio(self) -> float | None:
        """Above 1 where phimlx is quicker."""
        return None if self.mlx_lm_prefill is None else self.prefill / self.mlx_lm_prefill

    @property
    def decode_ratio(self) -> float | None:
        """Above 1 where phimlx is quicker."""
        return None if self.mlx_lm_decode is None else self.decode / self.mlx_lm_decode


@dataclass(frozen=True)
class RowsSpeed:
    """Tokens a second of several requests together."""

    rows: int
    decode: float


@dataclass
class BenchReport:
    """What has been measured so far; None and empty where nothing has.

    Attributes:
        machines: that share the model; bytes and memory are those of the first.
    """

    model: str
    device: str
    backend: str
    dtype: str
    bandwidth: Bandwidth | None = None
    load_seconds: float | None = None
    first_token_seconds: float | None = None
    contexts: list[ContextSpeed] = field(default_factory=list)
    rows: list[RowsSpeed] = field(default_factory=list)
    pass_cost: PassCost | None = None
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    machines: int = 1


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        contexts: tokens of the prompts; those that do not fit are left out. One behind which the
            reply would cross the LongRoPE step, where all is computed again, is shortened.
        tokens: decoded behind each.
        runs: of each measurement; medians are reported.
        rows: requests that are decoded together.
        seconds: a context that would take longer is left out.
    """

    contexts: tuple[int, ...] = CONTEXTS
    tokens: int = 32
    runs: int = 3
    rows: tuple[int, ...] = ROWS
    seconds: float = 300


def new_report(phi: Phi, load_seconds: float) -> BenchReport:
    """Begin a report of a model that has been loaded."""
    dtype = str(phi.model.compute_dtype).removeprefix("mlx.core.")
    return BenchReport(phi.name, device_name(), backend(), dtype, load_seconds=load_seconds)


def measure(
    phi: Phi, report: BenchReport, settings: BenchSettings, theirs: Generate | None = None
) -> Iterator[None]:
    """Measure contexts, rows and the cost of passes, into `report`, whose bandwidth is there.

    Args:
        theirs: mlx-lm's turn, which alternates with ours.

    Yields:
        After each of `steps`.
    """
    assert report.bandwidth is not None
    contexts = fitting_contexts(phi, settings, copies=1 if theirs is None else 2)
    left_out = [context for context in settings.contexts if context > max(contexts, default=0)]
    if left_out:
        report.notes.append(f"Left out, since they do not fit: {_listed(left_out)} tokens.")
    for context in contexts:
        last = report.contexts[-1] if report.contexts else None
        if last is not None and _forecast(last, context, settings) > settings.seconds:
            report.notes.append(f"Left out, since it would take long: {context:,} tokens.")
        else:
            speed = measure_context(phi, context, settings, report.bandwidth, theirs)
            report.contexts.append(speed)
        yield
    shortest = min(contexts, default=1)
    for rows in settings.rows:
        rate = measure_rows(phi, rows, shortest, settings)
        if rate is None:
            report.notes.append(f"Left out, since they do not fit at once: {rows} requests.")
        else:
            report.rows.append(RowsSpeed(rows, rate))
        yield
    report.pass_cost = measure_pass_cost(phi.model, some_tokens(phi, shortest), settings.runs)
    yield


def steps(phi: Phi, settings: BenchSettings, copies: int = 1) -> int:
    """Count the steps of `measure`."""
    return len(fitting_contexts(phi, settings, copies)) + len(settings.rows) + 1


def fitting_contexts(phi: Phi, settings: BenchSettings, copies: int = 1) -> list[int]:
    """Contexts that the model holds and, by forecast, this machine beside `copies` of its weights.

    Where none does, half of what would.
    """
    weights, itemsize = copies * _weights(phi.model), phi.model.compute_dtype.size
    here = longest_context(phi.model.config, weights, machine_memory(), itemsize)
    most = min(phi.context_length, here) - settings.tokens
    fitting = [context for context in sorted(set(settings.contexts)) if context <= most]
    fitting = fitting or ([most // 2] if most > 1 else [])
    rope = phi.model.config.rope
    return sorted({_before_step(rope, context, settings.tokens) for context in fitting})


def _before_step(rope: Rope, context: int, tokens: int) -> int:
    """Shorten a context behind which so many tokens would come to need other rope factors."""
    shorter = context - tokens
    same = rope.table(context) == rope.table(context + tokens)
    return context if same or shorter < 1 else shorter


def measure_context(
    phi: Phi,
    context: int,
    settings: BenchSettings,
    bandwidth: Bandwidth,
    theirs: Generate | None = None,
) -> ContextSpeed:
    """Answer a prompt of `context` tokens a few times, in turn with mlx-lm where it is given."""
    prompt, peak = some_tokens(phi, context), 0
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}

    def ours() -> tuple[float, float]:
        nonlocal peak
        request, before = _request(prompt, settings.tokens), mx.get_active_memory()
        for _ in phi.engine.run(request):
            pass
        stats = request.reply.stats
        peak = max(peak, stats.peak_memory - before)
        return stats.prefill_seconds, stats.generate_seconds

    with ACTIVE_MEMORY.held():
        for run in range(settings.runs):
            for own in (True, False) if run % 2 == 0 else (False, True):
                if own:
                    times[own].append(ours())
                elif theirs is not None:
                    times[own].append(theirs(prompt, settings.tokens))
            mx.clear_cache()
    prefilled, decoded = _rates(times[True], context, settings.tokens)
    their_rates = _rates(times[False], context, settings.tokens) if theirs else (None, None)
    nbytes = bytes_per_token(phi.model, context + settings.tokens // 2)
    return ContextSpeed(
        context,
        prefilled,
        decoded,
        nbytes,
        bandwidth.bytes_per_second / nbytes,
        _weights(phi.model) + peak,
        *their_rates,
    )


def decoding_speed(folder: Path) -> float | None:
    """Load a model, and measure the tokens a second that it decodes behind a short prompt.

    Returns:
        None where it has no room for one.
    """
    settings, phi = BenchSettings(contexts=CONTEXTS[:1]), load(folder)
    contexts = fitting_contexts(phi, settings)
    if not contexts:
        return None
    return measure_context(phi, contexts[0], settings, memory_bandwidth()).decode


def bytes_per_token(model: CausalLM, context: int) -> int:
    """Count the bytes that decoding reads for a token of text behind `context` others.

    Those are all weights as they are stored, without encoders and adapters that text does not use,
    and keys and values. Of an embedding that makes no logits only a row is read.
    """
    arrays = [array for name, array in _parameters(model) if part_of(name) is None]
    nbytes = sum(array.nbytes for array in arrays)
    if model.output_layer is not model.model.embed_tokens:
        rows = _parameters(model.model.embed_tokens)
        nbytes -= sum(array.nbytes - array.nbytes // array.shape[0] for _, array in rows)
    return nbytes + cache_bytes(model.config, context, model.compute_dtype.size)


def measure_rows(phi: Phi, rows: int, context: int, settings: BenchSettings) -> float | None:
    """Measure how many tokens a second so many requests get together, once all are decoded.

    Returns:
        The median, or None where the engine does not take so many at once.
    """
    rates = []
    for _ in range(settings.runs):
        rate = _rate_of_rows(phi, rows, context, settings.tokens)
        if rate is None:
            return None
        rates.append(rate)
        mx.clear_cache()
    return statistics.median(rates)


def _rate_of_rows(phi: Phi, rows: int, context: int, tokens: int) -> float | None:
    engine = Engine(phi.model)
    # Those that begin to be decoded first go on until the last has had its tokens.
    pieces = rows * (1 + context // prefill_tokens())
    most = min(tokens + pieces, phi.context_length - context)
    context = _before_step(phi.model.config.rope, context, most)
    requests = [_request(some_tokens(phi, context, seed), most) for seed in range(rows)]
    engine.add(*requests)
    try:
        while not all(request.reply.tokens for request in requests):
            engine.step()
            if any(request.finished for request in requests):
                return None
        begun, start = _count(requests), time.perf_counter()
        while not any(request.finished for request in requests):
            engine.step()
            if _count(requests) - begun >= rows * tokens:
                break
        seconds, generated = time.perf_counter() - start, _count(requests) - begun
        return generated / seconds
    finally:
        for request in requests:
            engine.cancel(request)


def measure_pass_cost(
    model: CausalLM, prompt: list[int], runs: int, most: int = PASS_TOKENS
) -> PassCost:
    """Measure passes over 1 … `most` tokens behind a prompt, each awaited, in turn.

    The prompt is cut so that no pass leaves the context or needs other rope factors than it has.
    """
    rope, longest = model.config.rope, model.config.max_position_embeddings
    held = max(1, min(len(prompt), longest - most))
    while held > 1 and rope.table(held) != rope.table(held + most):
        held //= 2
    prompt = (prompt * (1 + (held + most) // len(prompt)))[: held + most]
    cache = model.make_cache()
    for _ in prefill(model, np.array([prompt[:held]]), cache, outputs=1):
        pass
    mx.eval(cache.state)
    seconds: dict[int, list[float]] = {count: [] for count in range(1, most + 1)}
    with ACTIVE_MEMORY.held():
        for run in range(runs + 1):
            for count, times in seconds.items():
                start = time.perf_counter()
                tokens = mx.array([prompt[held : held + count]])
                hidden = model.hidden_states(tokens, cache, features=TEXT)
                mx.eval(mx.argmax(model.head(hidden), axis=-1))
                if run:  # the first warms up
                    times.append(time.perf_counter() - start)
                cache.trim(held)
    return curve(seconds)


def curve(seconds: dict[int, list[float]]) -> PassCost:
    """Make a curve of the times of passes over so many tokens, one among them.

    The quickest pass counts: what else the machine does makes one slower, never quicker.
    """
    best = {count: min(times) for count, times in sorted(seconds.items())}
    points = ((count, time / best[1]) for count, time in best.items() if count > 1)
    return PassCost(((1, 1.0), *points), measured=True)


def first_token_seconds(folder: Path, runs: int, flags: Sequence[str] = ()) -> float | None:
    """Measure a command in a new process, from its start to the first byte of its reply; a median.

    Args:
        flags: of `phimlx generate`, beside the model and the prompt.

    Returns:
        None where the model cannot answer a text.
    """
    arguments = ("--raw", "--prompt", "Hello", "--max-tokens", "1", "--model", str(folder))
    command = [sys.executable, "-m", "phimlx", "generate", *arguments, *flags]
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as child:
            try:
                assert child.stdout is not None
                child.stdout.read(1)
                seconds.append(time.perf_counter() - start)
                if child.wait(FIRST_TOKEN_SECONDS) != 0:
                    return None
            finally:
                child.kill()  # nothing where it has ended
    return statistics.median(seconds)


def some_tokens(phi: Phi, count: int, seed: int = 0) -> list[int]:
    """Draw tokens that stand for no image or sound, the same ones each time."""
    drawn = random.Random(seed)
    vocabulary = phi.model.config.vocab_size
    never = set((phi.placeholders or {}).values())
    sample = drawn.sample(range(vocabulary), min(vocabulary, 4096))
    return drawn.choices([token for token in sample if token not in never], k=count)


def _request(prompt: list[int], tokens: int) -> Request:
    """Make a request that ends after so many tokens, and guesses none."""
    return Request(list(prompt), Sampler(Sampling(), 0), tokens, prompt_lookup=False)


def _rates(times: Sequence[tuple[float, float]], context: int, tokens: int) -> tuple[float, float]:
    prefilled = statistics.median(first for first, _ in times)
    decoded = statistics.median(rest for _, rest in times)
    return context / prefilled, (tokens - 1) / decoded


def _forecast(last: ContextSpeed, context: int, settings: BenchSettings) -> float:
    """Seconds that a context will take, given the one before it; mlx-lm's turns as ours."""
    sides = 1 if last.mlx_lm_decode is None else 2
    once = context / last.prefill + settings.tokens / last.decode
    return once * settings.runs * sides


def _count(requests: Sequence[Request]) -> int:
    return sum(len(request.reply.tokens) for request in requests)


def _weights(model: CausalLM) -> int:
    """Bytes of all parameters."""
    return sum(array.nbytes for _, array in _parameters(model))


def _parameters(module: nn.Module) -> Any:
    return tree_flatten(module.parameters())


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(f"{count:,}" for count in counts)
