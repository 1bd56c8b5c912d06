"""`phimlx serve`: models of this machine behind the APIs that other programs speak."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from phimlx.cli.options import json_option, model_argument
from phimlx.cli.preferences import preferences
from phimlx.cli.remote import KEY_VARIABLE
from phimlx.cli.together import machines, together
from phimlx.options import click_options, from_flags, to_flags
from phimlx.server.settings import ServerSettings
from phimlx.terminal.output import Output

FILES = ("model", "api_key_file", "ssl_certfile", "ssl_keyfile")
"""Settings that may name a file, of which a service needs the whole path."""


@click.command()
@click_options(ServerSettings)
@click.option("--open", "opens", is_flag=True, help="Open the chat page in a browser.")
@model_argument
@click.option("--check", "action", flag_value="check", help="Say what would run, and run nothing.")
@click.option(
    "--install",
    "action",
    flag_value="install",
    help="Serve with these settings while you are logged in, as a service of launchd or systemd.",
)
@click.option("--uninstall", "action", flag_value="uninstall", help="Stop that service for good.")
@click.option("--status", "action", flag_value="status", help="Say whether it runs.")
@json_option
@together
def command(action: str | None, opens: bool, as_json: bool, **flags: Any) -> None:
    """Serve models to programs that speak OpenAI's, Anthropic's or Ollama's API.

    \b
      phimlx serve                       every model on this machine, at 127.0.0.1:8080
      phimlx serve --model phi-4-mini    one model, loaded at once
      phimlx serve --model phi-4-mini --adapter mine=FOLDER    phi-4-mini:mine as well
      phimlx serve --install             as a service, from now on

    Without a key only this machine is served. PHIMLX_API_KEY may hold the key.
    """
    settings, output = from_flags(ServerSettings, flags), Output(json=as_json)
    if preferences().alias.get(settings.model or "", {}).get("system") is not None:
        output.note(f"Clients say what the model is told, not {settings.model}'s system prompt.")
    if action is not None and machines() is not None:
        raise click.UsageError(f"--{action} is for one machine: leave out mlx.launch.")
    if settings.model is None and machines() is not None:
        raise click.UsageError("Machines that share a model serve that one: name it with --model.")
    if action is None:
        run(settings, output, read_key(settings), opens=opens)
    else:
        ACTIONS[action](settings, output)


def read_key(settings: ServerSettings) -> str | None:
    """Find the key that clients must send; errors as of `phimlx.server.run.find_key`."""
    from phimlx.server.run import find_key

    return find_key(settings, os.environ.get(KEY_VARIABLE))


def run(
    settings: ServerSettings,
    output: Output,
    key: str | None,
    token: str | None = None,
    opens: bool = False,
) -> None:
    """Serve until a signal says stop.

    Args:
        key: that clients must send.
        token: for which the page that is opened gets the key, once.
        opens: whether to open the page.
    """
    import webbrowser

    from phimlx.files import reason
    from phimlx.remote.notes import Note
    from phimlx.server.app import App
    from phimlx.server.run import address, listen, local_address, serve
    from phimlx.terminal.log import show_log

    keeps_history = preferences().get("history") is not False
    app = App(settings, key, token, keeps_history, machines())
    with listen(settings) as opened:
        show_log(output, "phimlx", "uvicorn")
        note = Note(local_address(settings, opened), os.getpid(), app.secret)

        def announce() -> None:
            where = address(settings, opened)
            page = f"{where}/#token={token}" if token else f"{where}/"
            output.json({"url": f"{where}/v1", "page": page})
            output.text(f"Serving at {where}/v1, and a chat page at {page}")
            output.flush()
            if opens and not webbrowser.open(page):
                output.note("No browser could be opened here.")
            try:
                note.write()
            except OSError as error:
                output.warning(f"chat and generate do not find this server: {reason(error)}.")

        try:
            serve(app, settings, opened, announce)
        finally:
            note.remove()


def check(settings: ServerSettings, output: Output) -> None:
    """Check the settings, and say what they mean."""
    output.json(checked(settings, output))


def checked(settings: ServerSettings, output: Output) -> dict[str, Any]:
    """Check the settings as far as that goes without loading a model, and say what they mean.

    Returns what `--json` prints of it.
    """
    from phimlx.server.run import address, listen, read_certificate
    from phimlx.server.served import list_served
    from phimlx.sizes import size_text

    key = read_key(settings)
    read_certificate(settings)
    models = list_served(settings)
    with listen(settings) as opened:
        where = address(settings, opened)
    output.text(f"Would serve at {where}/v1, {'with' if key else 'without'} a key:")
    for model in models:
        output.text(f"  {model.name}  {size_text(model.nbytes)}")
    named = [{"name": model.name, "bytes": model.nbytes} for model in models]
    return {"url": f"{where}/v1", "needs_key": key is not None, "models": named}


def install(settings: ServerSettings, output: Output) -> None:
    """Make the server a service, and start it."""
    from phimlx.server.installed import kept_environment, serve_command, service_manager

    if settings.api_key is not None:
        raise click.UsageError(
            "A service's key would lie in its description: give it with --api-key-file FILE."
        )
    manager = service_manager()
    would = {} if manager.is_running() else checked(settings, output)
    whole = {
        name: str(Path(value).resolve())
        for name in FILES
        if (value := getattr(settings, name)) is not None and Path(value).exists()
    }
    adapters = [each.rpartition("=") for each in settings.adapters]
    found = tuple(
        f"{name}={Path(source).resolve() if Path(source).exists() else source}"
        for name, _, source in adapters
    )
    command = serve_command(to_flags(settings.model_copy(update={**whole, "adapters": found})))
    manager.install(command, kept_environment())
    output.json({**would, "path": str(manager.path), "command": command})
    output.text(f"Installed as {manager.path}.")
    output.note(f"{manager.logs[0].upper()}{manager.logs[1:]}.")


def uninstall(settings: ServerSettings, output: Output) -> None:
    """Stop the service, and forget it."""
    from phimlx.server.installed import service_manager

    removed = service_manager().uninstall()
    output.json({"removed": removed})
    output.text("The service is gone." if removed else "There is no service.")


def status(settings: ServerSettings, output: Output) -> None:
    """Say whether there is a service, and whether it runs."""
    from phimlx.server.installed import service_manager

    manager = service_manager()
    installed = manager.is_installed()
    running = installed and manager.is_running()
    place = str(manager.path) if installed else None
    found = {"installed": installed, "running": running, "path": place}
    wrong = None
    if not installed:
        wrong = {"message": "There is no service.", "hint": "Make it: phimlx serve --install"}
        output.text("There is no service; phimlx serve --install makes one.")
    else:
        logs = f"{manager.logs[0].upper()}{manager.logs[1:]}."
        if not running:
            wrong = {"message": "The service does not run.", "hint": logs}
        output.text(f"The service {'runs' if running else 'does not run'}: {manager.path}")
        output.note(logs)
    output.json(found if wrong is None else {**found, "error": wrong})
    if wrong is not None:
        raise click.exceptions.Exit(1)


ACTIONS = {
    "check": check,
    "install": install,
    "uninstall": uninstall,
    "status": status,
}
