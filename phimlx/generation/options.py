"""Options of a prompt and of the reply to it, checked once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from phimlx.errors import GenerationError, shortened
from phimlx.generation.logprobs import MAX_TOP
from phimlx.generation.media_inputs import MediaInputs
from phimlx.generation.sampler import Sampling
from phimlx.models.lora import DEFAULT
from phimlx.prompt.reasoning import AUTO, MODES

if TYPE_CHECKING:
    from phimlx.generation.prompt_cache import PromptCache
    from phimlx.prompt.tools import Tools

SEEDS = 2**64  # how many there are


SHAPES = ("schema", "regex", "grammar")


@dataclass(frozen=True, kw_only=True)
class PromptOptions(MediaInputs):
    """Options for making a prompt into tokens.

    Attributes:
        tools: what the model may call: Python functions, and definitions in OpenAI's form.
        raw: take a text as it is, without template, its control tokens recognised.
        continue_final_message: the last message, which is the assistant's, is the beginning of the
            reply: its turn stays open, and the reply's text is what follows.
        reasoning: "on" or "off", whether the reply is to begin with thought, for models that leave
            it open; "auto" leaves it to the model.
    """

    tools: Tools | None = None
    raw: bool = False
    continue_final_message: bool = False
    reasoning: str = AUTO

    def __post_init__(self) -> None:
        if self.reasoning not in MODES:
            raise GenerationError(
                f"reasoning is {shortened(self.reasoning)}; it must be one of {', '.join(MODES)}."
            )


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(PromptOptions):
    """Options for making a reply. A setting that is None is the model's own.

    Attributes:
        max_tokens: of the reply; as many as the context holds where None.
        temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty,
            logit_bias: see `phimlx.generation.sampler.Sampling`.
        stop: texts that end the reply and are left out of it.
        seed: for the same reply again; drawn, and named in the reply, where None.
        cache: from `Phi.new_cache`; what earlier calls with it computed is not computed again.
        on_prefill: called with the tokens computed and the tokens to compute.
        prompt_lookup: draft tokens from what prompt and reply hold, where they repeat themselves;
            the reply is the same, and comes sooner.
        kv_bits: 8 or 4, to hold keys and values quantized, which takes less memory; a cache that
            is given keeps what it was made with.
        logprobs: tell the log-probability of each of the reply's tokens, as the model gives it,
            whatever the sampling settings make of it; `Reply.logprobs` has them.
        top_logprobs: of each the likeliest tokens in its place, 20 at most; needs `logprobs`.
        prompt_logprobs: tell the same of the prompt's tokens, each with so many likeliest ones, 0
            to 20; `Reply.prompt_logprobs` has them. `max_tokens` may then be 0, for no reply.
        schema: JSON Schema that the answer is valid under, or a pydantic model's class;
            `Reply.parsed` has what it says.
        regex: expression that the whole answer matches, in the syntax of Rust's regex.
        grammar: in the form of Lark that llguidance takes; the answer is of its rule `start`.
        plain: all of the reply is text, reasoning with its tags and calls, too.
        tool_choice: "auto" for an answer or calls of the tools, "none", "required", or the name of
            the one tool to be called; "auto" where None. Calls are of tools that are offered, their
            arguments valid under `parameters`.
        adapter: name of the one to use of those that were loaded beside the model; the one that
            `phimlx.load` was given, where it was given one, unless another is named; None for the
            model alone.

    Raises:
        GenerationError: for a seed or a mode of reasoning that is none, log-probabilities that
            cannot be told, or more than one of schema, regex and grammar.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    seed: int | None = None
    cache: PromptCache | None = None
    on_prefill: Callable[[int, int], None] | None = None
    prompt_lookup: bool = True
    kv_bits: int | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    schema: Any = None
    regex: str | None = None
    grammar: str | None = None
    tool_choice: str | None = None
    plain: bool = False
    adapter: str | None = DEFAULT

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = [name for name in SHAPES if getattr(self, name) is not None]
        if len(shapes) > 1:
            raise GenerationError(
                f"{' and '.join(shapes)} are given together; an answer has one shape.",
                hint=f"Give one of {', '.join(SHAPES)}.",
            )
        if self.seed is not None and not _is_seed(self.seed):
            raise GenerationError(f"seed is {self.seed!r}; it must be a whole number, 0 or more.")
        if not isinstance(self.logprobs, bool):
            raise GenerationError(
                f"logprobs is {shortened(self.logprobs)}; it must be true or false."
            )
        _check_top("top_logprobs", self.top_logprobs)
        if self.top_logprobs and not self.logprobs:
            raise GenerationError(
                "top_logprobs needs logprobs.", hint="Set logprobs to true as well."
            )
        if self.prompt_logprobs is not None:
            _check_top("prompt_logprobs", self.prompt_logprobs)
            if self.cache is not None:
                raise GenerationError(
                    "prompt_logprobs needs all of the prompt computed, and a cache saves that.",
                    hint="Leave one of them out.",
                )

    def sampling(self, model: Sampling) -> Sampling:
        """The model's sampling settings with those given here in their place.

        Raises:
            GenerationError: for a setting out of its range.
        """
        return model.override(**{field.name: getattr(self, field.name) for field in fields(model)})

    def chosen_seed(self) -> int:
        """The seed given, or one drawn."""
        return secrets.randbits(32) if self.seed is None else self.seed


def _check_top(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOP:
        raise GenerationError(f"{name} is {shortened(value)}; it must be from 0 to {MAX_TOP}.")


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < SEEDS
