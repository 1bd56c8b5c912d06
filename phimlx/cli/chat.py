"""`phimlx chat`: talk with a model on a terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.conversations import (
    LAST,
    ConversationId,
    lasting_name,
    model_name,
    open_keeper,
    private_option,
    read_kept,
)
from phimlx.cli.furnish import Flags, furnish, persona_option
from phimlx.cli.options import (
    adapter_option,
    cache_option,
    dtype_option,
    frames_option,
    is_debugging,
    json_option,
    kv_bits_option,
    limit_options,
    load_or_download,
    max_rounds_option,
    mcp_option,
    model_argument,
    model_option,
    pop_limits,
    prefix_store,
    prompt_form_option,
    prompt_lookup_option,
    rope_scaling_option,
    sampling_options,
    system_option,
    tools_option,
    yes_option,
)
from phimlx.cli.preferences import preferences
from phimlx.cli.remote import Servers, pop_servers, server_options
from phimlx.cli.shapes import pop_shape, shape_options
from phimlx.cli.together import machines, together
from phimlx.errors import PhimlxError
from phimlx.preferences.sampling import given
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.generation.answerer import Answerer
    from phimlx.generation.prefix_store import PrefixStore


@click.command()
@model_option
@model_argument
@adapter_option
@dtype_option
@rope_scaling_option
@kv_bits_option
@persona_option
@system_option
@tools_option
@mcp_option
@yes_option
@max_rounds_option
@shape_options
@prompt_form_option
@click.option(
    "--load",
    "session_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Go on with a chat that /save wrote, with its model unless --model names another.",
)
@click.option(
    "--continue",
    "continued",
    metavar="[ID]",
    type=ConversationId(),
    is_flag=False,
    flag_value=LAST,
    help="Go on with a conversation of the history, the last one where no ID is given.",
)
@private_option
@sampling_options
@prompt_lookup_option
@cache_option
@server_options
@frames_option
@limit_options()
@json_option
@together
def command(
    model: str | None,
    adapter: str | None,
    dtype: str | None,
    rope_scaling: dict[str, Any] | None,
    kv_bits: int | None,
    persona: str | None,
    system: str | None,
    tools_file: Path | None,
    mcp: tuple[str, ...],
    allow_all: bool,
    max_rounds: int,
    prompt_form: str | None,
    session_file: Path | None,
    continued: int | str | None,
    private: bool,
    prompt_lookup: bool | None,
    keeps: bool | None,
    frames: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Talk with a model; /help in the chat lists its commands.

    Where stdin or stdout is no terminal, each line of stdin is a turn, replies go to stdout as
    they are, and the first error ends the chat. With --json the whole conversation goes there, as
    one object, when it ends.

    With --mcp the model calls tools of servers. Each call is shown and asked for; elsewhere than on
    a terminal nothing is run without --yes.

    \b
      phimlx chat --mcp "npx -y @modelcontextprotocol/server-filesystem ."

    A model that sees and hears takes files too: /image, /audio and /video, a file dropped on the
    terminal, or /paste for a screenshot in the clipboard. They go with what is said next.
    """
    from phimlx.terminal.chat import Chat
    from phimlx.terminal.chat_commands import candidates, run_command
    from phimlx.terminal.conversation import Conversation
    from phimlx.terminal.screen import PipedScreen, TerminalScreen
    from phimlx.terminal.toolbox import Toolbox

    if session_file is not None and continued is not None:
        raise click.UsageError("--load and --continue exclude each other.")
    output = Output(json=as_json, debug=is_debugging())
    servers = pop_servers(settings)
    limits, shape = pop_limits(settings), pop_shape(settings)
    typed = sys.stdin is not None and sys.stdin.isatty()
    interactive = typed and output.is_terminal and not as_json
    theme = preferences().get("theme") or "auto"
    screen = TerminalScreen(output, candidates, theme) if interactive else PipedScreen(output)
    keeper = open_keeper(private, output)
    saved: Conversation | None = None
    if session_file is not None:
        saved = Conversation.load(session_file, limits, screen.agree)
    elif continued is not None:
        saved = Conversation.from_history(read_kept(continued, keeper), limits, screen.agree)
    named_by_file = session_file is not None and model is None
    flags = Flags(model, persona, adapter, system, tools_file, kv_bits, mcp=mcp)
    begun = furnish(flags, settings, saved)
    conversation = begun.conversation
    loader = ChatLoader(
        output,
        servers,
        dtype,
        rope_scaling,
        prompt_form,
        begun.kv_bits,
        keeps,
        conversation.settings,
        named_by_file,
    )
    phi = loader.load(begun.model, begun.adapter)
    loader.always_ask = False
    chat = Chat(
        phi,
        conversation,
        output,
        screen,
        run_command,
        limits,
        frames,
        begun.kv_bits,
        keeper,
        loader,
        toolbox := Toolbox(screen, output, allow_all, max_rounds),
    )
    click.get_current_context().call_on_close(toolbox.close)
    chat.keep_in(loader.prefix_store(phi))
    chat.reply_options = given({"prompt_lookup": prompt_lookup, **shape})
    if preferences().get("speak"):
        try:
            chat.voice.turn(on=True)
        except PhimlxError as error:
            output.warning(f"{error} {error.hint or ''}".strip())
    chat.check(conversation)
    chat.saved_as = session_file
    if interactive:
        output.note(
            f"{phi.name} · {phi.context_length:,} tokens of context · "
            "/help lists the commands, Ctrl-D leaves"
        )
        chat.show_last_turns()
    elif typed or machines() is not None:  # mlx.launch passes on lines, and no end of them
        leave = "/exit" if machines() is not None else "Ctrl-D"
        output.note(f"Each line is a turn; {leave} ends the chat.")
    if typed and phi.is_base:
        output.note(f"{phi.name} is a base model: it completes text, and was not trained to chat.")
    chat.connect(begun.mcp)
    del phi  # the chat may give it up for another
    chat.run()
    output.json({"model": chat.conversation.model, "messages": chat.conversation.messages})


