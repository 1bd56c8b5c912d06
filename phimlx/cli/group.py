"""The table of commands, each loaded only when called, and what becomes of their errors."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

import phimlx
from phimlx.cli import EXIT_INTERRUPTED
from phimlx.cli.options import DEBUG
from phimlx.errors import PhimlxError
from phimlx.terminal.output import Output

COMMANDS = {
    "chat": ("phimlx.cli.chat", "Talk with a model."),
    "generate": ("phimlx.cli.generate", "Answer one prompt."),
    "transcribe": ("phimlx.cli.transcribe", "Write down what is said in recordings."),
    "download": ("phimlx.cli.download", "Bring a model from the Hub to this machine."),
    "list": ("phimlx.cli.list", "List the models on this machine."),
    "remove": ("phimlx.cli.remove", "Delete a model from this machine."),
    "convert": ("phimlx.cli.convert", "Convert and quantize a model for MLX."),
    "train": ("phimlx.cli.train", "Fine-tune a model on your own data."),
    "fuse": ("phimlx.cli.fuse", "Merge an adapter into a model's weights."),
    "evaluate": ("phimlx.cli.evaluate", "Measure how well a model does on data."),
    "show": ("phimlx.cli.show", "Say what a model is and what it needs."),
    "doctor": ("phimlx.cli.doctor", "Check this machine and installation."),
    "demo": ("phimlx.cli.demo", "See everything at work on the small models that come along."),
}
"""Name -> (module that holds it as `command`, one line of help)."""

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[DEBUG] = True


def _show_version(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"phimlx {phimlx.__version__}")
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


class CommandTable(click.Group):
    """A group over `COMMANDS` that imports a command's module when it is called.

    It ends a run with 1 and one message for an error, 130 for an interrupt; click itself ends
    it with 2 for wrong usage, and quietly with 1 where the reader of stdout has gone.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(_debug_option())
        command.context_settings = {**CONTEXT_SETTINGS, **command.context_settings}
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(EXIT_INTERRUPTED)
        except Exception as error:
            Output(debug=DEBUG in ctx.meta).error(error)
            ctx.exit(error.exit_code if isinstance(error, PhimlxError) else 1)
        return result


@click.group(
    cls=CommandTable,
    context_settings=CONTEXT_SETTINGS,
    params=[
        _debug_option(),
        click.Option(
            ["--version"],
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
