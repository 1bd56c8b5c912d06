"""The bodies that Anthropic's clients send, checked and put into no dialect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from phimlx.server.errors import bad_request
from phimlx.server.http import MAX_MESSAGES, MAX_STOPS, Body, StopString
from phimlx.server.service import Ask

PARAGRAPH = "\n\n"  # between blocks of text

# Fields of the API that only Anthropic's own servers can serve.
REFUSED = {
    "container": "code runs in no container here",
    "mcp_servers": "MCP servers are not called from here; call them from the client",
    "inference_geo": "the model runs on this machine",
    "user_profile_id": "there are no user profiles here",
    "workspace_id": "there are no workspaces here",
}
# Edits of the context that change nothing, for reasoning of earlier turns is left out anyway.
REASONS = {"enabled": True, "adaptive": None, "disabled": False}
"""Whether a model that leaves it open thinks first, by the type of `thinking`."""

EDITS = ("clear_thinking_20251015",)


CHOICES = {"auto": "auto", "any": "required", "none": "none"}  # of tools, and in our words


class CacheControl(Body):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: str | None = None


class Block(Body):
    cache_control: CacheControl | None = None


def _as_blocks(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


class Base64Source(Body):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlSource(Body):
    type: Literal["url"]
    url: str


class ImageBlock(Block):
    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]

    def part(self) -> dict[str, Any]:
        """Make a part of a message."""
        source = self.source
        if isinstance(source, Base64Source):
            url = f"data:{source.media_type};base64,{source.data}"
        else:
            url = source.url
        return {"type": "image_url", "image_url": {"url": url}}


class TextSource(Body):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class DocumentBlock(Block):
    """A document, of plain text."""

    type: Literal["document"]
    source: TextSource
    title: str | None = None
    context: str | None = None

    @property
    def text(self) -> str:
        return PARAGRAPH.join(filter(None, (self.title, self.context, self.source.data)))


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Body):
    type: Literal["redacted_thinking"]
    data: str


Said = Annotated[TextBlock | ImageBlock | DocumentBlock, Field(discriminator="type")]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[list[Said], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    is_error: bool = False


AnyBlock = Annotated[
    TextBlock
    | ImageBlock
    | DocumentBlock
    | ToolUseBlock
    | ToolResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock,
    Field(discriminator="type"),
]
BLOCKS: Mapping[str, tuple[type[Body], ...]] = {
    "system": (TextBlock,),
    "user": (TextBlock, ImageBlock, DocumentBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
}


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: Annotated[list[AnyBlock], BeforeValidator(_as_blocks)]


class Tool(Block):
    """A tool that the client runs."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    input_examples: list[dict[str, Any]] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_custom(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind not in (None, "custom"):
            raise ValueError(f"only tools of the type custom are known, not {str(kind)[:100]}")
        return value

    def function(self) -> dict[str, Any]:
        """Put it into the form of `phimlx.prompt.tools`."""
        made = {
            "name": self.name,
            "description": self.description,
            "parameters": self.input_schema,
            "examples": self.input_examples,
        }
        return {name: value for name, value in made.items() if value is not None}


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1024)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Body):
    user_id: str | None = None


