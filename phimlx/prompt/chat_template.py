"""A conversation to the token ids that its model was trained on.

Knows the model by its folder's template and tokenizer alone; nothing of weights or generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import PromptError, TokenizerError
from phimlx.prompt.media_parts import NAMES, Part, Placeholders, no_media
from phimlx.prompt.messages import Message, read_messages
from phimlx.prompt.published_templates import (
    folder_templates,
    published_template,
    read_settings,
)
from phimlx.prompt.sandbox.escape import Shield
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.prompt.tools import calls_json, read_tools, tools_json, wrapped_calls

if TYPE_CHECKING:
    from phimlx.prompt.sandbox.environment import Template

CALL, END_CALL = "<|tool_call|>", "<|/tool_call|>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
PROBE = "qpzvkxw"


class ChatTemplate:
    """Turns conversations into prompts.

    Text from outside never becomes a control token: whatever a message, a tool or a name spells is
    encoded as ordinary text, while the template's own control tokens are real, and ids are those of
    the rendered text as a whole. One exception: `<think>` and `</think>` in an *assistant's*
    message are the tokens that the model wrote there.

    Tools go where the template takes them. A template that reads a variable `tools` gets the list
    in OpenAI's form. One that reads `message['tools']` (Phi-4-mini and its kin) gets the JSON of
    the bare functions in the first system message, or in an added one without words of its own:
    `<|system|>{content}<|tool|>{tools}<|/tool|><|end|>`, the published format. For any other
    (phi-4) tools are a PromptError, for the model was not trained to call them.

    In the history, calls are handed to a template that reads `tool_calls`; elsewhere they follow
    the content as the model writes them: `<|tool_call|>`, their JSON list, `<|/tool_call|>`.
    Results are messages of the role tool, which Phi-4-mini's template renders as
    `<|tool|>{content}<|end|>`. A message that the template leaves out is a PromptError.

    A picture or a sound is its slot token where it stands among the parts of a message, and a
    line break parts it from what follows: `<|user|><|image_1|>\\n<|audio_1|>\\n{text}<|end|>`.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: Tokenizer,
        special: Mapping[str, str],
        slots: Placeholders | None = None,
    ) -> None:
        """`sources`: templates by name, of which "default" renders all but conversations with
        tools where there is a "tool_use"; `special`: bos_token and the like, by name; `slots`:
        those of a model that takes more than text."""
        self._sources = dict(sources)
        self._templates: dict[str, Template] = {}
        self._tokenizer = tokenizer
        self._special = dict(special)
        self._slots = slots
        tokens = tokenizer.control_tokens
        self._shield = Shield(tokens)
        self._reply_shield = Shield([token for token in tokens if token not in (THINK, END_THINK)])

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        model_name: str | None = None,
        slots: Placeholders | None = None,
    ) -> ChatTemplate:
        """The folder's own template, or else the published one for its tokenizer.

        `model_name` helps to tell a reasoning model where the folder does not say.
        Raises PromptError where there is neither.
        """
        settings = read_settings(folder / "tokenizer_config.json")
        special = {"eos_token": "<|endoftext|>"} | {
            name: text for name in SPECIAL if (text := _content(settings.get(name))) is not None
        }
        sources = folder_templates(folder)
        if not sources:
            names = (
                model_name,
                folder.name,
                read_settings(folder / "config.json").get("_name_or_path"),
            )
            known = published_template(tokenizer.control_tokens, map(str, filter(None, names)))
            if known is None:
                raise PromptError(
                    f"{folder} has no chat template, and its tokenizer is no Phi-4 chat model's.",
                    hint="Give the prompt as raw text, without a template.",
                )
            sources = {"default": known}
        return cls(sources, tokenizer, special, slots)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of the conversation.

        With `add_generation_prompt` they end where the assistant's reply begins. A picture or a
        sound is one slot token; `phimlx.prompt.media_parts.widen` gives it as many as it needs.
        Raises PromptError where a message, a tool or the template is at fault.
        """
        text, mark = self._render(messages, tools, add_generation_prompt)
        ids: list[int] = []
        for piece in self._tokenizer.split(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._tokenizer.encode(self._shield.lift(piece, mark))
        return ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The text that `encode` encodes, for people to read.

        It does not tell a control token from text that spells one. Pictures and sounds are
        numbered from one end of the conversation to the other.
        """
        text, mark = self._render(messages, tools, add_generation_prompt)
        for kind, spelled in self._slot_names.items():
            first, *others = text.split(spelled)
            text = first + "".join(
                f"<|{kind}_{number}|>{following}" for number, following in enumerate(others, 1)
            )
        return self._shield.lift(text, mark)

    @cached_property
    def starts_in_reasoning(self) -> bool:
        """Whether the prompt itself opens the reasoning, so that a reply begins inside it."""
        return self.render([{"role": "user", "content": PROBE}]).rstrip().endswith(THINK)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
    ) -> tuple[str, str]:
        """The rendered text with its marks, and the mark."""
        conversation = read_messages(messages)
        functions = read_tools(tools) if tools else []
        template = self._template("tool_use" if functions else "default")
        if functions and "tools" not in template.variables:
            conversation = _offer(conversation, tools_json(functions))
        self._check_places(conversation, template)
        mark = self._shield.choose_mark(_texts(conversation, functions, template.source))
        variables: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        if functions and "tools" in template.variables:
            wrapped = [{"type": "function", "function": function} for function in functions]
            variables["tools"] = self._shield.guard(wrapped, mark)
        variables |= self._special
        turns = [self._turn(message, template, mark) for message in conversation]
        text = template.render(variables | {"messages": turns})
        for index, message in enumerate(conversation):
            content = turns[index]["content"].strip()
            if message.role != "assistant" and content not in text:
                # Left out, or only changed? A plain word in its place tells.
                probe = [*turns[:index], turns[index] | {"content": PROBE}, *turns[index + 1 :]]
                probed = template.render(variables | {"messages": probe})
                if PROBE not in probed.lower():
                    raise PromptError(
                        f"messages[{index}] would be left out: the model's chat template has no "
                        f"place for the role {message.role} there.",
                        hint="Put what it says into a user's message.",
                    )
        return text, mark

    def _template(self, name: str) -> Template:
        name = name if name in self._sources else "default"
        if name not in self._templates:
            from phimlx.prompt.sandbox.environment import Template

            self._templates[name] = Template(self._sources[name])
        return self._templates[name]

    def _check_places(self, conversation: Sequence[Message], template: Template) -> None:
        """Raises PromptError where there is no place for media, tools or calls."""
        for index, message in enumerate(conversation):
            if message.parts and self._slots is None:
                raise no_media("The model")
            if message.tools is not None and "tools" not in template.keys:
                raise PromptError(
                    "The model's chat template has no place for tools: "
                    "it was not trained to call them.",
                    hint="Use a model that was, such as phi-4-mini, or describe them in a message.",
                )
            if message.tool_calls and not self._takes_calls(template):
                raise PromptError(
                    f"messages[{index}] calls a tool, and the model's chat template has no place "
                    "for calls.",
                    hint="Use a model that was trained to call tools, such as phi-4-mini.",
                )

    def _takes_calls(self, template: Template) -> bool:
        return "tool_calls" in template.keys or CALL in self._tokenizer.control_tokens

    @cached_property
    def _slot_names(self) -> dict[str, str]:
        """How a rendered text spells the slot tokens, by kind."""
        names = {token: name for name, token in self._tokenizer.control_tokens.items()}
        slots = self._slots or {}
        return {kind: names[token] for kind, token in slots.items() if token in names}

    def _place(self, part: Part, shield: Shield, mark: str) -> str:
        """A part of a message as the template sees it."""
        if part.kind == "text":
            return shield.guard(part.value, mark, inside=True)
        if part.kind not in self._slot_names:
            raise TokenizerError(
                f"The tokenizer has no token that stands for a {NAMES[part.kind]}.",
                hint="Get the tokenizer files that belong to the model into its folder.",
            )
        return self._slot_names[part.kind]

    def _turn(self, message: Message, template: Template, mark: str) -> dict[str, Any]:
        """A message as the template sees it, its strings marked."""
        shield = self._reply_shield if message.role == "assistant" else self._shield
        parts = message.parts or (Part("text", message.content),)
        turn: dict[str, Any] = {
            "role": message.role,
            "content": "".join(
                ("\n" if before.kind != "text" else "") + self._place(part, shield, mark)
                for before, part in pairwise((Part("text", ""), *parts))
            ),
        }
        for key in ("tools", "name", "tool_call_id"):
            if getattr(message, key) is not None:
                turn[key] = self._shield.guard(getattr(message, key), mark, inside=True)
        if message.tool_calls and "tool_calls" in template.keys:
            turn["tool_calls"] = self._shield.guard(wrapped_calls(message.tool_calls), mark)
        elif message.tool_calls:
            calls = self._shield.guard(calls_json(message.tool_calls), mark)
            turn["content"] += CALL + calls + END_CALL
        return turn


def _offer(conversation: list[Message], tools: str) -> list[Message]:
    """The conversation with the tools in its first system message."""
    place = next((i for i, message in enumerate(conversation) if message.role == "system"), None)
    if place is None:
        return [Message("system", "", tools=tools), *conversation]
    if conversation[place].tools is not None:
        raise PromptError(
            f"messages[{place}] brings tools, and tools are given beside the messages as well.",
            hint="Give the tools in one of the two places.",
        )
    offered = replace(conversation[place], tools=tools)
    return [*conversation[:place], offered, *conversation[place + 1 :]]


def _content(token: Any) -> str | None:
    """The text of a special token, which tokenizer_config.json may give as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _texts(
    conversation: Sequence[Message], functions: Sequence[Mapping[str, Any]], source: str
) -> list[str]:
    """All text that may come together in a prompt."""
    texts = [source, tools_json(functions)]
    for message in conversation:
        given = (message.content, message.tools, message.name, message.tool_call_id)
        texts += [text for text in given if text is not None]
        texts.append(calls_json(message.tool_calls))
    return texts
