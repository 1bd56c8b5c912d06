"""Log-probabilities of replies and prompts, beside numpy's log-softmax of whole forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import phimlx
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import GenerationError
from phimlx.generation import batch, logprobs, prefill
from phimlx.generation.engine import Engine
from phimlx.generation.logprobs import Logprobs, TokenLogprob, score_rows
from phimlx.generation.options import GenerationOptions
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.reply import Reply
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.generation.speculation import PromptLookup
from phimlx.models.base import CausalLM
from tests.generation.test_engine_media import picture

MODELS = Path(__file__).parents[1] / "goldens" / "models"
STEP = 32  # of mini-step-32
TOP = 5


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return load_model(Checkpoint(MODELS / "mini-step-32"), mx.float32)


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


def prompt_of(length: int, start: int = 4) -> list[int]:
    return [start + (7 * i) % 240 for i in range(length)]


def log_softmax(logits: mx.array) -> np.ndarray:
    wide = np.array(logits.astype(mx.float32)).astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


def after(model: CausalLM, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities of what follows some tokens, from one pass over them: `[vocab]`."""
    return log_softmax(model(mx.array([list(tokens)]))[0, -1])


def check(found: TokenLogprob, expected: np.ndarray, token: int, top: int) -> None:
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token], abs=1e-4)
    likeliest = np.sort(expected)[::-1][:top]
    assert [value for _, value in found.top] == pytest.approx(likeliest.tolist(), abs=1e-4)
    assert [expected[other] for other, _ in found.top] == pytest.approx(
        likeliest.tolist(), abs=1e-4
    )


def check_reply(model: CausalLM, prompt: list[int], reply: Reply, top: int) -> None:
    assert len(reply.logprobs) == len(reply.tokens) > 0
    for place, token in enumerate(reply.tokens):
        expected = after(model, prompt + reply.tokens[:place])
        check(reply.logprobs[place], expected, token, top)


SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.7, top_p=0.8, top_k=9),
    Sampling(temperature=1.5, min_p=0.05, repetition_penalty=1.3),
    Sampling(presence_penalty=1.0, frequency_penalty=0.5, logit_bias={7: 3, 9: -100}),
)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("length", [1, 28, 31, 40])
def test_they_are_those_of_the_unmodified_distribution(
    model: CausalLM, sampling: Sampling, length: int
) -> None:
    """Whatever the sampling, and on either side of the LongRoPE step and across it."""
    prompt = prompt_of(length)
    request = Request(prompt, Sampler(sampling, 3, prompt), 8, top_logprobs=TOP)
    chunks = list(Engine(model).run(request))
    check_reply(model, prompt, request.reply, TOP)
    assert [found for chunk in chunks for found in chunk.logprobs] == request.reply.logprobs
    assert request.reply.said == 8


class Foresight(PromptLookup):
    """Drafts what the reply is known to be, and after some right tokens a wrong one."""

    known: list[int]

    def draft(self, limit: int = 31) -> list[int]:
        right = self.known[len(self) : len(self) + (len(self) * 5) % 7]
        return [*right, 3, 3][:limit] if len(self) % 9 else []


