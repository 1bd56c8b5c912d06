"""Replies to one prompt, and prompts that begin alike, compute what they share once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phimlx.api import Phi, load
from phimlx.generation import prompts
from phimlx.generation.options import GenerationOptions
from phimlx.generation.prefill import prefill
from phimlx.generation.request import Request
from phimlx.models.base import CausalLM


@pytest.fixture(scope="module")
def nano() -> Phi:
    return load("nano")


def computed(phi: Phi, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> int:
    """Answer requests; the tokens of their prompts that passed through the model."""
    passed: list[int] = []

    def count(model: CausalLM, ids: np.ndarray, *given: Any, **more: Any) -> Any:
        passed.append(ids.size)
        return prefill(model, ids, *given, **more)

    monkeypatch.setattr(prompts, "prefill", count)
    phi.engine.forget_prefixes()
    phi.engine.add(*requests)
    while phi.engine.busy:
        phi.engine.step()
    return sum(passed)


def ask(phi: Phi, prompt: list[int], n: int = 1) -> list[Request]:
    options = GenerationOptions(max_tokens=1, temperature=1.0, seed=1, raw=True)
    return phi.requests(prompt, options, n)


@pytest.mark.parametrize(("length", "n"), [(600, 8), (600, 2), (200, 8), (80, 3)])
def test_choices_prefill_their_prompt_once(
    nano: Phi, monkeypatch: pytest.MonkeyPatch, length: int, n: int
) -> None:
    prompt = [5 + each * 7 % 900 for each in range(length)]
    requests = ask(nano, prompt, n)
    assert computed(nano, requests, monkeypatch) == length + n - 1
    assert [each.reply.stats.cached_tokens for each in requests] == [0] + [length - 1] * (n - 1)
    last = ask(nano, prompt, n)[-1]
    list(nano.engine.run(last))  # alone
    assert requests[-1].reply.tokens == last.reply.tokens


def test_prompts_that_begin_alike_compute_the_beginning_once(
    nano: Phi, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = [5 + each * 7 % 900 for each in range(300)]
    requests = [request for end in (7, 8, 9) for request in ask(nano, [*begin, end, end])]
    assert computed(nano, requests, monkeypatch) == 302 + 2 + 2


def test_prompts_that_share_little_are_computed_together(
    nano: Phi, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request for end in (7, 8, 9) for request in ask(nano, [5] * 30 + [end] * 30)]
    assert computed(nano, requests, monkeypatch) == 3 * 60
    assert {each.reply.stats.cached_tokens for each in requests} == {0}