@dataclass
class ChatLoader:
    """Loads models as the command's flags say: `phimlx.terminal.chat.Loader`.

    Attributes:
        always_ask: before any download, where a file rather than the user named the model.
    """

    output: Output
    servers: Servers
    dtype: str | None
    rope_scaling: dict[str, Any] | None
    prompt_form: str | None
    kv_bits: int | None
    keeps: bool | None
    settings: Mapping[str, Any]
    always_ask: bool

    def find(self, name: str, adapter: str | None) -> tuple[str, str | None]:
        """Return the model and adapter that a name means; raises where the name means nothing."""
        from phimlx.errors import ModelAbsentError
        from phimlx.hub.resolve import resolve

        choice = preferences().choose(name)
        if self.servers.url is None:
            with contextlib.suppress(ModelAbsentError):  # which may be downloaded
                resolve(choice.model)
        adapter = adapter or choice.get("adapter")
        return model_name(choice.model), None if adapter is None else lasting_name(adapter)

    def load(self, model: str | None, adapter: str | None) -> Answerer:
        """Find a model on a server, or load it, downloaded where that takes somebody's consent."""
        here = {
            "--adapter-path": adapter,
            "--dtype": self.dtype,
            "--rope-scaling": self.rope_scaling,
            "--kv-bits": self.kv_bits,
            "--prompt-form": self.prompt_form,
        }
        remote = self.servers.find(model, here, self.settings, self.output, chats=True)
        if remote is not None:
            return remote
        phi = load_or_download(
            model,
            self.output,
            adapter,
            dtype=self.dtype,
            rope_scaling=self.rope_scaling,
            always_ask=self.always_ask,
        )
        form = self.prompt_form or phi.chat_form
        if form is not None:
            phi.use_prompt_form(form)
        return phi

    def prefix_store(self, phi: Answerer) -> PrefixStore | None:
        """Open the store of its long prompts, as --cache says."""
        return prefix_store(phi, self.keeps, self.output)