@pytest.mark.parametrize("length", [20, 31, 40])
@pytest.mark.parametrize("sampling", SAMPLINGS[::2], ids=str)
def test_drafted_tokens_have_them_too(
    model: CausalLM, length: int, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(prompt_lookup: bool) -> Request:
        sampler = Sampler(sampling, 5, prompt)
        request = Request(prompt, sampler, 20, prompt_lookup=prompt_lookup, top_logprobs=TOP)
        list(Engine(model, lambda tokens: 1.0).run(request))
        return request

    monkeypatch.setattr(batch, "PromptLookup", Foresight)
    prompt = prompt_of(length)
    plain = run(False)
    Foresight.known = prompt + plain.reply.tokens
    drafted = run(True)
    assert drafted.reply.tokens == plain.reply.tokens
    assert 0 < drafted.reply.stats.accepted_tokens < drafted.reply.stats.drafted_tokens
    check_reply(model, prompt, drafted.reply, TOP)


def test_rows_that_ask_and_rows_that_do_not(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows leave and join; nothing is computed for those that do not ask."""
    asked: list[tuple[int, ...]] = []

    def spy(logits: mx.array, tokens: mx.array, tops: Sequence[int | None]) -> Any:
        found = score_rows(logits, tokens, tops)
        asked.append(tuple(own.first for own in found if own is not None))
        return found

    monkeypatch.setattr(batch, "score_rows", spy)
    tops = (None, 0, 3, None, TOP)
    requests = [
        Request(prompt := prompt_of(length, 4 + row), Sampler(Sampling(1.0), row, prompt), count)
        for row, (length, count) in enumerate(
            zip((30, 9, 40, 3, 27), (4, 9, 6, 24, 10), strict=True)
        )
    ]
    for request, top in zip(requests, tops, strict=True):
        request.top_logprobs = top
    engine = Engine(model, max_rows=4)
    engine.add(*requests)
    chunks = []
    while not all(request.finished for request in requests):
        chunks += engine.step()
    for request, top in zip(requests, tops, strict=True):
        if top is None:
            assert request.reply.logprobs == []
        else:
            check_reply(model, request.prompt, request.reply, top)
        said = [found for owner, chunk in chunks if owner is request for found in chunk.logprobs]
        assert said == request.reply.logprobs
    assert (0, 1) in asked
    assert () in asked


def test_with_a_quantized_cache(model: CausalLM) -> None:
    """Keys and values at 8 bits give other logits: those of the plain pass over that cache."""
    wide = load_model(Checkpoint(MODELS / "mini-step-32"), mx.float32)
    prompt = prompt_of(20)
    caches = [PromptCache(wide, kv_bits=8) for _ in range(2)]
    request = Request(prompt, Sampler(Sampling(), 0), 6, cache=caches[0], top_logprobs=TOP)
    list(Engine(wide).run(request))
    tokens = prompt
    for place, token in enumerate(request.reply.tokens):
        logits = wide(mx.array([tokens]), caches[1].kv)[0, -1]
        check(request.reply.logprobs[place], log_softmax(logits), token, TOP)
        tokens = [token]


def test_a_model_of_a_large_vocabulary_keeps_its_digits() -> None:
    logits = mx.random.normal((3, 200_064), key=mx.random.key(2)) * 3
    found = Logprobs(logits, mx.array([5, 77, 200_063]), 20)
    for place, token in enumerate((5, 77, 200_063)):
        expected = log_softmax(logits[place])
        own = found.read(place, 20)
        assert own.logprob == pytest.approx(expected[token], abs=3e-6)
        order = np.argsort(-expected, kind="stable")[:20]
        assert [other for other, _ in own.top] == order.tolist()


# Stop strings: what is told of tokens whose text is cut.


def read(phi: phimlx.Phi, text: str, stop: str, budget: int = 100) -> tuple[list[int], Reply, Any]:
    """Feed a reply token by token, each with its place as its log-probability."""
    assert phi.tokenizer is not None
    request = phi.request("Hi", GenerationOptions(stop=stop))
    request.max_tokens = budget
    tokens, told = phi.tokenizer.encode(text), []
    for place, token in enumerate(tokens):
        if request.finished:
            break
        for chunk in request.take(token, TokenLogprob(token, float(-place))):
            told += [found.token for found in chunk.logprobs]
    return tokens, request.reply, told


def test_tokens_of_a_stop_string_are_not_told(phi: phimlx.Phi) -> None:
    assert phi.tokenizer is not None
    for text in ("One, two, three. END and on", "🙂🙂 well END", "END", "a\n\nEND\n"):
        tokens, reply, told = read(phi, text, "END")
        words = text[: text.index("END")]
        assert reply.text == words
        assert reply.finish_reason == "stop"
        assert told == tokens[: reply.said]
        assert len(reply.logprobs) == len(reply.tokens) > reply.said
        # Each of them adds to the words; without the last of them some would be missing.
        assert phi.tokenizer.decode(told).startswith(words)
        if told:
            assert len(phi.tokenizer.decode(told[:-1])) < len(words)


def test_what_was_held_back_and_is_no_stop_string_is_told(phi: phimlx.Phi) -> None:
    tokens, reply, told = read(phi, "the EN of it all", "END", budget=3)
    assert told == tokens[:3]
    assert reply.finish_reason == "length"
    tokens, reply, told = read(phi, "the E and the EN, yes", "END")
    assert told == tokens[: len(told)]
    eos = next(iter(phi.eos))
    request = phi.request("Hi", GenerationOptions(stop="END"))
    assert phi.tokenizer is not None
    held = phi.tokenizer.encode(" EN")
    chunks = [c for t in [*held, eos] for c in request.take(t, TokenLogprob(t, -1.0))]
    assert [found.token for chunk in chunks for found in chunk.logprobs] == held
    assert [found.token for found in request.reply.logprobs] == [*held, eos]


def test_in_python(phi: phimlx.Phi) -> None:
    stream = phi.stream(
        "What is 3 + 4?", temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    told = [found for chunk in stream for found in chunk.logprobs]
    reply = stream.reply
    check_reply(phi.model, phi.encode("What is 3 + 4?"), reply, 2)
    assert told == reply.logprobs[: reply.said]
    assert phi.tokenizer is not None
    said = b"".join(phi.tokenizer.token_bytes(found.token) for found in told)
    assert said.decode() == reply.text
    first = reply.as_object("nano")["logprobs"][0]
    assert first == {
        "token": reply.tokens[0],
        "logprob": reply.logprobs[0].logprob,
        "top": [{"token": t, "logprob": value} for t, value in reply.logprobs[0].top],
    }
    plain = phi.generate("Hi", max_tokens=3)
    assert plain.logprobs == []
    assert "logprobs" not in plain.as_object("nano")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": 5}, "logprobs is 5; it must be true or false."),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; it must be from 0 to 20."),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs is -1; it must be from 0 to 20."),
        (
            {"logprobs": True, "top_logprobs": True},
            "top_logprobs is True; it must be from 0 to 20.",
        ),
        ({"logprobs": True, "top_logprobs": "3"}, "top_logprobs is '3'; it must be from 0 to 20."),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs."),
    ],
)
def test_what_cannot_be_told(phi: phimlx.Phi, options: dict[str, Any], message: str) -> None:
    with pytest.raises(GenerationError) as error:
        phi.stream("Hi", **options)
    assert str(error.value) == message


# Prompts.


def check_prompt(model: CausalLM, prompt: list[int], reply: Reply, top: int) -> None:
    """Each token's is that of one pass over the whole prompt."""
    first, *further = reply.prompt_logprobs
    assert first is None
    logits = model(mx.array([prompt]))[0]
    assert len(further) == len(prompt) - 1
    for place, found in enumerate(further):
        assert found is not None
        check(found, log_softmax(logits[place]), prompt[place + 1], top)


@pytest.mark.parametrize("piece", [2048, 16, 1])
def test_prompts_are_scored_piece_by_piece(
    model: CausalLM, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, and padded in one batch; with a reply behind them and without."""
    monkeypatch.setattr(prefill, "prefill_tokens", lambda: piece)
    monkeypatch.setattr(logprobs, "CHUNK", 7)
    for lengths in ((1,), (31,), (40,), (40, 33, 9, 1)):
        requests = [
            Request(
                prompt_of(length, 4 + row),
                Sampler(Sampling(), 0),
                (0, 3)[row % 2],
                top_logprobs=1,
                prompt_logprobs=row,
            )
            for row, length in enumerate(lengths)
        ]
        Engine(model).run_all(requests)
        for top, request in enumerate(requests):
            check_prompt(model, request.prompt, request.reply, top)
            assert len(request.reply.tokens) == request.max_tokens
            assert request.reply.finish_reason == "length"
            if request.reply.tokens:
                check_reply(model, request.prompt, request.reply, 1)


def test_logits_of_a_prompt_exist_a_few_at_a_time(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[int] = []
    head = CausalLM.head

    def spy(self: CausalLM, x: mx.array) -> mx.array:
        places.append(x.size // x.shape[-1])
        return head(self, x)

    monkeypatch.setattr(CausalLM, "head", spy)
    request = Request(prompt_of(300), Sampler(Sampling(), 0), 0, prompt_logprobs=0)
    list(Engine(model).run(request))
    assert places == [128, 128, 43, 1]  # the last one is for the reply
    assert request.reply.stats.prefill_seconds > 0


def test_scored_prompts_and_others_do_not_wait_for_each_other(model: CausalLM) -> None:
    """They are prefilled apart, and decoded together."""
    requests = [
        Request(prompt_of(9), Sampler(Sampling(), 0), 6),
        Request(prompt_of(12), Sampler(Sampling(), 0), 0, prompt_logprobs=2),
        Request(prompt_of(20), Sampler(Sampling(), 0), 4, prompt_logprobs=2),
    ]
    engine = Engine(model)
    engine.add(*requests)
    while not all(request.finished for request in requests):
        engine.step()
    assert requests[0].reply.prompt_logprobs == []
    for request in requests[1:]:
        check_prompt(model, request.prompt, request.reply, 2)
    assert [len(request.reply.tokens) for request in requests] == [6, 0, 4]
    alone = Request(prompt_of(20), Sampler(Sampling(), 0), 4)
    list(Engine(model).run(alone))
    assert requests[2].reply.tokens == alone.reply.tokens


def test_with_pictures_and_sounds(data: Path) -> None:
    model = load_model(Checkpoint(data / "tiny" / "tiny-phi4mm-remote"), mx.float32)
    assert model.placeholders is not None
    (slots, media), words = picture("cat"), prompt_of(9)
    prompt = [*words[:4], *slots, *words[4:]]
    request = Request(
        prompt, Sampler(Sampling(), 0), 3, media=media, top_logprobs=2, prompt_logprobs=2
    )
    list(Engine(model).run(request))
    # What stands for media can be no reply's, but the distribution is told as it is.
    for place, found in enumerate(request.reply.logprobs):
        tokens = prompt + request.reply.tokens[:place]
        logits = model(mx.array([tokens]), **media.arrays)[0, -1]
        check(found, log_softmax(logits), request.reply.tokens[place], 2)
    logits = model(mx.array([prompt]), **media.arrays)[0]
    for place in (0, 3, 100, len(prompt) - 2):
        scored = request.reply.prompt_logprobs[place + 1]
        assert scored is not None
        check(scored, log_softmax(logits[place]), prompt[place + 1], 2)


def test_a_prompt_that_is_no_numbers_is_an_error() -> None:
    model = load_model(Checkpoint(MODELS / "mini-step-32"), mx.float32)
    model.model.norm.weight = model.model.norm.weight * mx.nan
    request = Request(prompt_of(5), Sampler(Sampling(), 0), 0, prompt_logprobs=0)
    with pytest.raises(GenerationError, match="computes no numbers"):
        list(Engine(model).run(request))


def test_a_prompt_is_scored_in_python(phi: phimlx.Phi) -> None:
    prompt = "Spell cat backwards."
    reply = phi.generate(prompt, raw=True, prompt_logprobs=3, max_tokens=0)
    assert (reply.text, reply.tokens, reply.finish_reason) == ("", [], "length")
    check_prompt(phi.model, phi.encode(prompt, raw=True), reply, 3)
    with pytest.raises(GenerationError, match=r"^max_tokens is -1; it must be 0 or more\.$"):
        phi.generate(prompt, prompt_logprobs=0, max_tokens=-1)
    with pytest.raises(GenerationError, match=r"^max_tokens is 0; it must be 1 or more\.$"):
        phi.generate(prompt, max_tokens=0)
    with pytest.raises(GenerationError, match=r"^prompt_logprobs is 21; it must be from 0 to 20"):
        phi.generate(prompt, prompt_logprobs=21)
    with pytest.raises(GenerationError, match=r"^prompt_logprobs needs all of the prompt"):
        phi.generate(prompt, prompt_logprobs=1, cache=phi.new_cache())
