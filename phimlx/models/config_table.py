"""Tables in a `config.json`, such as those of encoders, each value checked as it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phimlx.errors import ConfigError, shortened

LARGEST = 1 << 16  # a hostile config must not make us build a network without end


@dataclass(frozen=True)
class ConfigTable:
    """One table of a config.

    Attributes:
        model: whose it is, for people.
        place: where in the config it stands: "vision_config.".

    Every method raises ConfigError, naming the key, for a value that cannot be.
    """

    values: Mapping[str, Any]
    model: str
    place: str = ""

    def table(self, key: str, optional: bool = False) -> ConfigTable:
        """Read a table in this one; an empty one where it is absent and `optional`."""
        values = self.values.get(key)
        if values is None and optional:
            values = {}
        if not isinstance(values, Mapping):
            found = "missing" if values is None else f"{shortened(values)}, not a table of values"
            raise ConfigError(f"config.json: {self.place}{key} is {found}.")
        return ConfigTable(values, self.model, f"{self.place}{key}.")

    def count(self, key: str, default: int | None = None) -> int:
        """Read a whole number from 1 on; `default` where it is absent."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"config.json: {self.place}{key} is missing.")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
            raise ConfigError(
                f"config.json: {self.place}{key} is {shortened(value)}, not a whole number from 1 "
                f"to {LARGEST}."
            )
        return value

    def check(self, expected: Mapping[str, Any]) -> None:
        """Check keys that change a network, and of which we compute one value each."""
        for key, only in expected.items():
            if self.values.get(key) not in (None, only):
                raise ConfigError(
                    f"config.json: {self.place}{key} is {shortened(self.values[key])}, but "
                    f"{self.model} has {shortened(only)} here."
                )

    def check_multiple(self, key: str, value: int, divisor: int) -> None:
        """Check that one number divides another."""
        if value % divisor:
            raise ConfigError(
                f"config.json: {self.place}{key} ({value}) is not a multiple of {divisor}."
            )
