"""Settings of the server, checked once."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from phimlx.options import Count, Options, Positive, PositiveCount, Text, option
from phimlx.server.duration import read_seconds


class ServerSettings(Options):
    """Settings of `phimlx serve`: flags, and a configuration file's names."""

    model: Text | None = option(
        None,
        "Serve this model alone; else every model on this machine, by its name.",
        "--model",
        metavar="MODEL",
    )
    adapters: tuple[Text, ...] = option(
        (),
        "LoRA to serve beside its model, as MODEL:NAME; may be given again.",
        "--adapter",
        metavar="NAME=FOLDER",
    )
    host: Text = option("127.0.0.1", "Address to listen at; beyond this machine with a key only.")
    port: Annotated[int, Field(ge=0, le=65535)] = option(8080, "Port to listen at; 0 for any.")
    api_key: Text | None = option(None, "Key that clients must send.", metavar="KEY")
    api_key_file: Text | None = option(None, "File that holds the key.", metavar="FILE")
    no_auth: bool = option(False, "Listen beyond this machine without a key.", "--no-auth")
    allowed_hosts: tuple[Text, ...] = option(
        (), "Name under which clients reach the server; may be given again.", "--allowed-host"
    )
    cors: tuple[Text, ...] = option(
        (), "Origin whose pages may ask, such as https://app.example; may be given again.", "--cors"
    )
    keep_alive: Annotated[float, BeforeValidator(read_seconds)] = option(
        300.0,
        "How long a model stays without a request: seconds, 5m, or -1 for ever.",
        metavar="TIME",
        what="seconds, a time such as 5m, or -1 for ever",
    )
    max_tokens: PositiveCount | None = option(
        None, "The most that a reply may have; what the context holds where not given."
    )
    batch_size: PositiveCount = option(16, "Requests that are answered together.")
    queue: PositiveCount = option(64, "Requests that may wait; more are told to come later.")
    request_seconds: Positive = option(
        3600.0, "Longest time for one request.", "--timeout", metavar="SECONDS"
    )
    grace_seconds: Positive = option(
        30.0, "Time to finish what runs when told to stop.", "--grace", metavar="SECONDS"
    )
    prefix_tokens: Count = option(
        32_768, "Tokens of earlier requests that later ones may go on from, held in memory."
    )
    no_cache: bool = option(False, "Keep nothing of long prompts on disk.", "--no-cache")
    fetch_media: bool = option(False, "Fetch pictures from https addresses that requests name.")
    step_seconds: Positive = option(
        300.0,
        "Time after which a step that does not end is told at /health.",
        "--watchdog",
        metavar="SECONDS",
    )
    log_prompts: bool = option(False, "Write what is asked and answered to the log.")
    ssl_certfile: Text | None = option(None, "Certificate, for https.", metavar="FILE")
    ssl_keyfile: Text | None = option(None, "Its key, where not in the same file.", metavar="FILE")

    @property
    def max_body(self) -> int:
        """Bytes that the body of a request may have."""
        return 64_000_000
