"""The bench: what it counts, what it leaves out, and that a run fills its report. No times."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from phimlx.checkpoint.load import build_model
from phimlx.errors import PhimlxError
from phimlx.evaluation import bench
from phimlx.evaluation.bench import BenchReport, BenchSettings, ContextSpeed
from phimlx.evaluation.mlx_lm_speed import load_mlx_lm
from phimlx.generation.engine import Engine
from phimlx.generation.prefill import prefill
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.machine.bandwidth import Bandwidth
from phimlx.machine.device import prefill_tokens
from phimlx.models.base import CausalLM
from scripts.bench.operations import SHAPES, write_model

SETTINGS = BenchSettings(contexts=(8, 16), tokens=3, runs=1, rows=(1, 2))
LAYER_MINI = 384 * (384 + 2 * 128) + 384 * 384 + 384 * 128 + 64 * 384 + 2 * 384
LAYER_PHI_4 = 512 * (512 + 2 * 128) + 512 * 512 + 512 * 128 + 64 * 512 + 2 * 512


def tiny(shape: str, layers: int = 2) -> CausalLM:
    mx.random.seed(0)
    return build_model({**SHAPES[shape], "num_hidden_layers": layers})


def phi_of(model: CausalLM, context_length: int = 512) -> Any:
    return SimpleNamespace(
        model=model,
        engine=Engine(model),
        name="tiny",
        placeholders=None,
        context_length=context_length,
    )


def report() -> BenchReport:
    return BenchReport("tiny", "a chip", "cpu", "float32", Bandwidth(1e9, "measured"))


def test_bytes_of_a_token_with_a_tied_head() -> None:
    weights = 2 * LAYER_MINI + 64 * 384 + 384
    cache = 100 * 2 * 2 * 128
    assert bench.bytes_per_token(tiny("phi-4-mini"), 100) == 4 * (weights + cache)


def test_bytes_of_a_token_with_a_head_of_its_own() -> None:
    weights = 2 * LAYER_PHI_4 + 64 * 512 + 512 + 512  # head, final norm, one row of the embedding
    assert bench.bytes_per_token(tiny("phi-4"), 0) == 4 * weights


def test_bytes_of_a_token_of_quantized_weights() -> None:
    model = tiny("phi-4-mini", layers=1)
    nn.quantize(model, group_size=64, bits=4)
    packed = LAYER_MINI - 2 * 384 + 64 * 384
    stored = packed // 2 + packed // 64 * 2 * 4  # scale and bias of a group, in float32
    assert bench.bytes_per_token(model, 0) == stored + 4 * (3 * 384)


def test_encoders_and_adapters_are_not_read_for_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("phi-4-mini")
    whole = bench.bytes_per_token(model, 0)
    monkeypatch.setattr(bench, "part_of", lambda name: "adapter" if ".1.mlp." in name else None)
    assert bench.bytes_per_token(model, 0) == whole - 4 * (384 * 128 + 64 * 384)


def test_share_and_ratios() -> None:
    speed = ContextSpeed(512, 1000, 40, 10**9, 80, 0, 500, 50)
    assert (speed.share, speed.prefill_ratio, speed.decode_ratio) == (0.5, 2, 0.8)
    alone = ContextSpeed(512, 1000, 40, 10**9, 80, 0)
    assert (alone.prefill_ratio, alone.decode_ratio) == (None, None)


def test_the_curve_is_relative_to_one_token() -> None:
    curve = bench.curve({2: [3.0, 2.5], 1: [2.0, 4.0], 4: [9.0]})
    assert curve.measured
    assert curve.points == ((1, 1.0), (2, 1.25), (4, 4.5))


@pytest.mark.parametrize(
    ("context_length", "memory", "copies", "expected"),
    [
        (512, 1 << 40, 1, [8, 16]),
        (18, 1 << 40, 1, [8]),
        (11, 1 << 40, 1, [8]),
        (10, 1 << 40, 1, [3]),  # half of what remains beside the reply
        (512, 0, 1, []),
    ],
)
def test_contexts_that_fit(
    context_length: int,
    memory: int,
    copies: int,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "machine_memory", lambda: memory)
    phi = phi_of(tiny("phi-4-mini"), context_length)
    assert bench.fitting_contexts(phi, SETTINGS, copies) == expected


def test_no_reply_crosses_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    phi = phi_of(tiny("phi-4-mini"))  # which steps at 256 tokens
    settings = BenchSettings(contexts=(250, 253, 254, 256, 257), tokens=3)
    assert bench.fitting_contexts(phi, settings) == [250, 251, 253, 257]
    begun: list[int] = []

    def noted(prompt: list[int], tokens: int) -> Request:
        begun.append(len(prompt))
        return Request(prompt, Sampler(Sampling(), 0), tokens)

    monkeypatch.setattr(bench, "_request", noted)
    assert bench.measure_rows(phi, 2, 255, SETTINGS) is not None
    assert begun == [250, 250]  # a reply may have 5 tokens: 3, and 2 while the other row begins


def test_two_models_leave_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    phi = phi_of(tiny("phi-4-mini"))
    weights = bench._weights(phi.model)
    working = prefill_tokens() * (6 * 64 + 12 * 384) * 4
    monkeypatch.setattr(bench, "machine_memory", lambda: weights + working + 20 * 2048)
    assert bench.fitting_contexts(phi, SETTINGS) == [8, 16]
    assert bench.fitting_contexts(phi, SETTINGS, copies=2) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_fills_the_report(shape: str) -> None:
    phi, found = phi_of(tiny(shape)), report()
    asked: list[tuple[int, int]] = []

    def theirs(prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        asked.append((len(prompt), tokens))
        return 1.0, 0.5

    settings = BenchSettings(contexts=(8, 16, 100_000), tokens=3, runs=2, rows=(1, 2))
    advanced = sum(1 for _ in bench.measure(phi, found, settings, theirs))
    assert advanced == bench.steps(phi, settings, 2) == 5
    assert [speed.context for speed in found.contexts] == [8, 16]
    assert asked == [(8, 3)] * 2 + [(16, 3)] * 2
    for speed in found.contexts:
        assert (speed.mlx_lm_prefill, speed.mlx_lm_decode) == (speed.context, 4)
        assert speed.bytes_per_token == bench.bytes_per_token(phi.model, speed.context + 1)
        assert speed.ceiling == 1e9 / speed.bytes_per_token
        assert min(speed.prefill, speed.decode) > 0
        assert speed.peak_memory > bench._weights(phi.model)
    assert [speed.rows for speed in found.rows] == [1, 2]
    assert found.pass_cost is not None
    assert [tokens for tokens, _ in found.pass_cost.points] == list(range(1, 33))
    assert found.notes == ["Left out, since they do not fit: 100,000 tokens."]


def test_what_was_measured_before_an_interrupt_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_rows", interrupted)
    found = report()
    with pytest.raises(KeyboardInterrupt):
        list(bench.measure(phi_of(tiny("phi-4-mini")), found, SETTINGS))
    assert [speed.context for speed in found.contexts] == [8, 16]
    assert (found.rows, found.pass_cost, found.complete) == ([], None, False)


def test_a_context_that_would_take_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ContextSpeed(8, prefill=1, decode=1, bytes_per_token=1, ceiling=1, peak_memory=1)
    monkeypatch.setattr(bench, "measure_context", lambda *_: slow)
    monkeypatch.setattr(bench, "measure_rows", lambda *_: None)
    found = report()
    settings = BenchSettings(contexts=(8, 16), tokens=3, runs=2, rows=(64,), seconds=37)
    list(bench.measure(phi_of(tiny("phi-4-mini")), found, settings))
    assert found.contexts == [slow]
    assert found.notes == [
        "Left out, since it would take long: 16 tokens.",
        "Left out, since they do not fit at once: 64 requests.",
    ]


def test_more_rows_than_the_engine_takes_are_no_rate() -> None:
    assert bench.measure_rows(phi_of(tiny("phi-4")), 17, 4, SETTINGS) is None


def test_passes_do_not_cross_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("phi-4-mini", layers=1)  # which steps at 256 tokens
    lengths: list[int] = []

    def noted(model: CausalLM, ids: Any, *rest: Any, **options: Any) -> Any:
        lengths.append(ids.shape[1])
        return prefill(model, ids, *rest, **options)

    monkeypatch.setattr(bench, "prefill", noted)
    for length in (250, 256, 300):
        bench.measure_pass_cost(model, [1] * length, 1, most=8)
    assert lengths == [125, 128, 300]


def test_the_same_tokens_are_drawn_each_time() -> None:
    phi = phi_of(tiny("phi-4"))
    phi.placeholders = {"image": 3, "audio": 5}
    drawn = bench.some_tokens(phi, 500)
    assert drawn == bench.some_tokens(phi, 500)
    assert drawn != bench.some_tokens(phi, 500, seed=1)
    assert set(drawn) <= set(range(64)) - {3, 5}


@pytest.mark.parametrize(
    ("script", "answers"), [("echo hello", True), ("true", True), ("echo no >&2; exit 1", False)]
)
def test_the_first_token_of_a_command(
    script: str, answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    seconds = bench.first_token_seconds(Path("a model"), 2, ["--dtype", "float32"])
    assert (seconds is not None) is answers
    asked = (tmp_path / "asked").read_text().splitlines()
    line = "-m phimlx generate --raw --prompt Hello --max-tokens 1 --model a model --dtype float32"
    assert asked == [line] * (2 if answers else 1)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """Keeps MLX from starting a C++ compiler for what mlx-lm compiles."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("uncompiled")
def test_a_turn_of_mlx_lm(tmp_path: Path) -> None:
    write_model(tmp_path / "mini", {**SHAPES["phi-4-mini"], "num_hidden_layers": 1})
    generate = load_mlx_lm(tmp_path / "mini", mx.float16)
    assert min(generate([1, 2, 3], 3)) > 0


def test_what_mlx_lm_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi9"}')
    with pytest.raises(PhimlxError, match=r"^mlx-lm cannot load .*\.$") as raised:
        load_mlx_lm(tmp_path)
    assert raised.value.hint == "Leave out --vs; mlx-lm reads text models in MLX format."
