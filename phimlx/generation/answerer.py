"""What a conversation needs of a model, wherever it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from phimlx.generation.prefix_store import PrefixStore
    from phimlx.generation.prompt_cache import PromptCache
    from phimlx.generation.prompt_reader import Prompt
    from phimlx.generation.reply import Chunk, Reply


class ReplyStream(Iterator["Chunk"], Protocol):
    """The chunks of one reply; `reply` holds what there is so far."""

    @property
    def reply(self) -> Reply: ...

    def result(self) -> Reply:
        """Read the reply to its end."""

    def close(self) -> None:
        """Stop here; the reply stays readable."""


class Answerer(Protocol):
    """A model that answers: `phimlx.Phi`, or one behind a server; its members are those of Phi."""

    @property
    def name(self) -> str: ...
    @property
    def context_length(self) -> int: ...
    @property
    def is_base(self) -> bool: ...
    @property
    def takes_media(self) -> bool: ...
    @property
    def hears(self) -> bool: ...
    @property
    def sampling(self) -> Any: ...

    def stream(self, prompt: Prompt = "", **options: Any) -> ReplyStream:
        """Start a reply and hand it over chunk by chunk."""

    def encode(self, prompt: Prompt = "", **options: Any) -> list[int]:
        """Encode a prompt as tokens."""

    def new_cache(
        self, kv_bits: int | None = None, prefixes: PrefixStore | None = None
    ) -> PromptCache | None:
        """Make a cache for calls that build on each other; None where a server sees to that."""

    def prefix_store(
        self, note: Callable[[str], object] = ..., **settings: Any
    ) -> PrefixStore | None:
        """Open the store of long prompts; None where there is none."""
