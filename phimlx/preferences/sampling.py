"""Settings of a reply and their bounds: one table behind flags, `/set` and files of settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from phimlx.errors import PhimlxError, shortened
from phimlx.prompt.reasoning import MODES


class FiniteRange(click.FloatRange):
    """A float within bounds; `nan` and `inf`, which pass every comparison, are refused."""

    name = "number"  # as click's messages have it

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class NonEmpty(click.types.StringParamType):
    """Text of at least one character."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("empty text stops nothing.", param, ctx)
        return str(super().convert(value, param, ctx))


@dataclass(frozen=True)
class Setting:
    """One setting of a reply: its keyword in `Phi.generate`, its flag, what it accepts."""

    keyword: str
    flag: str
    type: click.ParamType[Any]
    help: str
    short: str | None = None
    multiple: bool = False

    @property
    def metavar(self) -> str:
        """Return what stands for the value in help."""
        if isinstance(self.type, click.Choice):
            return "|".join(map(str, self.type.choices))
        return {"integer range": "N", "number": "X"}.get(self.type.name, "TEXT")

    @property
    def name(self) -> str:
        """Return the name in `/set`: the flag without its dashes."""
        return self.flag.removeprefix("--")


SETTINGS = (
    Setting(
        "max_tokens",
        "--max-tokens",
        click.IntRange(min=1),
        "Stop after this many tokens; without it at the context's end.",
        short="-m",
    ),
    Setting(
        "temperature", "--temp", FiniteRange(min=0), "Randomness; 0 takes the likeliest token."
    ),
    Setting(
        "top_p",
        "--top-p",
        FiniteRange(min=0, max=1, min_open=True),
        "Sample among the likeliest tokens of this total probability.",
    ),
    Setting("top_k", "--top-k", click.IntRange(min=0), "Sample among this many; 0 for all."),
    Setting(
        "min_p",
        "--min-p",
        FiniteRange(min=0, max=1),
        "Drop tokens less likely than this share of the likeliest.",
    ),
    Setting(
        "repetition_penalty",
        "--repetition-penalty",
        FiniteRange(min=0, min_open=True),
        "Divide the odds of tokens that were there before; 1 for none.",
    ),
    Setting(
        "presence_penalty",
        "--presence-penalty",
        FiniteRange(min=-2, max=2),
        "Lower the score of tokens already said, once.",
    ),
    Setting(
        "frequency_penalty",
        "--frequency-penalty",
        FiniteRange(min=-2, max=2),
        "Lower the score of tokens already said, each time.",
    ),
    Setting("seed", "--seed", click.IntRange(0, 2**64 - 1), "Make sampling repeatable."),
    Setting(
        "reasoning",
        "--reasoning",
        click.Choice(MODES),
        "Whether a reply begins with thought, of models that leave it open.",
    ),
    Setting("stop", "--stop", NonEmpty(), "Stop before this text; may be given again.", None, True),
)

LONGEST = 200  # characters that click says of a value

_BY_NAME = {
    key: setting
    for setting in SETTINGS
    for key in (setting.name, setting.keyword.replace("_", "-"))
}


def find_setting(name: str) -> Setting:
    """Find the setting called `name`: as a flag without dashes, or as `Phi.generate` calls it.

    Raises `PhimlxError` where there is none.
    """
    setting = _BY_NAME.get(name.removeprefix("--").replace("_", "-"))
    if setting is None:
        known = ", ".join(setting.name for setting in SETTINGS)
        raise PhimlxError(f"There is no setting {shortened(name)}.", f"The settings are {known}.")
    return setting


def parse_setting(setting: Setting, text: str) -> Any:
    """Parse `text` as a value of `setting`, as its flag would.

    Raises `PhimlxError` that says what the setting accepts.
    """
    value = convert(setting, text)
    return (value,) if setting.multiple else value


def check_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check settings read back from a file, by keyword, each against its bounds.

    Raises `PhimlxError` that names the first one that does not hold.
    """
    checked: dict[str, Any] = {}
    for keyword, value in values.items():
        setting = find_setting(keyword)
        items = value if setting.multiple and isinstance(value, list) else [value]
        parsed = [convert(setting, item) for item in items]
        if parsed != items or any(isinstance(item, bool) for item in items):
            raise PhimlxError(f"{setting.name}: {shortened(value)} is not a valid value.")
        checked[setting.keyword] = tuple(parsed) if setting.multiple else parsed[0]
    return checked


def convert(setting: Setting, value: Any) -> Any:
    """Convert one value as the setting's flag does; raises `PhimlxError`."""
    try:
        return setting.type.convert(value, None, None)
    except click.BadParameter as error:
        if len(error.message) <= LONGEST:
            raise PhimlxError(f"{setting.name}: {error.message}") from None
    except (TypeError, ArithmeticError):
        pass
    raise PhimlxError(f"{setting.name}: {shortened(value)} is not a valid value.")


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given: without those left at their default."""
    return {keyword: value for keyword, value in values.items() if value not in (None, ())}
