"""Many prompts at once: each gets the reply that it gets alone."""

from __future__ import annotations

from collections.abc import Iterable

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
