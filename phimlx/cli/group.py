"""The table of commands, each loaded only when called, and what becomes of their errors."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Sequence
from io import StringIO
from typing import Any

import click

import phimlx
from phimlx.cli import EXIT_INTERRUPTED
from phimlx.cli.options import DEBUG
from phimlx.cli.preferences import prepared
from phimlx.errors import PhimlxError
from phimlx.terminal.output import Output
from phimlx.terminal.sink import StreamError, indented

COMMANDS = {
    "chat": ("phimlx.cli.chat", "Talk with a model."),
    "generate": ("phimlx.cli.generate", "Answer one prompt."),
    "extract": ("phimlx.cli.extract", "Read data of a given shape out of files."),
    "transcribe": ("phimlx.cli.transcribe", "Write down what is said in recordings."),
    "serve": ("phimlx.cli.serve", "Answer other programs over HTTP."),
    "history": ("phimlx.cli.history", "List, search, export or delete what was said."),
    "ui": ("phimlx.cli.ui", "Chat on a page in the browser."),
    "download": ("phimlx.cli.download", "Bring a model from the Hub to this machine."),
    "list": ("phimlx.cli.list", "List the models on this machine."),
    "remove": ("phimlx.cli.remove", "Delete a model from this machine."),
    "cache": ("phimlx.cli.cache", "List or clear what is kept of long prompts."),
    "convert": ("phimlx.cli.convert", "Convert and quantize a model for MLX."),
    "train": ("phimlx.cli.train", "Fine-tune a model on your own data."),
    "distill": ("phimlx.cli.distill", "Teach a small model what a large one knows."),
    "prune": ("phimlx.cli.prune", "Leave out layers, channels and heads that matter least."),
    "fuse": ("phimlx.cli.fuse", "Merge an adapter into a model's weights."),
    "evaluate": ("phimlx.cli.evaluate", "Measure how well a model does on data."),
    "bench": ("phimlx.cli.bench", "Measure how fast a model is on this machine."),
    "show": ("phimlx.cli.show", "Say what a model is and what it needs."),
    "config": ("phimlx.cli.config", "Show or change your settings."),
    "persona": ("phimlx.cli.persona", "List, show or edit personas."),
    "completion": ("phimlx.cli.completion", "Let your shell complete names, files and settings."),
    "doctor": ("phimlx.cli.doctor", "Check this machine and installation."),
    "demo": ("phimlx.cli.demo", "See everything at work on the small models that come along."),
}
"""Name -> (module that holds it as `command`, one line of help)."""

SYNONYMS = {
    **dict.fromkeys(("pull", "get"), "download"),
    **dict.fromkeys(("ls", "models"), "list"),
    **dict.fromkeys(("rm", "delete", "uninstall"), "remove"),
    **dict.fromkeys(("lora", "finetune"), "train"),
    "run": "chat",
    "server": "serve",
    "quantize": "convert",
    "info": "show",
}
"""What other programs call a command -> its name here."""

HELP = "help"
"""`phimlx help COMMAND` is `phimlx COMMAND --help`."""

COMPLETING = "_PHIMLX_COMPLETE"
"""The variable in which a shell asks for what completes a word."""

NARROW = 50
"""Columns of a terminal, below which help is set otherwise."""

WITHOUT_SETTINGS = ("config", "persona", "completion", "doctor")
"""Commands that also run where the user's settings do not hold."""

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[DEBUG] = True


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        Output().text(f"phimlx {phimlx.__version__}")
        context.exit()


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=_set_debug,
        help="Show the traceback of an error.",
    )


