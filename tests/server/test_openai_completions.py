"""OpenAI's older completions, with its own client and as evaluation harnesses ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from phimlx.api import Phi
from tests.server.conftest import Say
from tests.server.running import SECONDS, Running

TEXTS = ["Once upon a time", "The sky is", "One, two,"]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=SECONDS
    ) as client:
        yield client


def ask(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    given = {"model": "nano", "max_tokens": 6, "temperature": 0, **more}
    return client.completions.create(prompt=prompt, **given)


def joined(stream: Any) -> dict[int, dict[str, Any]]:
    """What a client makes of a stream: of each choice its text, log-probabilities and reason."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            own = found.setdefault(choice.index, {"text": "", "logprobs": None})
            own["text"] += choice.text
            own["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                new = choice.logprobs.model_dump()
                own["logprobs"] = {k: (own["logprobs"] or {}).get(k, []) + new[k] for k in new}
    return found


@pytest.mark.parametrize("form", ["text", "texts", "tokens", "token lists"])
def test_prompts_of_every_form_are_completed(client: openai.OpenAI, nano: Phi, form: str) -> None:
    ids = [nano.encode(text, raw=True) for text in TEXTS]
    forms: dict[str, tuple[Any, int]] = {
        "text": (TEXTS[0], 1),
        "texts": (TEXTS, 3),
        "tokens": (ids[0], 1),
        "token lists": (ids, 3),
    }
    prompt, count = forms[form]
    expected = [
        nano.generate(each, raw=True, max_tokens=6, temperature=0) for each in TEXTS[:count]
    ]
    found = ask(client, prompt)
    assert [choice.text for choice in found.choices] == [reply.text for reply in expected]
    assert [choice.index for choice in found.choices] == list(range(count))
    assert found.usage.prompt_tokens == sum(len(each) for each in ids[:count])
    assert found.usage.completion_tokens == sum(len(reply.tokens) for reply in expected)
    streamed = joined(ask(client, prompt, stream=True))
    assert {index: each["text"] for index, each in streamed.items()} == {
        choice.index: choice.text for choice in found.choices
    }


def test_choices_of_one_prompt_come_together(client: openai.OpenAI, nano: Phi) -> None:
    found = ask(client, TEXTS[:2], n=2, temperature=1.5, seed=4)
    expected = [
        nano.generate(text, raw=True, max_tokens=6, temperature=1.5, seed=seed).text
        for text in TEXTS[:2]
        for seed in (4, 5)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert found.usage.prompt_tokens == sum(len(nano.encode(text, raw=True)) for text in TEXTS[:2])


def test_prompts_are_scored_as_harnesses_ask(client: openai.OpenAI, nano: Phi) -> None:
    """lm-eval sends lists of tokens with `echo`, reads all but the first and drops the last."""
    ids = [nano.encode(text, raw=True) for text in TEXTS]
    found = ask(client, ids, max_tokens=1, logprobs=1, echo=True, seed=1234)
    for choice, tokens in zip(found.choices, ids, strict=True):
        scored = nano.generate(tokens, max_tokens=1, temperature=0, prompt_logprobs=1)
        told = choice.logprobs
        assert len(told.tokens) == len(told.token_logprobs) == len(tokens) + 1
        assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
        for place in range(1, len(tokens)):
            of_prompt = scored.prompt_logprobs[place]
            assert of_prompt is not None
            assert told.token_logprobs[place] == pytest.approx(of_prompt.logprob, abs=1e-4)
            best = max(told.top_logprobs[place].values())
            assert best == pytest.approx(of_prompt.top[0][1], abs=1e-4)
            is_greedy = of_prompt.top[0][0] == tokens[place]
            assert (told.token_logprobs[place] == best) == is_greedy


def test_a_token_that_ends_the_text_is_told(client: openai.OpenAI, say: Say) -> None:
    say("ok")
    [choice] = ask(client, "Say", logprobs=0).choices
    assert (choice.text, choice.finish_reason) == ("ok", "stop")
    assert "".join(choice.logprobs.tokens) == "ok<|end|>"
    say("ok")
    [streamed] = joined(ask(client, "Say", logprobs=0, stream=True)).values()
    assert streamed["logprobs"] == choice.logprobs.model_dump()


@pytest.mark.parametrize("text", ["<think>2 and 3.</think>5", "  <think> x", "functools[{}]"])
def test_all_of_a_completion_is_text(client: openai.OpenAI, say: Say, text: str) -> None:
    say(text)
    assert ask(client, "Say", max_tokens=40).choices[0].text == text
    say(text)
    assert joined(ask(client, "Say", max_tokens=40, stream=True))[0]["text"] == text


def test_each_choice_of_a_stream_ends_when_it_has_ended(client: openai.OpenAI) -> None:
    prompt = "<|user|>Tell me a story.<|end|><|assistant|>"
    settings = {"n": 4, "seed": 7, "temperature": 1.3, "max_tokens": 40}
    told = [chunk.choices[0] for chunk in ask(client, prompt, stream=True, **settings)]
    for index in range(4):
        own = [each for each in told if each.index == index]
        assert [each for each in own if each.finish_reason] == own[-1:]
    ends = [place for place, each in enumerate(told) if each.finish_reason]
    assert ends[0] < len(told) - 4  # others go on


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_adds_up(client: openai.OpenAI, echo: bool) -> None:
    given: dict[str, Any] = {"logprobs": 2, "echo": echo}
    found = ask(client, TEXTS, **given).choices
    streamed = joined(ask(client, TEXTS, stream=True, **given))
    for choice in found:
        told = choice.logprobs.model_dump()
        assert streamed[choice.index] == {
            "text": choice.text,
            "logprobs": told,
            "finish_reason": choice.finish_reason,
        }
        assert choice.text.startswith(TEXTS[choice.index]) == echo
        text = "".join(told["tokens"]).removesuffix("<|end|>")
        assert text == choice.text
        for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
            assert choice.text[offset:].startswith(token) or token == "<|end|>"


def test_a_prompt_alone_is_scored(client: openai.OpenAI, nano: Phi) -> None:
    for stream in (False, True):
        answer = ask(client, TEXTS[0], max_tokens=0, logprobs=3, echo=True, stream=stream)
        [choice] = joined(answer).values() if stream else [e.model_dump() for e in answer.choices]
        assert (choice["text"], choice["finish_reason"]) == (TEXTS[0], "length")
        assert len(choice["logprobs"]["tokens"]) == len(nano.encode(TEXTS[0], raw=True))
    [choice] = ask(client, TEXTS[0], max_tokens=0, echo=True).choices
    assert (choice.text, choice.logprobs) == (TEXTS[0], None)


def test_usage_comes_last(client: openai.OpenAI) -> None:
    *chunks, last = ask(client, TEXTS[0], stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage.completion_tokens) == ([], 6)
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_more_prompts_than_rows_are_answered(client: openai.OpenAI) -> None:
    found = ask(client, ["One"] * 64, max_tokens=1)
    assert len({choice.text for choice in found.choices}) == 1
    with pytest.raises(openai.BadRequestError):
        ask(client, ["One"] * 65, max_tokens=1)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, ["One"] * 33, max_tokens=1, n=2)
    assert error.value.param == "n"
