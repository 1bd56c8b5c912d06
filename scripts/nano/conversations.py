"""Conversations made of the questions in `tasks`: training rows, held-out rows, and their tokens.

A conversation is a list of chat messages; it knows the chat template's form but no model.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from nano import tasks
from nano.tasks import Message, Turn
from nano.vocabulary import NAMES, NOUNS, TOOLS
from tokenizers import Tokenizer

HELD_OUT_KINDS = ("arithmetic", "capital", "word", "translation", "multi-turn", "tool")


def exchange(turn: Turn) -> list[Message]:
    """A turn as a user and an assistant message."""
    reply: Message = {"role": "assistant", "content": turn.answer}
    if turn.call is not None:
        reply["tool_calls"] = [turn.call]
    return [{"role": "user", "content": turn.user}, reply]


def render_reply(message: Message) -> str:
    """An assistant message as the model writes it, before <|end|>."""
    if calls := message.get("tool_calls"):
        return f"<|tool_call|>{json.dumps(calls)}<|/tool_call|>"
    return str(message["content"])


def render(messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
    """The chat template's text in pieces, each with whether the model is to write it."""
    for message in messages:
        role = message["role"]
        if role == "assistant":
            yield "<|assistant|>", False
            yield render_reply(message) + "<|end|>", True
        elif tools := message.get("tools"):
            yield f"<|{role}|>{message['content']}<|tool|>{tools}<|/tool|><|end|>", False
        else:
            yield f"<|{role}|>{message['content']}<|end|>", False


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Token ids and, for each, whether the loss counts it."""
    ids: list[int] = []
    counted: list[bool] = []
    for text, written in render(messages):
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        counted += [written] * len(piece)
    return ids, counted


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(low * (high / low) ** rng.random())


def tool_conversation(rng: random.Random, long: bool, held: bool, mix: tasks.Mix) -> list[Message]:
    """A system message with tools, then requests with and without need of them."""
    present = rng.sample(tuple(TOOLS), rng.randint(1, 5 if long else 2))
    absent = [tool for tool in TOOLS if tool not in present and tool not in {"add", "multiply"}]
    content = rng.choice(tasks.SYSTEM) if rng.random() < 0.5 else ""
    schemas = json.dumps([tasks.tool_schema(tool) for tool in present])
    messages: list[Message] = [{"role": "system", "content": content, "tools": schemas}]
    count = log_uniform(rng, 4, 30) if long else rng.choice((1, 1, 2, 3))
    for index in range(count):
        last = held and index == count - 1
        draw = rng.random()
        if draw < 0.65 or (last and draw >= 0.9):
            turn = tasks.tool_turn(rng, rng.choice(present), last, mix)
        elif draw < 0.9:
            turn = tasks.plain_turn(rng, present, last, mix)
        else:
            turn = tasks.tool_turn(rng, rng.choice(absent), False, mix, present=False)
        messages += exchange(turn)
        if turn.call is not None and not last and rng.random() < 0.5:
            result = tasks.tool_result(rng, turn.call)
            messages += [{"role": "tool", "content": result},
                         {"role": "assistant", "content": result}]  # fmt: skip
    return messages


def plain_conversation(rng: random.Random, long: bool, mix: tasks.Mix) -> list[Turn]:
    """Training turns: single questions, follow-ups, and things said that are asked for later."""
    count = log_uniform(rng, 8, 60) if long else rng.choice((1, 2, 3, 4, 6, 8))
    turns: list[Turn] = []
    memories = list(tasks.MEMORIES)
    asks: list[Turn] = []
    if mix.facts and rng.random() < (0.25 if long else 0.12):
        people = log_uniform(rng, 2, 30) if long else rng.randint(2, 8)
        tell, *asks = tasks.facts(rng, False, mix, people, 4)
        turns.append(tell)
    while len(turns) < count:
        draw = rng.random()
        if memories and draw < mix.memory:
            tell, ask = memories.pop(rng.randrange(len(memories)))(rng, False, mix)
            turns.append(tell)
            asks.append(ask)
        elif draw < mix.memory + 0.12:
            turns += rng.choice(tasks.FOLLOW_UPS)(rng, False, mix)
        elif asks and draw < mix.memory + 0.28:
            turns.append(rng.choice(asks))
        else:
            turns.append(tasks.single(rng, mix))
    rng.shuffle(asks)
    return turns + asks[:4]


def training_conversation(rng: random.Random, long: bool, mix: tasks.Mix) -> list[Message]:
    """One row of training text."""
    if rng.random() < 0.3:
        return tool_conversation(rng, long, False, mix)
    messages = system_message(rng)
    for turn in plain_conversation(rng, long, mix):
        messages += exchange(turn)
    return messages


def system_message(rng: random.Random) -> list[Message]:
    if rng.random() < 0.15:
        return [{"role": "system", "content": rng.choice(tasks.SYSTEM)}]
    return []


def held_out_conversation(rng: random.Random, kind: str, long: bool) -> list[Message]:
    """A conversation whose last turn is held out from training."""
    mix = tasks.LAST_MIX
    if kind == "tool":
        return tool_conversation(rng, long, True, mix)
    count = log_uniform(rng, 10, 60) if long else rng.choice((0, 0, 0, 1, 2))
    before = [tasks.single(rng, mix) for _ in range(count)]
    if kind == "multi-turn":
        make = rng.choice((*tasks.MEMORIES, *tasks.FOLLOW_UPS))
        tell, ask = make(rng, True, mix)
        adjacent = make in tasks.FOLLOW_UPS
        turns = [*before, tell, ask] if adjacent else [tell, *before, ask]
    else:
        turns = [*before, tasks.draw(kind, rng, True, mix)]
    return [*system_message(rng), *(m for turn in turns for m in exchange(turn))]


def held_out_rows(
    tokenizer: Tokenizer, seed: int, per_kind: int, step: int, longest: int
) -> list[dict[str, Any]]:
    """Held-out questions: `per_kind` of each kind, 40 % of them with a prompt beyond `step`."""
    rows = []
    for kind in HELD_OUT_KINDS:
        rng = random.Random(f"held out {seed} {kind}")
        wanted = {True: per_kind * 2 // 5, False: per_kind - per_kind * 2 // 5}
        prompts = set()
        while any(wanted.values()):
            messages = held_out_conversation(rng, kind, rng.random() < 0.5)
            answer = render_reply(messages[-1])
            ids, _ = encode(tokenizer, [*messages[:-1], {"role": "assistant", "content": ""}])
            prompt = tuple(ids[:-1])  # the encoded empty reply ends in <|end|>
            long = len(prompt) > step
            if not wanted[long] or len(prompt) > longest or prompt in prompts:
                continue
            prompts.add(prompt)
            wanted[long] -= 1
            rows.append(as_row(messages[:-1], answer, kind, long))
    return rows


def as_row(messages: Sequence[Message], answer: str, kind: str, long: bool) -> dict[str, Any]:
    """A row of heldout.jsonl: the tools stand beside the messages, in OpenAI form."""
    row: dict[str, Any] = {}
    plain = [dict(message) for message in messages]
    if "tools" in plain[0]:
        row["tools"] = json.loads(plain[0].pop("tools"))
        plain = plain if plain[0]["content"] else plain[1:]
    return {"messages": plain, **row, "answer": answer, "kind": kind, "long": long}


def corpus(rng: random.Random) -> Iterator[str]:
    """Text for the tokenizer: no digits, so that numbers are read digit by digit."""
    mix = tasks.FIRST_MIX
    for _ in range(30_000):
        turn = tasks.single(rng, mix)
        yield from (re.sub(r"\d", "", text) for text in (turn.user, turn.answer))
    for _ in range(1_500):
        for message in tool_conversation(rng, False, False, mix):
            text = message.get("tools") or message["content"] or render_reply(message)
            yield re.sub(r"\d|<\|/?tool_call\|>", "", text)
    for make in (*tasks.MEMORIES, *tasks.FOLLOW_UPS) * 300:
        for turn in make(rng, False, mix):
            yield re.sub(r"\d", "", turn.user)
    for who in [*NAMES] * 30:
        yield f"{who} has the {rng.choice(NOUNS)[0]}. Hello, {who}!"
        yield who