class Formatter(click.HelpFormatter):
    """Help that fits narrow terminals too, which click gives 50 columns at least."""

    def write_dl(self, rows: Any, col_max: int = 30, col_spacing: int = 2) -> None:
        narrow = self.width < NARROW
        super().write_dl(rows, max(8, self.width // 3) if narrow else col_max, col_spacing)


class HelpContext(click.Context):
    """What click knows of a run, with our formatter."""

    formatter_class = Formatter


class CommandError(Exception):
    """What ended a command, on its way to the end of the run.

    Attributes:
        debug: whether its traceback is asked for.
    """

    def __init__(self, cause: Exception, debug: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.debug = debug


class CommandTable(click.Group):
    """A group over `COMMANDS` that imports a command's module when it is called.

    It ends a run with 1 and one message for an error, 2 for wrong usage, 130 for an interrupt, and
    quietly with 1 where the reader of stdout has gone.
    """

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run as a program: the process ends with the exit code."""
        try:
            code = self._run(*args, **{**settings, "standalone_mode": False})
        except StreamError as error:  # while help or an error was printed
            Output().error(error)
            code = error.exit_code
        except BrokenPipeError:
            code = 1
        except (KeyboardInterrupt, click.Abort):
            code = EXIT_INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)

    def _run(self, args: Sequence[str] | None = None, **settings: Any) -> Any:
        """Run a command, and say what is wrong; with --json as one object too."""
        output = Output(json="--json" in (sys.argv[1:] if args is None else args))
        try:
            columns = shutil.get_terminal_size().columns - 2
            narrow = {"terminal_width": max(columns, 20)} if columns < NARROW else {}
            code = super().main(args, **{**narrow, **settings})
            Output().flush()
        except click.ClickException as error:
            print_usage(error)
            output.json({"error": {"message": error.format_message(), "hint": None}})
            output.flush()
            code = error.exit_code
        except CommandError as error:
            output.debug = error.debug
            output.failure(error.cause)
            code = getattr(error.cause, "exit_code", 1)
        return code

    context_class = HelpContext

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] == HELP:
            args = [*args[1:], "--help"]
        name = SYNONYMS.get(args[0], args[0])
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.exceptions.NoSuchCommand(name, possibilities=[*COMMANDS, HELP], ctx=ctx)
        return super().resolve_command(ctx, [name, *args[1:]])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        inner = command.commands.values() if isinstance(command, click.Group) else ()
        for each in (command, *inner):
            each.context_class = HelpContext
            if not any(parameter.name == "debug" for parameter in each.params):
                each.params.append(_debug_option())
                if each.callback is not None and cmd_name not in WITHOUT_SETTINGS:
                    each.callback = prepared(each.callback)
            if COMPLETING in os.environ:
                from phimlx.cli.candidates import offer

                offer(each)
        command.context_settings = {**CONTEXT_SETTINGS, **command.context_settings}
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            Output().flush()
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            raise CommandError(explain(error), DEBUG in ctx.meta) from error
        return result


def explain(error: Exception) -> Exception:
    """Return what stands behind an error that nobody expected, where it is known; else `error`."""
    if isinstance(error, PhimlxError):
        return error
    from phimlx.hub.environment import check_environment

    try:
        check_environment()  # huggingface_hub reads it when it is imported, wherever that is
        if isinstance(error, FileNotFoundError):
            check_working_directory()
    except PhimlxError as cause:
        cause.__cause__ = error
        return cause
    return error


def check_working_directory() -> None:
    """Raise `PhimlxError` where the working directory is gone."""
    try:
        os.getcwd()
    except OSError:
        raise PhimlxError(
            "The working directory is gone.", hint="Change to a folder that is there."
        ) from None


def print_usage(error: click.ClickException) -> None:
    """Print how a command is used and what is wrong, as click words it."""
    error.message = indented(error.message)  # type: ignore[misc]
    text = StringIO()
    error.show(text)
    for line in text.getvalue().rstrip("\n").split("\n"):
        Output().note(line, style_name=None)


@click.group(
    cls=CommandTable,
    context_settings=CONTEXT_SETTINGS,
    params=[
        _debug_option(),
        click.Option(
            ["--version", "-V"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_show_version,
            help="Show the version and exit.",
        ),
    ],
)
def cli() -> None:
    """Run, convert and chat with Microsoft's Phi-4 models on Apple's MLX.

    \b
    Start here:
      phimlx demo                  everything at work, offline
      phimlx chat --model nano     talk with the small model that comes along
    """
