"""Turns a conversation into the token ids that its model was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.errors import PromptError, TokenizerError
from phimlx.prompt.media_parts import NAMES, ContentPart, PlaceholderTokens, no_media
from phimlx.prompt.messages import Message, read_messages
from phimlx.prompt.published_templates import (
    BY_TEXT,
    THINK,
    folder_templates,
    is_known,
    named_template,
    published_template,
    read_settings,
    reasoning_modes,
)
from phimlx.prompt.rendering import EncodedConversation, Rendering
from phimlx.prompt.sandbox.escape import ControlTokenEscaper
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from phimlx.prompt.tools import Tools, calls_json, read_tools, tools_json, wrapped_calls

if TYPE_CHECKING:
    from phimlx.prompt.sandbox.environment import Template
    from phimlx.prompt.sandbox.isolated import IsolatedTemplate

    AnyTemplate = Template | IsolatedTemplate

CALL, END_CALL = "<|tool_call|>", "<|/tool_call|>"
END_THINK = "</think>"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


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

    A picture or a sound is its placeholder token where it stands among the parts of a message, with
    nothing between it and what follows but `after_media`: `<|user|><|image_1|><|audio_1|>{text}
    <|end|>`, as the card of Phi-4-multimodal has it.

    Attributes:
        stop: strings that end a reply, beside the tokens that do; none but for base models.
        modes: texts that begin a reply that reasons ("on") and one that does not ("off"), where the
            template tells the model of both; else empty.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: Tokenizer,
        special: Mapping[str, str],
        placeholders: PlaceholderTokens | None = None,
        after_media: str = "",
    ) -> None:
        """`sources`: templates by name, of which "default" renders all but conversations with
        tools where there is a "tool_use"; `special`: bos_token and the like, by name;
        `placeholders`: those of a model that takes more than text; `after_media`: what parts a
        picture or a sound from what follows it, unless that begins so itself."""
        self._sources = dict(sources)
        self._templates: dict[str, AnyTemplate] = {}
        self._tokenizer = tokenizer
        self._special = dict(special)
        self._placeholders = placeholders
        self._after_media = after_media
        self.modes = reasoning_modes(sources["default"])
        known = BY_TEXT.get(sources["default"])
        self.stop: tuple[str, ...] = known.stop if known else ()
        tokens = tokenizer.control_tokens
        self._escaper = ControlTokenEscaper(tokens)
        self._reply_escaper = ControlTokenEscaper(
            [token for token in tokens if token not in (THINK, END_THINK, *self.modes.values())]
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        model_name: str | None = None,
        placeholders: PlaceholderTokens | None = None,
        form: str | None = None,
        after_media: str = "",
    ) -> ChatTemplate:
        """Load the folder's own template, or else the published one for its tokenizer and name.

        `form` names a published form to be used instead, such as "phi-2-chat" for a base model
        whose card has several; `model_name` helps to tell models of one tokenizer apart.
        Raises PromptError where there is no template, or no such form.
        """
        settings = read_settings(folder / "tokenizer_config.json")
        special = {"eos_token": "<|endoftext|>"} | {
            name: text for name in SPECIAL if (text := _content(settings.get(name))) is not None
        }
        sources = {"default": named_template(form).text} if form else folder_templates(folder)
        if not sources:
            names = (
                model_name,
                folder.name,
                read_settings(folder / "config.json").get("_name_or_path"),
            )
            known = published_template(tokenizer.control_tokens, map(str, filter(None, names)))
            if known is None:
                raise PromptError(
                    f"{folder} has no chat template, and its tokenizer is no Phi chat model's.",
                    hint="Give the prompt as raw text, without a template.",
                )
            sources = {"default": known.text}
        return cls(sources, tokenizer, special, placeholders, after_media)

    @property
    def reasons(self) -> bool:
        """Whether the model was trained to reason, as its template or its tokenizer tells."""
        return THINK in self._sources["default"] or THINK in self._tokenizer.control_tokens

    @property
    def text(self) -> str:
        """The template itself, for conversations without tools."""
        return self._sources["default"]

    @property
    def takes_tools(self) -> bool:
        """Whether it has a place for tools."""
        template = self._template("tool_use")
        return "tools" in template.variables or "tools" in template.keys

    def encode(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        opening: str = "",
    ) -> list[int]:
        """Token ids of the conversation.

        With `add_generation_prompt` they end where the assistant's reply begins, or behind
        `opening`, the text that it is to begin with; with `continue_final_message` where the words
        of the last message end, which is the assistant's.
        A picture or a sound is one placeholder token, of which `media_parts.expand_placeholders`
        makes as many as it needs.
        Raises PromptError where a message, a tool or the template is at fault.
        """
        if continue_final_message:
            messages = read_messages(messages)
            _check_open(messages[-1])
        rendering = self._prepare(messages, tools)
        if continue_final_message:
            text = rendering.open_text()
        else:
            text = rendering.complete_text(add_generation_prompt) + opening
        pieces = rendering.encode(text)
        return [token for ids, _, _ in pieces for token in ids]

    def render(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Text of the conversation, for a person to read: `encode` gives what the model reads.

        Pictures and sounds are numbered tags, as the model's card writes them: `<|image_1|>`.
        Raises PromptError where a message, a tool or the template is at fault.
        """
        rendering = self._prepare(messages, tools)
        text = rendering.complete_text(add_generation_prompt)
        names = {token: name for name, token in self._tokenizer.control_tokens.items()}
        kinds = {token: kind for kind, token in (self._placeholders or {}).items()}
        numbers = {kind: count(1) for kind in kinds.values()}
        return "".join(
            rendering.escaper.unescape(piece, rendering.mark)
            if isinstance(piece, str)
            else f"<|{kind}_{next(numbers[kind])}|>"
            if (kind := kinds.get(piece))
            else names[piece]
            for piece, _ in self._tokenizer.split_with_ends(text, 0)
        )

    def encode_conversation(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Tools | None = None,
    ) -> EncodedConversation:
        """Encode a conversation up to its end, in which the prompts of its replies can be found.

        Raises PromptError as `encode`.
        """
        rendering = self._prepare(messages, tools)
        # A system message that only holds tools may have come before the others.
        added = len(rendering.turns) - len(messages)
        return EncodedConversation(
            rendering, added, lambda index: self.encode(messages[:index], tools)
        )

    def _prepare(
        self,
        messages: Sequence[Mapping[str, Any] | Message],
        tools: Tools | None,
    ) -> Rendering:
        """Check a conversation and mark its strings."""
        conversation = read_messages(messages)
        functions = read_tools(tools) if tools else []
        template = self._template("tool_use" if functions else "default")
        if functions and "tools" not in template.variables:
            conversation = _offer(conversation, tools_json(functions))
        self._check_places(conversation, template)
        mark = self._escaper.choose_mark(_texts(conversation, functions, template.source))
        variables: dict[str, Any] = dict(self._special)
        if functions and "tools" in template.variables:
            wrapped = [{"type": "function", "function": function} for function in functions]
            variables["tools"] = self._escaper.escape(wrapped, mark)
        turns = [self._turn(message, template, mark) for message in conversation]
        return Rendering(template, variables, turns, mark, self._tokenizer, self._escaper)

    def _template(self, name: str) -> AnyTemplate:
        name = name if name in self._sources else "default"
        if name not in self._templates:
            self._templates[name] = _compile(self._sources[name])
        return self._templates[name]

    def _check_places(self, conversation: Sequence[Message], template: AnyTemplate) -> None:
        """Raises PromptError where there is no place for media, tools or calls."""
        for index, message in enumerate(conversation):
            if message.parts and self._placeholders is None:
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

    def _takes_calls(self, template: AnyTemplate) -> bool:
        return "tool_calls" in template.keys or CALL in self._tokenizer.control_tokens

    @cached_property
    def _placeholder_names(self) -> dict[str, str]:
        """Spellings of the placeholder tokens, by kind of media."""
        names = {token: name for name, token in self._tokenizer.control_tokens.items()}
        tokens = self._placeholders or {}
        return {kind: names[token] for kind, token in tokens.items() if token in names}

    def _place(self, part: ContentPart, escaper: ControlTokenEscaper, mark: str) -> str:
        """A part of a message as the template sees it."""
        if part.kind == "text":
            return escaper.escape(part.value, mark, inside=True)
        if part.kind not in self._placeholder_names:
            raise TokenizerError(
                f"The tokenizer has no token that stands for a {NAMES[part.kind]}.",
                hint="Get the tokenizer files that belong to the model into its folder.",
            )
        return self._placeholder_names[part.kind]

    def _joined(self, parts: Sequence[ContentPart], escaper: ControlTokenEscaper, mark: str) -> str:
        """The parts of a message as the template sees them together."""
        placed = [self._place(part, escaper, mark) for part in parts]
        for index, part in enumerate(parts[:-1]):
            if part.kind != "text" and not placed[index + 1].startswith(self._after_media):
                placed[index] += self._after_media
        return "".join(placed)

    def _turn(self, message: Message, template: AnyTemplate, mark: str) -> dict[str, Any]:
        """A message as the template sees it, its strings marked."""
        escaper = self._reply_escaper if message.role == "assistant" else self._escaper
        parts = message.parts or (ContentPart("text", message.content),)
        turn: dict[str, Any] = {
            "role": message.role,
            "content": self._joined(parts, escaper, mark),
        }
        for key in ("tools", "name", "tool_call_id"):
            if getattr(message, key) is not None:
                turn[key] = self._escaper.escape(getattr(message, key), mark, inside=True)
        if message.tool_calls and "tool_calls" in template.keys:
            turn["tool_calls"] = self._escaper.escape(wrapped_calls(message.tool_calls), mark)
        elif message.tool_calls:
            calls = self._escaper.escape(calls_json(message.tool_calls), mark)
            turn["content"] += CALL + calls + END_CALL
        return turn


def _compile(source: str) -> AnyTemplate:
    """A known template, which needs no limits, or else one that the worker process renders."""
    if is_known(source):
        from phimlx.prompt.sandbox.environment import Template

        return Template(source)
    from phimlx.prompt.sandbox.isolated import IsolatedTemplate

    return IsolatedTemplate(source)


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


def _check_open(message: Message) -> None:
    """Raises PromptError where a reply cannot go on from the message."""
    problem = f"is of the role {message.role}" if message.role != "assistant" else "calls a tool"
    if message.role != "assistant" or message.tool_calls:
        raise PromptError(
            f"The last message {problem}, so that no reply can continue it.",
            hint="Let the conversation end with text of the assistant.",
        )


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
