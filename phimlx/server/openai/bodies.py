"""What bodies of OpenAI's dialect have in common: settings, tools, the form of an answer."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from phimlx.server.errors import bad_request
from phimlx.server.http import MAX_STOPS, Body, Refusal, StopString

MAX_TOOLS = 128
MAX_BIASES = 4096

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Token = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]

# Fields of vLLM's, llama.cpp's and mlx-lm's servers that change a reply and have no like here.
OTHERS_FIELDS = {
    "adapters": Refusal("no request names a file; adapters are names of models"),
    "add_special_tokens": Refusal("the prompt form says which tokens begin a prompt"),
    "allowed_token_ids": Refusal("replies are held to schemas and expressions, not to tokens"),
    "bad_words": Refusal("use logit_bias", ([],)),
    "best_of": Refusal("every reply is given; ask for them with n", (1,)),
    "chat_template": Refusal("the model's own prompt form is used"),
    "documents": Refusal("put them into a message", ([],)),
    "ignore_eos": Refusal("a reply ends where the model ends it", (False,)),
    "include_stop_str_in_output": Refusal("stop strings are left out", (False,)),
    "length_penalty": Refusal("there is no beam search", (1, 1.0)),
    "logits_processors": Refusal("no request runs code"),
    "min_tokens": Refusal("a reply ends where the model ends it", (0,)),
    "mirostat": Refusal("there is no Mirostat sampling; use min_p", (0,)),
    "mm_processor_kwargs": Refusal("media are prepared as the model expects them", ({},)),
    "skip_special_tokens": Refusal("control tokens are never text", (True,)),
    "spaces_between_special_tokens": Refusal("control tokens are never text", (True, False)),
    "stop_token_ids": Refusal("use stop, with texts", ([],)),
    "structural_tag": Refusal("use tools, or response_format"),
    "truncate_prompt_tokens": Refusal("no prompt is shortened"),
    "typical_p": Refusal("there is no typical sampling; use min_p", (1, 1.0)),
    "use_beam_search": Refusal("there is no beam search", (False,)),
}

OBJECT: Mapping[str, Any] = {"type": "object"}


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class HintsBody(Body):
    """Fields that say something of a request and change nothing of the reply."""

    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    prompt_cache_options: dict[str, Any] | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    priority: int | None = None
    request_id: str | None = None
    cache_salt: str | None = None


class StructuredOutputs(Body):
    """What vLLM holds an answer to."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def options(self) -> dict[str, Any]:
        """Choose the options of `GenerationOptions`, all of them absent where none is given."""
        schema = self.json_
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise bad_request("guided_json is no JSON.", "guided_json") from None
        if self.json_object:
            schema = {"type": "object"}
        regex = self.regex
        if self.choice:
            regex = "|".join(re.escape(each) for each in self.choice)
        return {"schema": schema, "regex": regex, "grammar": self.grammar}


class SamplingBody(HintsBody):
    """The settings of a reply that chat completions and completions share."""

    refused: ClassVar[Mapping[str, Refusal]] = OTHERS_FIELDS

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: (
        Annotated[
            dict[Token, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIASES)
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    n: int = Field(1, ge=1, le=8)
    stream: bool = False
    stream_options: StreamOptions | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1, max_length=1024)] | None = None
    guided_grammar: str | None = None
    guided_decoding_backend: str | None = None
    structured_outputs: StructuredOutputs | None = None

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        """Choose the options of `GenerationOptions` for sampling, and where a reply ends."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options: there is no stream.", "stream_options")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": self.logit_bias,
            "seed": None if self.seed is None else self.seed % 2**64,
            "stop": tuple(each for each in stop if each),
        }

    def held_to(self) -> dict[str, Any]:
        """Choose what the answer is held to, of vLLM's fields."""
        guided = StructuredOutputs(
            json=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        found = [guided, *([] if self.structured_outputs is None else [self.structured_outputs])]
        return chosen({k: v for each in found for k, v in each.options().items() if v is not None})


def chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out options that are None: the model's own hold."""
    return {name: value for name, value in options.items() if value is not None}


class Function(Body):
    """A function that the client runs."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    _order: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _keep_order(cls, value: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        made = read(value)
        made._order = tuple(value)
        return made

    def definition(self) -> dict[str, Any]:
        """Put it into the form of `phimlx.prompt.tools`, in the order in which it was written."""
        told = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {name: told[name] for name in self._order if name in told}


class FormatSchema(Body):
    """A schema by its name."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def options(self) -> dict[str, Any]:
        """Choose what the answer is held to, of the options of `GenerationOptions`."""
        return {"schema": OBJECT if self.json_schema is None else self.json_schema}


class PlainFormat(Body):
    type: Literal["text", "json_object"]

    def options(self) -> dict[str, Any]:
        """Choose what the answer is held to, of the options of `GenerationOptions`."""
        return {"schema": OBJECT} if self.type == "json_object" else {}


class ToolChoice(Body):
    """A choice among tools that is more than a word."""

    @abstractmethod
    def read(self) -> tuple[str, list[str] | None]:
        """Return "auto", "required" or a tool's name, and the tools that may be called.

        All of them may be where that is None.
        """


def select_tools(tools: Sequence[Function], choice: str | ToolChoice) -> dict[str, Any]:
    """Choose the options of `GenerationOptions` for tools.

    Raises:
        RequestError: where the choice names a tool that is not there, or there are none.
    """
    mode, allowed = (choice, None) if isinstance(choice, str) else choice.read()
    names = {tool.name for tool in tools}
    named = allowed or ([] if mode in ("auto", "none", "required") else [mode])
    for name in named:
        if name not in names:
            raise bad_request(f"tool_choice: there is no tool {name[:100]}.", "tool_choice")
    if mode == "required" and not tools:
        raise bad_request("tool_choice: there are no tools to call.", "tool_choice")
    offered = [tool for tool in tools if allowed is None or tool.name in allowed]
    if not offered:
        return {}
    return {"tools": [tool.definition() for tool in offered], "tool_choice": mode}


def wants_reasoning(effort: str | None) -> bool | None:
    """Whether a reply is to begin with thought; None where nothing is said of it."""
    return None if effort is None else effort not in ("none", "minimal")
