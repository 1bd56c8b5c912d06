"""Many prompts at once: each gets the reply that it gets alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import pytest

import phimlx
from phimlx.api import Phi
from phimlx.errors import GenerationError, PromptError
from phimlx.generation import prefill
from phimlx.generation.engine import Engine
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.models.base import CausalLM
from tests.training.models import tiny

PROMPTS = ["What is 3 + 4?", "Spell cat backwards.", "Hi", "Write the numbers from 1 to 9."]


def greedy(
    model: CausalLM, prompts: list[list[int]], count: int, stop_tokens: Iterable[int] = ()
) -> list[list[int]]:
    stop = frozenset(stop_tokens)
    requests = [Request(prompt, Sampler(Sampling(), 0), count, stop) for prompt in prompts]
    Engine(model).run_all(requests)
    return [request.reply.tokens for request in requests]


@pytest.fixture(scope="module")
def nano() -> Phi:
    return phimlx.load("nano", dtype="float32")


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_replies_are_those_of_each_prompt_alone(nano: Phi, batch_size: int) -> None:
    alone = [nano.generate(p, temperature=0, max_tokens=24) for p in PROMPTS]
    answered: list[int] = []
    together = nano.generate_all(
        PROMPTS, max_tokens=24, batch_size=batch_size, advance=answered.append
    )
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    assert [reply.text for reply in together] == [reply.text for reply in alone]
    assert [r.finish_reason for r in together] == [r.finish_reason for r in alone]
    assert len({len(reply.tokens) for reply in alone}) > 1
    assert sum(answered) == len(PROMPTS)


@pytest.mark.parametrize("piece", [2048, 8])
def test_rows_cross_the_long_rope_step_when_each_does_alone(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: piece)
    model = tiny()  # its step is at 32 tokens
    ids = mx.random.randint(3, 300, (40,), key=mx.random.key(5)).tolist()
    prompts = [ids[:n] for n in (38, 33, 32, 29, 20, 3)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
        expected.append(tokens[len(prompt) :])
    assert greedy(model, prompts, 8) == expected


def test_a_stop_token_is_the_last() -> None:
    model = tiny()
    first = greedy(model, [[5, 6], [7, 8, 9]], 6)
    stop = first[0][2]
    cut = [reply[: reply.index(stop) + 1] if stop in reply else reply for reply in first]
    assert greedy(model, [[5, 6], [7, 8, 9]], 6, [stop]) == cut


def test_what_does_not_fit_is_refused_before_anything_is_computed(nano: Phi) -> None:
    with pytest.raises(GenerationError, match="tokens and the reply may have 2,000"):
        nano.generate_all(["Hi", "Ho"], max_tokens=2000)
    with pytest.raises(PromptError):
        nano.generate_all(["Hi", ""], max_tokens=5)
    assert nano.generate_all([], max_tokens=5) == []


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Rows and tokens of each forward pass."""
    shapes: list[tuple[int, ...]] = []
    hidden_states = CausalLM.hidden_states

    def spy(self: CausalLM, input_ids: mx.array, *rest: Any, **options: Any) -> mx.array:
        shapes.append(tuple(input_ids.shape))
        return hidden_states(self, input_ids, *rest, **options)

    monkeypatch.setattr(CausalLM, "hidden_states", spy)
    return shapes


def test_only_the_row_that_crosses_the_step_is_computed_again(
    passes: list[tuple[int, ...]],
) -> None:
    model = tiny()
    prompts = [list(range(5, 5 + length)) for length in (30, 27, 9)]
    alone = [greedy(model, [prompt], 8)[0] for prompt in prompts]
    passes.clear()
    assert greedy(model, prompts, 8) == alone
    # The first row leaves when its third token would be fed, and is back for the next pass.
    assert [shape for shape in passes if shape[1] > 1] == [(3, 30), (1, 33), (1, 33)]
    assert [shape[0] for shape in passes if shape[1] == 1] == [3, 3, 2, 3, 3, 2, 3]


def sampled(prompt: list[int], row: int, stop_tokens: frozenset[int] = frozenset()) -> Request:
    """A request with settings that no other row has."""
    sampling = [
        Sampling(logit_bias={40: 2, 7: -5}),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=20, repetition_penalty=1.3),
        Sampling(temperature=2.0, top_p=0.9, frequency_penalty=0.5),
        Sampling(temperature=1.0, min_p=0.05, presence_penalty=1.0),
    ][row]
    return Request(prompt, Sampler(sampling, 7 + row, prompt), 3 + 2 * row, stop_tokens)


@pytest.mark.parametrize("lengths", [(30, 26, 25, 9, 3), (60, 45, 44, 40, 33)])
def test_each_row_has_its_own_settings_and_leaves_when_it_is_done(
    lengths: tuple[int, ...], passes: list[tuple[int, ...]]
) -> None:
    model = tiny()
    prompts = [list(range(5 + row, 5 + row + length)) for row, length in enumerate(lengths)]
    alone = [sampled(prompt, row) for row, prompt in enumerate(prompts)]
    for request in alone:
        Engine(model).run_all([request])
    passes.clear()
    together = [sampled(prompt, row) for row, prompt in enumerate(prompts)]
    Engine(model).run_all(together)
    assert [r.reply.tokens for r in together] == [r.reply.tokens for r in alone]
    assert [r.reply.finish_reason for r in together] == ["length"] * 5
    assert len({token for request in alone for token in request.reply.tokens}) > 10
    assert {shape[0] for shape in passes if shape[1] == 1} == {1, 2, 3, 4, 5}


def test_a_stop_token_that_is_drawn_frees_its_row_alone() -> None:
    model = tiny()
    prompts = [list(range(5 + row, 15 + 3 * row)) for row in range(5)]
    free = [sampled(prompt, row) for row, prompt in enumerate(prompts)]
    Engine(model).run_all(free)
    stop = frozenset({free[2].reply.tokens[1], free[4].reply.tokens[5]})
    stopped = [sampled(prompt, row, stop) for row, prompt in enumerate(prompts)]
    Engine(model).run_all(stopped)
    for request, whole in zip(stopped, free, strict=True):
        tokens = whole.reply.tokens
        end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
        assert request.reply.tokens == tokens[:end]
    assert stopped[2].reply.finish_reason == "stop"


@pytest.mark.parametrize("piece", [2048, 8])
def test_rows_may_begin_on_either_side_of_the_step(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: piece)
    model = tiny()
    prompts = [list(range(5 + row, 5 + row + n)) for row, n in enumerate((60, 33, 32, 30, 9))]
    alone = [greedy(model, [prompt], 6)[0] for prompt in prompts]
    requests = [Request(prompt, Sampler(Sampling(), 0), 6) for prompt in prompts]
    engine = Engine(model)
    engine.add(*requests)
    while not all(request.finished for request in requests):
        engine.step()
    assert [request.reply.tokens for request in requests] == alone
