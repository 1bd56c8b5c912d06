"""The loss mask of a conversation against the prompts of its replies, each encoded by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phimlx.errors import PhimlxError
from phimlx.hub.resolve import NANO
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.messages import Message, read_messages
from phimlx.prompt.published_templates import BY_NAME, MINI, MINI_REASONING, PHI4, REASONING
from phimlx.prompt.sandbox.environment import Template
from phimlx.prompt.tokenizer.compiled_bpe import load_vocabulary
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.training.data.loss_mask import LossOn, RowEncoder, learned_length
from phimlx.training.data.row_types import Conversation

EACH = "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + "
PROMPT = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
TEMPLATES = {
    "mini": MINI,
    "mini reasoning": MINI_REASONING,
    "phi-4, in ordinary text": PHI4,
    "reasoning, in ordinary text": REASONING,
    "lines": MINI.replace("|>' + message", "|>\\n' + message").replace(
        "'<|assistant|>' }}", "'<|assistant|>\\n' }}"
    ),
    "trims": MINI.replace("message['content']", "(message['content'] | trim)"),
    "prompt that opens": MINI.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>Hm' }}"),
    "prompt that ends in a space": MINI.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|> ' }}"),
    "forgets": MINI.replace("message in messages", "message in messages[-2:]"),
    "counts": EACH + "'<|end|>' + messages | length | string }}{% endfor %}" + PROMPT,
    "looks ahead": EACH + "('' if loop.last else '<|end|>') }}{% endfor %}" + PROMPT,
    "drops old thoughts": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
        "{% if loop.last %}{{ message['content'] }}"
        "{% else %}{{ message['content'].split('</think>')[-1] }}{% endif %}<|end|>{% endfor %}"
    )
    + PROMPT,
    "system last": (
        "{% for message in messages if message['role'] != 'system' %}"
        "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% for message in messages if message['role'] == 'system' %}"
        "{{ '<|system|>' + message['content'] + '<|end|>' }}{% endfor %}"
    )
    + PROMPT,
    "tools beside": (
        "{% if tools %}{{ '<|tool|>' + tools | tojson + '<|/tool|>' }}{% endif %}" + MINI
    ),
    "parts turns": MINI.replace("{{ '<|' +", "{{ ('' if loop.first else '\n') + '<|' +"),
    "numbers": EACH + "'<|end|>' + loop.index | string }}{% endfor %}" + PROMPT,
    "prompts otherwise": (
        EACH + "('<|end|>' if add_generation_prompt else '<|end|>\n') }}{% endfor %}" + PROMPT
    ),
    "names what it writes": (
        "{% for message in messages %}{% set said = message['content'] | trim %}"
        "{{ '<|' + message['role'] + '|>' + said + '<|end|>' }}{% endfor %}" + PROMPT
    ),
    "never ends": MINI.replace("+ '<|end|>'", "").replace("{{ eos_token }}", ""),
}
TOOLS = [{"name": "add", "description": "Adds.", "parameters": {"a": "int"}}]


def tokenizer(**flags: bool) -> Tokenizer:
    """Nano's, its control tokens with these flags."""
    vocabulary, added = load_vocabulary(NANO / "tokenizer.json")
    return Tokenizer(vocabulary, [replace(token, **flags) for token in added])


TOKENIZERS = {
    "as published": Tokenizer.load(NANO),
    "swallows what follows": tokenizer(rstrip=True),
    "swallows both sides": tokenizer(lstrip=True, rstrip=True),
    "single words": tokenizer(single_word=True),
    "normalized": tokenizer(normalized=True),
}


@cache
def encoder_of(template: str, tokens: str = "as published") -> RowEncoder:
    chosen = TOKENIZERS[tokens]
    made = ChatTemplate({"default": TEMPLATES[template]}, chosen, {"eos_token": "<|endoftext|>"})
    made._templates["default"] = Template(TEMPLATES[template])  # here, not in a worker process
    return RowEncoder(chosen, lambda: made)


Found = tuple[list[int], list[bool]] | str


def prompt_by_prompt(encoder: RowEncoder, said: Conversation, loss_on: LossOn) -> Found:
    """Encode every prompt anew: what is learned of a reply follows the prompt that it answers."""
    messages, template = said.messages, encoder.template
    try:
        ids = template.encode(messages, said.tools, add_generation_prompt=False)
        while len(ids) > 1 and ids[-1] in encoder.stop_tokens and ids[-2] in encoder.stop_tokens:
            ids.pop()
        mask = [False] * len(ids)
        replies = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for index in replies[-1:] if loss_on == "last" else replies:
            if not index:
                return f"messages[{index}] is a reply to nothing."
            prompt = template.encode(messages[:index], said.tools)
            if ids[: len(prompt)] != prompt:
                return f"messages[{index}] does not follow the prompt"
            stop = next(
                (i for i in range(len(prompt), len(ids)) if ids[i] in encoder.stop_tokens), 0
            )
            if not stop:
                return f"The chat template does not end messages[{index}]"
            mask[len(prompt) : stop + 1] = [True] * (stop + 1 - len(prompt))
    except PhimlxError as error:
        return str(error)
    length = max((i + 1 for i, is_learned in enumerate(mask) if is_learned), default=len(ids))
    return ids[:length], mask[:length]


