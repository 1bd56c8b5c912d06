"""Flags that belong together, as a dataclass whose fields declare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from functools import wraps
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def flag(*names: str, **settings: Any) -> Any:
    """Declare a field of a group as `click.option` declares a parameter."""
    return field(metadata={"names": names, "settings": settings})


def flag_group(group: type, argument: str) -> Callable[[Command], Command]:
    """Add a group's flags to a command, which takes them as one object under `argument`."""

    def add(command: Command) -> Command:
        @wraps(command)
        def grouped(**values: Any) -> Any:
            own = {each.name: values.pop(each.name) for each in fields(group)}
            return command(**values, **{argument: group(**own)})

        made: Any = grouped
        for each in reversed(fields(group)):
            names, settings = each.metadata["names"], each.metadata["settings"]
            made = click.option(*names, each.name, **settings)(made)
        return made

    return add
