"""Replies from quantized keys and values: alone, in batches, turn after turn, with media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import phimlx
from phimlx.errors import GenerationError
from phimlx.generation.engine import Engine
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.hub.resolve import NANO, NANO_MULTIMODAL
from phimlx.models.base import CausalLM

# nano's LongRoPE step is at 128 tokens: the last is beyond it.
PROMPTS = [
    "What is 3 + 4?",
    "Spell cat backwards.",
    "Repeat: " + "one two three four five six seven eight nine ten " * 4,
    "Repeat: " + "one two three four five six seven eight nine ten " * 9,
]
BITS = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


@BITS
def test_rows_of_a_batch_say_what_each_says_alone(phi: phimlx.Phi, bits: int) -> None:
    alone = [phi.generate(p, temperature=0, max_tokens=24, kv_bits=bits) for p in PROMPTS]
    together = phi.generate_all(PROMPTS, max_tokens=24, kv_bits=bits)
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]


@BITS
def test_rows_cross_the_step_when_each_does_alone(phi: phimlx.Phi, bits: int) -> None:
    text = phi.encode(PROMPTS[3], raw=True)
    prompts = [text[:length] for length in (150, 127, 122, 40)]  # the step is at 128

    def ask(*rows: list[int]) -> list[list[int]]:
        requests = [Request(row, Sampler(Sampling(), 0), 12, kv_bits=bits) for row in rows]
        Engine(phi.model).run_all(requests)
        return [request.reply.tokens for request in requests]

    assert ask(*prompts) == [ask(prompt)[0] for prompt in prompts]


@BITS
def test_turns_are_those_of_prompts_from_the_start(phi: phimlx.Phi, bits: int) -> None:
    cache, messages = phi.new_cache(bits), []
    for prompt in PROMPTS:
        messages.append({"role": "user", "content": prompt})
        options: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
        reply = phi.generate(messages, cache=cache, **options)
        assert reply.tokens == phi.generate(messages, kv_bits=bits, **options).tokens
        messages.append({"role": "assistant", "content": reply.text})
    assert cache.kv_bits == bits
    plain = phi.new_cache()
    phi.generate(messages[:-1], cache=plain, temperature=0, max_tokens=12)
    assert cache.nbytes == plain.nbytes * (bits + 2) // 32  # float32, groups of 32


def test_a_sampled_reply_depends_on_the_seed_alone(phi: phimlx.Phi) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 30, "kv_bits": 8}
    assert phi.generate("Hi", **options).tokens == phi.generate("Hi", **options).tokens


@BITS
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("length", [60, 118, 150])  # before nano's step, across it, beyond it
def test_drafts_change_nothing(phi: phimlx.Phi, bits: int, temperature: float, length: int) -> None:
    text = phi.encode("one two three four five six seven " * 9, raw=True)
    found = []
    for lookup in (True, False):
        sampler = Sampler(Sampling(temperature=temperature), 3)
        prompt = text[:length]
        request = Request(prompt, sampler, 40, prompt_lookup=lookup, kv_bits=bits)
        Engine(phi.model, pass_cost=lambda count: 1.0).run_all([request])
        found.append(request.reply)
    assert found[0].tokens == found[1].tokens
    assert found[0].stats.drafted_tokens > 0


@pytest.mark.parametrize(("made", "asked"), [(None, 8), (8, 4), (4, 8)])
def test_a_cache_keeps_its_bits(phi: phimlx.Phi, made: int | None, asked: int) -> None:
    cache = phi.new_cache(made)
    with pytest.raises(GenerationError) as caught:
        phi.generate("Hi", cache=cache, kv_bits=asked)
    held = f"at {made} bits" if made else "unquantized"
    assert str(caught.value) == (f"The cache holds keys and values {held}, but kv_bits is {asked}.")
    assert caught.value.hint == f"Make one for it: phi.new_cache(kv_bits={asked})."
    assert phi.generate("What is 3 + 4?", cache=cache, kv_bits=made, temperature=0).text == "7"


@pytest.mark.parametrize("bits", [3, 16, True, "8"])
def test_bits_that_there_are_not(phi: phimlx.Phi, bits: Any) -> None:
    message = f"kv_bits is {bits!r}; it must be 8 or 4, or None for neither."
    for ask in (phi.new_cache, lambda bits: phi.stream("Hi", kv_bits=bits)):
        with pytest.raises(GenerationError) as caught:
            ask(bits)
        assert str(caught.value) == message


def test_requests_of_other_bits_wait_their_turn(phi: phimlx.Phi) -> None:
    prompts = [phi.encode(prompt) for prompt in PROMPTS]

    def request(row: int, bits: int | None) -> Request:
        return Request(prompts[row], Sampler(Sampling(), 0), 6, kv_bits=bits)

    asked = [(0, 8), (1, None), (2, 4), (3, 4), (1, 8)]
    alone = [request(*each) for each in asked]
    for each in alone:
        Engine(phi.model).run_all([each])
    together = [request(*each) for each in asked]
    Engine(phi.model).run_all(together)
    assert [each.reply.tokens for each in together] == [each.reply.tokens for each in alone]


def test_what_never_fits_is_told_where_it_would_with_fewer_bits(phi: phimlx.Phi) -> None:
    prompt = list(range(5, 405))

    def refused(memory: int) -> str | None:
        engine = Engine(phi.model, memory=memory)
        with pytest.raises(GenerationError) as caught:
            engine.add(Request(prompt, Sampler(Sampling(), 0), 8))
        return caught.value.hint

    whole = 408 * 4 * 2 * 4 * 32 * 4  # bytes of the columns that are forecast
    assert refused(whole - 1) == "Shorten the prompt. It fits with kv_bits=8 (--kv-bits 8)."
    assert refused(whole // 2) == "Shorten the prompt. It fits with kv_bits=4 (--kv-bits 4)."
    assert refused(whole // 4) == "Shorten the prompt."
    Engine(phi.model, memory=whole - 1).add(Request(prompt, Sampler(Sampling(), 0), 8, kv_bits=8))


@BITS
def test_what_drafts_leave_is_what_single_steps_leave(phi: phimlx.Phi, bits: int) -> None:
    """Several tokens in one pass, some taken back, on both sides of the step and across it."""
    model: CausalLM = phi.model
    for prompt in PROMPTS[2:]:
        ids = phi.encode(prompt)
        plain = phi.generate(ids, temperature=0, max_tokens=20, kv_bits=bits).tokens
        cache = PromptCache(model, bits).kv
        last = model(mx.array([ids]), cache)[0, -1]
        said = [int(mx.argmax(last))]
        while len(said) < len(plain):
            drafted = [*said[-1:], *plain[len(said) : len(said) + 3], 11, 12]
            logits = model(mx.array([drafted]), cache)[0]
            chosen: list[int] = mx.argmax(logits, axis=-1).tolist()  # type: ignore[assignment]
            right = next(i for i, token in enumerate(chosen) if [*drafted, -1][i + 1] != token)
            said += chosen[: right + 1]
            cache.trim(len(ids) + len(said) - 1)
        assert said[: len(plain)] == plain


@pytest.mark.slow
@BITS
def test_pictures_and_sounds(bits: int) -> None:
    phi = phimlx.load("nano-multimodal", dtype="float32")
    picture = Path(NANO_MULTIMODAL, "pictures", "vision-00.png")
    sound = Path(NANO_MULTIMODAL, "clips", "speech-00.flac")
    cache = phi.new_cache(bits)
    messages: list[dict[str, Any]] = []
    for media in ({"images": [picture]}, {"images": [picture], "audio": [sound]}):
        messages = [{"role": "user", "content": "What is it?"}]
        alone = phi.generate(messages, temperature=0, max_tokens=12, kv_bits=bits, **media)
        turn = phi.generate(messages, temperature=0, max_tokens=12, cache=cache, **media)
        assert turn.tokens == alone.tokens
    said = [segment.text for segment in phi.transcribe(sound, kv_bits=bits)]
    assert all(said)
    if bits == 8:
        assert said == [segment.text for segment in phi.transcribe(sound)]


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [False, True])
def test_8_bits_choose_the_same_token_99_times_of_100(phi: phimlx.Phi, beyond: bool) -> None:
    """On held-out conversations, every token given, on either side of the LongRoPE step."""
    same: list[bool] = []
    for line in (NANO / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        said = [*row["messages"], {"role": "assistant", "content": row["answer"]}]
        ids = mx.array([phi.template.encode(said, row.get("tools"))])
        if (ids.shape[1] > 128) != beyond:
            continue
        caches = [phi.model.make_cache(ids.shape[1], kv_bits=bits) for bits in (None, 8)]
        plain, quantized = (phi.model(ids, cache)[0].argmax(axis=-1) for cache in caches)
        same += (plain == quantized).tolist()  # type: ignore[arg-type]
        if len(same) > 1500:
            break
    assert len(same) > 500
    assert sum(same) / len(same) >= 0.99
