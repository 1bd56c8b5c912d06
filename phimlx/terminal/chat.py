"""A chat: turns between a person and a model, with tools in between."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from phimlx.errors import GenerationError, HistoryError, MachineLostError, PhimlxError
from phimlx.prompt.media_parts import no_media
from phimlx.sizes import counted
from phimlx.terminal.attachments import Attachment, dropped_files
from phimlx.terminal.conversation import Conversation, Turn
from phimlx.terminal.interrupt import Interruptible
from phimlx.terminal.output import Output
from phimlx.terminal.reply import reply_stats
from phimlx.terminal.screen import Screen
from phimlx.terminal.toolbox import Toolbox
from phimlx.terminal.voice import Voice

if TYPE_CHECKING:
    from pathlib import Path

    from phimlx.generation.answerer import Answerer
    from phimlx.generation.prefix_store import PrefixStore
    from phimlx.generation.reply import Reply
    from phimlx.history.messages import Message
    from phimlx.history.store import History
    from phimlx.media.limits import Limits
    from phimlx.terminal.keeper import Keeper

FULL = 0.8  # of the context, from where on it is told
LAST_TURNS = 2  # that are shown of a conversation that goes on

LEAVING = ("exit", "quit")  # what a person types to go, without a slash too

_COMMAND = re.compile(r"/([A-Za-z]+|\?)(?:\s+(.*))?", re.DOTALL)


class Loader(Protocol):
    """Finds and loads models for a chat."""

    def find(self, name: str, adapter: str | None) -> tuple[str, str | None]:
        """Return the model and adapter that a name means; raises `PhimlxError` for none."""

    def load(self, model: str, adapter: str | None) -> Answerer:
        """Load a model."""

    def prefix_store(self, phi: Answerer) -> PrefixStore | None:
        """Open the store of its long prompts."""


def tokens_of(reply: Reply) -> int:
    """Return the tokens of a conversation up to the end of a reply."""
    return reply.stats.prompt_tokens + reply.stats.generated_tokens


class Chat:
    """A conversation with a model on a screen.

    `pending` are the files that go with what the user says next. On a terminal an error is shown
    and the chat goes on; elsewhere it ends the chat.
    """

    def __init__(
        self,
        phi: Answerer,
        conversation: Conversation,
        output: Output,
        screen: Screen,
        run_command: Callable[[Chat, str, str], None],
        limits: Limits | None = None,
        frames: int | None = None,
        kv_bits: int | None = None,
        keeper: Keeper | None = None,
        loader: Loader | None = None,
        toolbox: Toolbox | None = None,
    ) -> None:
        """Begin a chat.

        Args:
            run_command: called with the chat, the name and the argument of a slash command.
            limits: hold for files that are attached.
            frames: pictures that a video becomes.
            kv_bits: 8 or 4, to hold keys and values quantized; as they come where None.
            keeper: writes the chat down; None where nothing of it is kept.
            loader: finds and loads other models.
            toolbox: runs tools that the model calls; one without servers where it is None.
        """
        self.phi = phi
        self.conversation = conversation
        self.output = output
        self.screen = screen
        self.last_reply: Reply | None = None
        self._replied: list[Message] = []  # the messages that it ends
        self.saved_as: Path | None = None
        self.left = False
        self.reply_options: dict[str, Any] = {}  # beside those that a saved chat keeps
        self.pending: list[Attachment] = []
        self._run_command = run_command
        self.limits = limits
        self._frames = frames
        self._kv_bits = kv_bits
        self._keeper = keeper
        self._loader = loader
        self.toolbox = toolbox or Toolbox(screen, output)
        self.voice = Voice(output, waits=not screen.interactive)
        screen.on_interrupt = self.voice.hush
        self._prefixes: PrefixStore | None = None
        self.forget()

    def run(self) -> None:
        """Take turns until the user leaves."""
        try:
            self._take_turns()
        finally:
            self.voice.hush()

    def _take_turns(self) -> None:
        while not self.left and (line := self.screen.read()) is not None:
            try:
                self.take(line)
            except (Exception, KeyboardInterrupt) as error:
                if not self.screen.interactive or isinstance(error, MachineLostError):
                    raise
                if not isinstance(error, PhimlxError):
                    self.forget()
                if isinstance(error, KeyboardInterrupt):
                    self.output.note("Stopped.")
                    continue
                self.output.error(error)
                if isinstance(error, GenerationError) and self.conversation.unanswered:
                    self.output.note(
                        "Your message is kept: /retry sends it again, also after /clear."
                    )

    def take(self, line: str) -> None:
        """Obey a command, take files that were dropped, or answer what was said.

        A person leaves by saying so; in a pipe that is a turn as any other.

        A blank line is none of these, but sends a sound, which may hold the question.
        """
        text = line.strip()
        if self.screen.interactive and text.lower() in LEAVING:
            text = f"/{text}"
        files = [] if text.startswith("//") else dropped_files(text)
        match = _COMMAND.fullmatch(text)
        if files:
            self.attach(files)
        elif match:
            self._run_command(self, match[1], (match[2] or "").strip())
            if self.conversation.place is not None:
                self._keep(self.conversation.unanswered)
        elif text or any(attachment.kind == "audio" for attachment in self.pending):
            self.say(text[1:] if text.startswith("//") else text)

    def attach(self, files: Sequence[tuple[str, str]]) -> None:
        """Read files, given by kind and path, to go with what the user says next.

        Raises `MediaError` for one that cannot be read, `PromptError` where the model takes none.
        """
        if not self.phi.takes_media:
            raise no_media(self.phi.name)
        if not self.phi.hears and any(kind == "audio" for kind, _ in files):
            raise no_media(self.phi.name, sees=True)
        read = [Attachment.read(kind, path, self.limits, self._frames) for kind, path in files]
        self.pending = [*self.pending, *read]
        self.output.note(f"With your next message: {', '.join(map(str, self.pending))}. Or /drop.")

    def say(self, text: str) -> None:
        """Answer what the user says, with the files that wait for it."""
        attachments, self.pending = self.pending, []
        self.answer(self.conversation.ask(text, attachments))

    def resume(self, path: Path) -> None:
        """Go on with a saved conversation; a file that is none leaves this one untouched.

        Raises `SessionError` that says what is wrong with the file.
        """
        self._go_on(Conversation.load(path, self.limits, self.screen.agree), str(path))
        self.saved_as = path

    def resume_kept(self, id: int) -> None:
        """Go on with a conversation of the history.

        Raises `HistoryError` where there is none, `SessionError` for what is wrong with it.
        """
        kept = self.history.read(id)
        loaded = Conversation.from_history(kept, self.limits, self.screen.agree)
        self._go_on(loaded, f"conversation {id}")

    @property
    def history(self) -> History:
        """The history; raises `HistoryError` where nothing of this chat is kept."""
        if self._keeper is None:
            raise HistoryError(
                "This chat is private: it neither keeps nor reads conversations.",
                hint="phimlx history list shows them.",
            )
        return self._keeper.history

    def _go_on(self, loaded: Conversation, place: str) -> None:
        """Put a conversation in the place of this one, and show how it ended."""
        model = self.conversation.model
        self.check(loaded)
        if loaded.model != model:
            self.output.note(f"That chat was with {loaded.model}; {model} goes on with it.")
        loaded.model, loaded.adapter = model, self.conversation.adapter
        self.conversation, self.saved_as = loaded, None
        self.show_last_turns()
        self.output.note(f"Loaded {counted(len(loaded.messages), 'message')} from {place}.")

    def show_last_turns(self) -> None:
        """Show the last turns of the conversation, and what waits for an answer."""
        from phimlx.terminal.turns import show_turns

        conversation = self.conversation
        show_turns([*conversation.messages, *conversation.unanswered], self.output, last=LAST_TURNS)
        if conversation.unanswered:
            self.output.note("That has no answer yet; /retry asks again.")

    def check(self, conversation: Conversation) -> None:
        """Raise `PromptError` where pictures or sounds were shown that the model cannot take."""
        if conversation.has_media and not self.phi.takes_media:
            raise no_media(self.phi.name)

    def answer(self, turn: Turn | None) -> None:
        """Let the model answer, and go on for as long as it calls tools and gets results."""
        more: dict[str, Any] = {}
        rounds, box = 0, self.toolbox
        while turn is not None:
            reply = self._reply(turn, more)
            results = box.results(reply.tool_calls, self.conversation.tools) if reply else None
            turn = self.conversation.answer_tools(results) if results else None
            rounds += 1
            if turn and rounds % box.max_rounds == 0 and not box.goes_on(rounds):
                more = {"tool_choice": "none"}

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """What the model may call: the conversation's own tools, and those of the toolbox."""
        return self.toolbox.offered(self.conversation.tools)

    def connect(self, sources: Sequence[str]) -> None:
        """Begin MCP servers, whose tools the model may call; errors as of `Toolbox.connect`.

        Raises:
            PromptError: where the model was not trained to call tools.
        """
        if sources:
            self.phi.encode([{"role": "user", "content": "?"}], tools=[{"name": "any"}])
            self.toolbox.connect(sources)

    def _reply(self, turn: Turn, more: Mapping[str, Any]) -> Reply | None:
        conversation = self.conversation
        self.voice.hush()
        if turn.new and turn.kept == len(conversation.messages):
            self._keep(turn.new)
        try:
            with self.output.prompt_progress() as report:
                stream = self.phi.stream(
                    conversation.prompt(turn),
                    tools=self.tools,
                    cache=self.cache,
                    on_prefill=report,
                    **self.reply_options,
                    **conversation.settings,
                    **more,
                )
                answer = Interruptible(stream, self.voice.hear)
                reply = self.screen.show(answer)
        except BaseException:
            self.voice.hush()
            conversation.abandon(turn)
            raise
        if answer.interrupted:
            self.voice.hush()
        if answer.cut:
            self.forget()
        if answer.interrupted and not self.screen.interactive:
            raise KeyboardInterrupt
        if answer.interrupted and not reply.text:
            conversation.abandon(turn)
            self.output.note("Stopped before an answer; /retry asks again.")
            return None
        conversation.record(turn, reply)
        self._keep(stats=reply_stats(reply))
        if not answer.interrupted:
            self.voice.end()
        self.last_reply, self._replied = reply, conversation.messages
        for warning in reply.warnings:
            self.output.warning(warning)
        if answer.interrupted:
            self.output.note("Stopped; what was said is kept.")
        elif reply.finish_reason == "length":
            self.output.note(f"Cut after {reply.stats.generated_tokens} tokens.")
        if self._prefixes is not None and self.cache is not None and not answer.cut:
            self._prefixes.save(self.cache)
        self._note_fill(reply)
        return reply

    def _note_fill(self, reply: Reply) -> None:
        """Tell when the context fills, and what helps."""
        used, room = tokens_of(reply), self.phi.context_length
        if used >= FULL * room and not reply.tool_calls:
            self.output.note(
                f"The context is {used / room:.0%} full: /compact lets the model sum up the oldest "
                "turns, /drop N forgets N of them, /clear all."
            )

    def is_last(self, reply: Reply) -> bool:
        """Whether a reply is what the conversation ends with."""
        return reply is self.last_reply and self._replied is self.conversation.messages

    def context_used(self) -> int:
        """Return the tokens of the conversation: as the last reply had them, else counted."""
        conversation = self.conversation
        if self.last_reply is not None and self.is_last(self.last_reply):
            return tokens_of(self.last_reply)
        if not conversation.messages:
            return 0
        whole = conversation.prompt(Turn(len(conversation.messages), ()))
        return len(self.phi.encode(whole, tools=self.tools))

    def use_model(self, name: str, adapter: str | None = None) -> None:
        """Go on with another model; the one before is given up first, for both may not fit.

        Raises `PhimlxError` where it cannot be loaded; the one before is loaded again then.
        """
        if self._loader is None:
            raise PhimlxError("This chat cannot change its model.")
        conversation, loader = self.conversation, self._loader
        before = (conversation.model, conversation.adapter)
        wanted = loader.find(name, adapter)
        del self.phi, self.cache
        self._prefixes = None
        try:
            self.phi = loader.load(*wanted)
            conversation.model, conversation.adapter = wanted
        except BaseException:
            self.phi = loader.load(*before)
            raise
        finally:
            self.keep_in(loader.prefix_store(self.phi))
            self.last_reply = None

    def _keep(self, asked: Sequence[Message] = (), stats: Mapping[str, Any] | None = None) -> None:
        if self._keeper is not None:
            self._keeper.keep(self.conversation, asked, stats)

    def keep_in(self, prefixes: PrefixStore | None) -> None:
        """Keep what has been said in a store, and find there what was said before."""
        self._prefixes = prefixes
        self.forget()

    def forget(self) -> None:
        """Begin with an empty cache."""
        more = {} if self._prefixes is None else {"prefixes": self._prefixes}
        self.cache = self.phi.new_cache(self._kv_bits, **more)
