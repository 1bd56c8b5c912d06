"""Options of a prompt and of the reply to it, checked once."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from phimlx.errors import GenerationError
from phimlx.generation.media_inputs import MediaInputs
from phimlx.generation.sampler import Sampling

if TYPE_CHECKING:
    from phimlx.generation.prompt_cache import PromptCache


@dataclass(frozen=True, kw_only=True)
class PromptOptions(MediaInputs):
    """Options for making a prompt into tokens.

    Attributes:
        tools: function definitions that the model may call.
        raw: take a text as it is, without template, its control tokens recognised.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    raw: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerationOptions(PromptOptions):
    """Options for making a reply. A setting that is None is the model's own.

    Attributes:
        max_tokens: of the reply; as many as the context holds where None.
        temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty:
            see `phimlx.generation.sampler.Sampling`.
        stop: texts that end the reply and are left out of it.
        seed: for the same reply again; drawn, and named in the reply, where None.
        cache: from `Phi.new_cache`; what earlier calls with it computed is not computed again.
        on_prefill: called with the tokens computed and the tokens to compute.
        prompt_lookup: draft tokens from what prompt and reply hold, where they repeat themselves;
            the reply is the same, and comes sooner.
        kv_bits: 8 or 4, to hold keys and values quantized, which takes less memory; a cache that
            is given keeps what it was made with.

    Raises:
        GenerationError: for a seed that is none.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | Sequence[str] = ()
    seed: int | None = None
    cache: PromptCache | None = None
    on_prefill: Callable[[int, int], None] | None = None
    prompt_lookup: bool = True
    kv_bits: int | None = None

    def __post_init__(self) -> None:
        if self.seed is not None and not _is_seed(self.seed):
            raise GenerationError(f"seed is {self.seed!r}; it must be a whole number, 0 or more.")

    def sampling(self, model: Sampling) -> Sampling:
        """The model's sampling settings with those given here in their place.

        Raises:
            GenerationError: for a setting out of its range.
        """
        return model.override(**{field.name: getattr(self, field.name) for field in fields(model)})

    def chosen_seed(self) -> int:
        """The seed given, or one drawn."""
        return secrets.randbits(32) if self.seed is None else self.seed


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64