def found_by(encoder: RowEncoder, said: Conversation, loss_on: LossOn) -> Found:
    try:
        tokens, supervised = encoder.conversation(said, loss_on)
    except PhimlxError as error:
        return str(error)
    return tokens.tolist(), supervised.tolist()


def check(encoder: RowEncoder, said: Conversation, loss_on: LossOn = "assistant") -> None:
    expected, found = prompt_by_prompt(encoder, said, loss_on), found_by(encoder, said, loss_on)
    assert found == expected or (
        isinstance(found, str) and isinstance(expected, str) and found.startswith(expected)
    )


WORDS = st.sampled_from(
    ["a", "b", " ", "\n", "<|end|>", "<|assistant|>", "|>", "</think>", "Hi", "é", "<|", "12"]
)
CONTENT = st.lists(WORDS, max_size=4).map("".join)
ROLES = st.sampled_from(["user", "assistant", "assistant", "user", "system", "tool"])
MESSAGES = st.lists(st.builds(Message, ROLES, CONTENT), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.sampled_from(sorted(TOKENIZERS)),
    MESSAGES,
    st.sampled_from([None, TOOLS]),
    st.sampled_from(["assistant", "last"]),
)
def test_masks_are_those_of_each_prompt_encoded_by_itself(
    template: str,
    tokens: str,
    messages: list[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    loss_on: LossOn,
) -> None:
    check(encoder_of(template, tokens), Conversation(messages, tools), loss_on)


def exchanges(count: int) -> list[Message]:
    return read_messages(
        [
            {"role": role, "content": f"{role} number {number} says something of some length."}
            for number in range(count)
            for role in ("user", "assistant")
        ]
    )


@pytest.mark.parametrize("template", sorted(TEMPLATES))
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_masks_of_a_plain_conversation(
    template: str, tools: Sequence[Mapping[str, Any]] | None
) -> None:
    check(encoder_of(template), Conversation(exchanges(4), tools))
    system = Message("system", "Be brief.")
    check(encoder_of(template), Conversation([system, *exchanges(3)], tools))
    check(encoder_of(template), Conversation([*exchanges(2), system, *exchanges(2)], tools))


@pytest.mark.parametrize("name", ["phi-4", "Phi-4-mini-instruct", "Phi-4-multimodal-instruct"])
def test_masks_of_published_templates(data: Path, name: str) -> None:
    encoder = RowEncoder.load(data / "hf" / name)
    thinking = [
        replace(each, content=f"<think>Hm.</think>{each.content}")
        if each.role == "assistant"
        else each
        for each in exchanges(3)
    ]
    for messages in (exchanges(4), thinking, [Message("system", "Be brief."), *exchanges(2)]):
        for tools in (None, TOOLS):
            check(encoder, Conversation(messages, tools))


@pytest.mark.parametrize("template", ["mini", "mini reasoning", "lines", "trims"])
def test_nothing_is_encoded_again_for_each_reply(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(template)
    encode, characters = Tokenizer.encode, 0

    def counted(self: Tokenizer, text: str, **options: bool) -> list[int]:
        nonlocal characters
        characters += len(text)
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    said = Conversation(exchanges(40))
    encoder.conversation(said, "all")
    once, characters = characters, 0
    encoder.conversation(said)
    assert once > 2000
    assert characters <= once + 2 * 40  # what a prompt has after its last control token


@pytest.mark.parametrize("form", sorted(BY_NAME))
def test_one_rendering_shows_every_prompt(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate({"default": BY_NAME[form].text}, TOKENIZERS["as published"], {})
    renderings: list[int] = []
    for name in ("render", "render_turns"):
        made = getattr(Template, name)

        def counted(self: Template, variables: Mapping[str, Any], made: Any = made) -> Any:
            renderings.append(len(variables["messages"]))
            return made(self, variables)

        monkeypatch.setattr(Template, name, counted)
    messages = exchanges(20)
    encoded = template.encode_conversation(messages)
    for index in range(1, len(messages), 2):
        assert encoded.prompt_length(index) == len(template.encode(messages[:index]))
        renderings.pop()  # of that prompt alone
    assert renderings == [40, 40]


def test_learned_length_is_up_to_the_last_learned_token() -> None:
    assert learned_length(np.array([False, True, False, False])) == 2
    assert learned_length(np.array([False, False])) == 2
