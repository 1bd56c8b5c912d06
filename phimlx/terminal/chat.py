"""A chat: turns between a person and a model, with tools in between.

Knows the order of things; the conversation keeps them, the screen shows them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from phimlx.errors import GenerationError, PhimlxError
from phimlx.terminal.chat_commands import find_command
from phimlx.terminal.conversation import Conversation, Turn
from phimlx.terminal.interrupt import Interruptible
from phimlx.terminal.output import Output
from phimlx.terminal.screen import Screen

if TYPE_CHECKING:
    from pathlib import Path

    from phimlx.api import Phi
    from phimlx.generation.reply import Reply

_COMMAND = re.compile(r"/([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)


class Chat:
    """A conversation with a model on a screen.

    On a terminal an error is shown and the chat goes on; elsewhere it ends the chat.
    """

    def __init__(
        self, phi: Phi, conversation: Conversation, output: Output, screen: Screen
    ) -> None:
        self.phi = phi
        self.conversation = conversation
        self.output = output
        self.screen = screen
        self.last_reply: Reply | None = None
        self.saved_as: Path | None = None
        self.left = False
        self._cache = phi.new_cache()

    def run(self) -> None:
        """Take turns until the user leaves."""
        while not self.left and (line := self.screen.read()) is not None:
            try:
                self.take(line)
            except (Exception, KeyboardInterrupt) as error:
                if not self.screen.interactive:
                    raise
                if not isinstance(error, PhimlxError):
                    self._cache = self.phi.new_cache()
                if isinstance(error, KeyboardInterrupt):
                    self.output.note("Stopped.")
                    continue
                self.output.error(error)
                if isinstance(error, GenerationError) and self.conversation.unanswered:
                    self.output.note(
                        "Your message is kept: /retry sends it again, also after /clear."
                    )

    def take(self, line: str) -> None:
        """Obey a command, or answer what was said; a blank line is neither."""
        text = line.strip()
        match = _COMMAND.fullmatch(text)
        if match:
            find_command(match[1]).run(self, (match[2] or "").strip())
        elif text:
            self.answer(self.conversation.ask(text[1:] if text.startswith("//") else text))

    def resume(self, path: Path) -> None:
        """Go on with a saved conversation; a file that is none leaves this one untouched.

        Raises `SessionError` that says what is wrong with the file.
        """
        loaded, model = Conversation.load(path), self.conversation.model
        if loaded.model != model:
            self.output.note(f"That chat was with {loaded.model}; {model} goes on with it.")
        loaded.model = model
        self.conversation, self.saved_as = loaded, path
        self.output.note(f"Loaded {len(loaded.messages)} messages from {path}.")

    def answer(self, turn: Turn | None) -> None:
        """Let the model answer, and go on for as long as it calls tools and gets results."""
        while turn is not None:
            reply = self._reply(turn)
            turn = self._ask_for_results(reply) if reply else None

    def _reply(self, turn: Turn) -> Reply | None:
        conversation = self.conversation
        try:
            with self.output.prompt_progress() as report:
                stream = self.phi.stream(
                    conversation.prompt(turn),
                    tools=conversation.tools,
                    cache=self._cache,
                    on_prefill=report,
                    **conversation.settings,
                )
                answer = Interruptible(stream)
                reply = self.screen.show(answer)
        except BaseException:
            conversation.abandon(turn)
            raise
        if answer.cut:
            self._cache = self.phi.new_cache()
        if answer.interrupted and not self.screen.interactive:
            raise KeyboardInterrupt
        if answer.interrupted and not reply.text:
            conversation.abandon(turn)
            self.output.note("Stopped before an answer; /retry asks again.")
            return None
        conversation.record(turn, reply)
        self.last_reply = reply
        for warning in reply.warnings:
            self.output.warning(warning)
        if answer.interrupted:
            self.output.note("Stopped; what was said is kept.")
        elif reply.finish_reason == "length":
            self.output.note(f"Cut after {reply.stats.generated_tokens} tokens.")
        return reply

    def _ask_for_results(self, reply: Reply) -> Turn | None:
        results: list[str] = []
        for call in reply.tool_calls:
            result = self.screen.read_result(call.name)
            if result is None:
                return None
            results.append(result)
        return self.conversation.answer_tools(results) if results else None
