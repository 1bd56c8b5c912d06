"""A model whose replies are written beforehand: the double that screens are tested with.

It answers as `phimlx.api.Phi` does and computes nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from phimlx.errors import PhimlxError
from phimlx.generation.reply import Chunk, Reply
from phimlx.generation.sampler import Sampling
from phimlx.prompt.tools import ToolCall
from phimlx.tools.chat import Chats

PAUSE = "<pause>"
"""In a script: wait there until a signal comes, as a model that takes its time."""

INTERRUPT = "<interrupt>"
"""In a script: Ctrl-C comes there."""


@dataclass
class Script:
    """One reply: pieces of text, or pairs of a kind and a text, and what comes with them."""

    pieces: Sequence[str | tuple[str, str]] = ()
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = "stop"
    warnings: list[str] = field(default_factory=list)
    error: Exception | None = None


@dataclass
class Said:
    """The content of a reply, written down."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class FakeStream:
    """The pieces of a script, each one token."""

    def __init__(self, script: Script, prompt_tokens: int) -> None:
        self.said = Said()
        self.reply = Reply(seed=7, content=self.said)
        self.reply.stats.prompt_tokens = prompt_tokens
        self.reply.stats.prefill_seconds = 0.5
        self.closed = False
        self._pieces = self._run(script)

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> Chunk:
        return next(self._pieces)

    def close(self) -> None:
        self.closed = True
        self._pieces.close()

    def _run(self, script: Script) -> Generator[Chunk]:
        reply = self.reply
        wakened = _wakeup() if PAUSE in script.pieces else -1
        for item in script.pieces:
            if item == PAUSE:
                os.read(wakened, 1)
                continue
            if item == INTERRUPT:
                signal.raise_signal(signal.SIGINT)
                continue
            kind, text = item if isinstance(item, tuple) else ("text", item)
            if kind == "reasoning":
                self.said.reasoning += text
            else:
                self.said.text += text
            reply.tokens.append(len(reply.tokens))
            reply.stats.generated_tokens += 1
            reply.stats.generate_seconds += 0.25
            yield Chunk(text, reply.tokens[-1], kind)
        if script.error:
            raise script.error
        self.said.tool_calls = script.tool_calls
        self.said.warnings = script.warnings
        reply.finish_reason = "tool_calls" if script.tool_calls else script.finish_reason


def _wakeup() -> int:
    """Where a byte can be read once a signal has come, be it before or during the reading."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    return readable


class FakePhi(Chats):
    """Plays its scripts one after the other and remembers what it was asked."""

    name = "fake"
    context_length = 100
    takes_media = hears = False
    is_base = False
    chat_form = None
    sampling = Sampling(temperature=0.8)

    remarks: tuple[str, ...] = ()

    def __init__(self, *scripts: Script | str | PhimlxError) -> None:
        self._scripts = list(scripts)
        self.sources: list[Any] = []  # for tests that load it by name
        self.prompts: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.caches: list[object] = []
        self.kv_bits: int | None = None  # of the last of them

    def new_cache(self, kv_bits: int | None = None) -> object:
        self.kv_bits = kv_bits
        self.caches.append(object())
        return self.caches[-1]

    def prefix_store(self, note: Any, **settings: Any) -> None:
        """Keep nothing."""

    def encode(self, prompt: Any, **options: Any) -> list[int]:
        """Count five tokens a message."""
        return [0] * 5 * len(prompt)

    def stream(self, prompt: Any, **options: Any) -> FakeStream:
        options.pop("on_prefill", None)
        self.prompts.append(prompt)
        self.options.append(options)
        script = self._scripts.pop(0)
        if isinstance(script, PhimlxError):
            raise script
        script = Script([script]) if isinstance(script, str) else script
        return FakeStream(script, prompt_tokens=10)
