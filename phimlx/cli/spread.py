"""Several files after one flag, as in `--image a.png b.png`."""

from __future__ import annotations

import os

import click

from phimlx.media.kinds import kind_of

KINDS = ("image", "audio", "video")


class SpreadFiles(click.Command):
    """A command whose --image, --audio and --video take the files of their kind that follow."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat a flag before each further file, told by the end of its name."""
        return super().parse_args(ctx, spread(args))


def spread(args: list[str]) -> list[str]:
    """Put a flag before each file that follows its first."""
    found: list[str] = []
    flag, awaited = "", False
    for place, arg in enumerate(args):
        if arg == "--":
            return [*found, *args[place:]]
        if awaited:
            awaited = False
        elif arg.startswith("-") and arg != "-":
            name, equals, _ = arg.partition("=")
            flag = name if name.removeprefix("--") in KINDS else ""
            awaited = bool(flag) and not equals
        elif flag and _is_file(arg, flag.removeprefix("--")):
            found.append(flag)
        else:
            flag = ""
        found.append(arg)
    return found


def _is_file(arg: str, kind: str) -> bool:
    """Whether it is a file of the kind rather than a prompt that ends with the name of one."""
    return kind_of(arg) == kind and (len(arg.split()) == 1 or os.path.exists(arg))
