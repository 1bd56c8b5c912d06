"""`phimlx ui`: the chat page, for this person alone."""

from __future__ import annotations

import secrets

import click

from phimlx.cli.options import json_option
from phimlx.terminal.output import Output


@click.command()
@click.option("--model", metavar="MODEL", help="Use this model alone; else any on this machine.")
@click.option("--port", metavar="N", type=click.IntRange(0, 65535), default=0, help="Port to use.")
@click.option("--no-open", is_flag=True, help="Print the address, and open no browser.")
@json_option
def command(model: str | None, port: int, no_open: bool, as_json: bool) -> None:
    """Chat on a page in the browser, until Ctrl-C.

    The address is good for one browser, once: nobody else on this machine can chat along.
    """
    from phimlx.cli.serve import run
    from phimlx.server.settings import ServerSettings

    settings = ServerSettings(port=port, model=model)
    key, token = secrets.token_urlsafe(24), secrets.token_urlsafe(24)
    run(settings, Output(json=as_json), key, token, opens=not no_open)
