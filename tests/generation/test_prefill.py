"""A prompt is read in pieces: it may be cancelled between them, and one of them bounds memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from phimlx.checkpoint.load import build_model
from phimlx.generation import prefill as prefill_module
from phimlx.generation import prompts
from phimlx.generation.engine import Engine
from phimlx.generation.prefill import prefill
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM
from scripts.bench.operations import SHAPES

PIECE = 4


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> CausalLM:
    for module in (prefill_module, prompts):
        monkeypatch.setattr(module, "prefill_tokens", lambda: PIECE)
    mx.random.seed(0)
    return build_model({**SHAPES["phi-4"], "num_hidden_layers": 2})


def request(length: int, **settings: Any) -> Request:
    prompt = [1 + place % 60 for place in range(length)]
    return Request(prompt, Sampler(Sampling(), 0), 8, **settings)


def test_a_request_is_cancelled_between_two_pieces(model: CausalLM) -> None:
    pieces: list[tuple[int, int]] = []

    def after_piece(done: int, total: int) -> None:
        pieces.append((done, total))
        if len(pieces) == 2:
            asked.cancel()

    asked = request(5 * PIECE, on_prefill=after_piece)
    assert list(Engine(model).run(asked)) == []
    assert pieces == [(PIECE, 5 * PIECE), (2 * PIECE, 5 * PIECE)]
    assert (asked.computed, asked.reply.stats.forward_passes) == (2 * PIECE, 2)
    assert asked.reply.finish_reason == "cancelled"


def test_so_is_one_of_a_batch_and_the_others_go_on(model: CausalLM) -> None:
    engine = Engine(model)
    long, short = request(5 * PIECE), request(2)
    engine.add(long)
    engine.step()
    assert long.reply.stats.forward_passes == 1
    engine.add(short)
    engine.cancel(long)
    while not short.finished:
        engine.step()
    assert long.reply.stats.forward_passes == 1
    assert short.reply.tokens == _alone(model, request(2))


def test_an_interrupt_between_pieces_ends_the_request(model: CausalLM) -> None:
    def interrupted(done: int, total: int) -> None:
        raise KeyboardInterrupt

    asked = request(3 * PIECE, on_prefill=interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(Engine(model).run(asked))
    assert asked.finished


def test_memory_is_bounded_by_one_piece() -> None:
    mx.random.seed(0)
    config = {**SHAPES["phi-4"], "intermediate_size": 4096, "num_hidden_layers": 2}
    model = build_model(config)
    mx.eval(model.parameters())
    size, used = 32, {}
    for pieces, step in ((2, size), (12, size), (12, 12 * size)):
        ids = np.ones((1, pieces * size), np.int32)
        cache = model.make_cache()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for hidden in prefill(model, ids, cache, size=step, outputs=1):
            mx.eval(hidden)
        used[pieces, step] = mx.get_peak_memory() - before - cache.nbytes
    assert used[12, size] < 1.5 * used[2, size]
    assert used[12, 12 * size] > 4 * used[2, size]


def _alone(model: CausalLM, asked: Request) -> list[int]:
    for _ in Engine(model).run(asked):
        pass
    return asked.reply.tokens
