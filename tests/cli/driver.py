"""The command line with a scripted model: `python -m tests.cli.driver SCRIPTS ARGUMENT...`.

SCRIPTS is a JSON list of replies; each is a text, a list of texts and [kind, text] pairs, or an
object with such a list as `pieces`. Where stdin is a terminal it becomes the controlling one, as
it is for a program started by a shell.
"""

from __future__ import annotations

import fcntl
import json
import sys
import termios
from typing import Any

from phimlx import api
from phimlx.cli.main import main
from phimlx.errors import GenerationError
from phimlx.prompt.tools import ToolCall
from tests.terminal.fake_phi import FakePhi, Script


def as_script(value: Any) -> Script:
    if isinstance(value, str):
        return Script([value])
    if isinstance(value, list):
        value = {"pieces": value}
    pieces = [item if isinstance(item, str) else tuple(item) for item in value["pieces"]]
    script = Script(
        pieces * value.get("repeat", 1), finish_reason=value.get("finish_reason", "stop")
    )
    if "error" in value:
        script.error = GenerationError(value["error"], "Say less.")
    if "tool_calls" in value:
        script.tool_calls = [ToolCall(**call) for call in value["tool_calls"]]
    return script


if __name__ == "__main__":
    if sys.stdin.isatty():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    phi = FakePhi(*map(as_script, json.loads(sys.argv[1])))
    phi.takes_media = phi.hears = True
    api.load = lambda *arguments: phi  # type: ignore[assignment,return-value]
    sys.argv = ["phimlx", *sys.argv[2:]]
    main()