class PromptBody(Body):
    """What makes a prompt: the body of `count_tokens`."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Annotated[list[TextBlock], BeforeValidator(_as_blocks)] = Field(default_factory=list)
    tools: list[Tool] = Field(default=[], max_length=128)
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking = Thinking(type="disabled")
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None
    context_management: dict[str, Any] | None = None
    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    container: Any = None
    mcp_servers: Any = None
    inference_geo: Any = None
    user_profile_id: Any = None
    workspace_id: Any = None

    def ask(self) -> Ask:
        """Say it in no dialect. Raises RequestError for what cannot be honoured."""
        self._check()
        reasons = REASONS[self.thinking.type]
        return Ask(
            self.model, self.prompt(), self.options(), fit=True, reasons=reasons, insists=False
        )

    def options(self) -> dict[str, Any]:
        """Choose the options of `GenerationOptions` that bear on the prompt."""
        return {
            "tools": [tool.function() for tool in self.tools] or None,
            "continue_final_message": self.messages[-1].role == "assistant",
        }

    def prompt(self) -> list[dict[str, Any]]:
        """Put the conversation into the form of `phimlx.prompt.messages`.

        Turns of one role in a row are one turn, and reasoning of earlier turns is left out, as
        Anthropic has it. A tool's result is a turn of its own; a picture in it goes into the
        user's turn behind, for no template has a place for it in the result.
        """
        turns = []
        if self.system:
            turns.append({"role": "system", "content": _text(self.system)})
        for role, group in groupby(self.messages, lambda message: message.role):
            blocks = [block for message in group for block in message.content]
            turns += _user(blocks) if role == "user" else [_turn(role, blocks)]
        return turns

    def _check(self) -> None:
        for name, reason in REFUSED.items():
            if getattr(self, name):
                raise bad_request(f"{name}: {reason}.", name)
        edits = (self.context_management or {}).get("edits") or []
        for edit in edits if isinstance(edits, list) else [edits]:
            kind = edit.get("type") if isinstance(edit, dict) else edit
            if kind not in EDITS:
                raise bad_request(
                    f"context_management: the edit {str(kind)[:100]} is not made here.",
                    "context_management",
                )
        self._check_blocks()
        self._check_tools()

    def _check_blocks(self) -> None:
        called: set[str] = set()
        for index, message in enumerate(self.messages):
            for number, block in enumerate(message.content):
                place = f"messages.{index}.content.{number}"
                if not isinstance(block, BLOCKS[message.role]):
                    raise bad_request(
                        f"{place}: a message of the role {message.role} has no blocks of the type "
                        f"{block.type}.",
                        place,
                    )
                if isinstance(block, ToolUseBlock):
                    called.add(block.id)
                if isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                    raise bad_request(
                        f"{place}: no tool_use before it has the id {block.tool_use_id[:100]}.",
                        place,
                    )
            if not message.content and message.role != "assistant":
                raise bad_request(
                    f"messages.{index}: a message of the role {message.role} must not be empty.",
                    f"messages.{index}",
                )

    def _check_tools(self) -> None:
        choice = self.tool_choice
        if choice.type == "tool" and choice.name not in {tool.name for tool in self.tools}:
            raise bad_request(
                "tool_choice: there is no tool of that name among the tools.", "tool_choice"
            )
        if choice.type == "any" and not self.tools:
            raise bad_request("tool_choice: there are no tools.", "tool_choice")


class MessagesBody(PromptBody):
    """The body of a message."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop_sequences: list[StopString] = Field(default=[], max_length=MAX_STOPS)
    stream: bool = False
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    diagnostics: dict[str, Any] | None = None

    @property
    def shows_thinking(self) -> bool:
        return self.thinking.type != "disabled"

    @property
    def omits_thinking(self) -> bool:
        """Whether blocks of reasoning are there but empty."""
        return self.thinking.display == "omitted"

    @property
    def calls_in_parallel(self) -> bool:
        return not self.tool_choice.disable_parallel_tool_use

    def options(self) -> dict[str, Any]:
        """Choose the options of `GenerationOptions`."""
        choice, form = self.tool_choice, self.output_config.format or self.output_format
        forced = choice.name if choice.type == "tool" else CHOICES[choice.type]
        return {
            **super().options(),
            "tool_choice": forced if self.tools else None,
            "schema": None if form is None else form.json_schema,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": tuple(self.stop_sequences),
        }

    def _check(self) -> None:
        super()._check()
        budget = self.thinking.budget_tokens
        if self.thinking.type == "enabled" and budget is None:
            raise bad_request("thinking.budget_tokens: Field required", "thinking.budget_tokens")
        if budget is not None and budget >= self.max_tokens:
            raise bad_request(
                "thinking.budget_tokens: it must be less than max_tokens.", "thinking.budget_tokens"
            )


def _text(blocks: Sequence[TextBlock | DocumentBlock]) -> str:
    return PARAGRAPH.join(block.text for block in blocks)


def _turn(role: str, blocks: Sequence[Body]) -> dict[str, Any]:
    """Make the turn of the system, or of the assistant, whose text goes on as it was."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    calls = [
        {"name": block.name, "arguments": block.input}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    turn: dict[str, Any] = {"role": role, "content": "".join(texts)}
    return {**turn, "tool_calls": calls} if calls else turn


def _user(blocks: Sequence[Body]) -> Iterator[dict[str, Any]]:
    """Make the turns of tools' results, and of what the user says."""
    said: list[Any] = []
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            pictures = [each for each in block.content if isinstance(each, ImageBlock)]
            text = _text([each for each in block.content if not isinstance(each, ImageBlock)])
            content = f"Error: {text}" if block.is_error else text
            yield {"role": "tool", "content": content, "tool_call_id": block.tool_use_id}
            said += pictures
        else:
            said.append(block)
    if said:
        parts: list[dict[str, Any]] = []
        for is_image, group in groupby(said, lambda block: isinstance(block, ImageBlock)):
            if is_image:
                parts += [block.part() for block in group]
            else:
                parts.append({"type": "text", "text": _text(list(group))})
        yield {"role": "user", "content": parts}
