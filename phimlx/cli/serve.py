"""`phimlx serve`: models of this machine behind the APIs that other programs speak."""

from __future__ import annotations

import os
from typing import Any

import click

from phimlx.options import click_options, from_flags
from phimlx.server.settings import ServerSettings
from phimlx.terminal.output import Output


@click.command()
@click_options(ServerSettings)
def command(**flags: Any) -> None:
    """Serve models to programs that speak OpenAI's API.

    \b
      phimlx serve                       every model on this machine, at 127.0.0.1:8080
      phimlx serve --model phi-4-mini    one model, loaded at once

    Without a key only this machine is served. PHIMLX_API_KEY may hold the key.
    """
    from phimlx.server.app import App
    from phimlx.server.run import listen, read_key, serve
    from phimlx.terminal.log import show_log

    settings = from_flags(ServerSettings, flags)
    output = Output()
    key = read_key(settings, os.environ.get("PHIMLX_API_KEY"))
    app = App(settings, key)
    with listen(settings) as opened:
        host, port = opened.getsockname()[:2]
        scheme = "https" if settings.ssl_certfile else "http"
        where = f"[{host}]" if ":" in host else host
        show_log(output, "phimlx", "uvicorn")

        def announce() -> None:
            output.text(f"Serving at {scheme}://{where}:{port}/v1")
            output.flush()

        serve(app, settings, opened, announce)
