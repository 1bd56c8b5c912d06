"""The settings of a PEFT adapter: what they may say, and what they say of each layer.

Source: peft `config.py`, `tuners/lora/config.py`, `utils/other.py`.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phimlx.adapters.files import CONFIG, number
from phimlx.adapters.resolve import STARTS
from phimlx.errors import ConfigError, shortened

MERGE = "Merge it in PEFT with merge_and_unload, and convert the model that this makes."
PLAIN = (
    "Save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA, "
    "or use it with the base model that its method made."
)
PATTERNS = 4096  # of one table
PATTERN_LENGTH = 1000
PATTERN_SECONDS = 10.0

# Settings that make of an adapter something else, with the values that do not. PEFT writes nearly
# all of them into every config.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "layer_replication": ([],),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False, {}),
    **dict.fromkeys(
        ("arrow_config", "kasa_config", "monteclora_config", "velora_config"), ({}, False)
    ),
}

FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")

# Methods whose first A and B come out of the base weights, by what init_lora_weights begins with.
# Nobody can tell again what the others took.
TAKING = (*STARTS, "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftSettings:
    """What an `adapter_config.json` of PEFT says of a LoRA, checked.

    Attributes:
        flags: those of `FLAGS`.
        saved: ends of the paths of modules that were copied and trained as a whole.
        tokens: of which rows were trained, by the end of a layer's path; of the embedding where
            that is "".
        start: "pissa", "olora" or None.
    """

    ranks: LayerValues
    alphas: LayerValues
    flags: Mapping[str, bool]
    saved: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    start: str | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PeftSettings:
        """Check a config.

        Raises:
            ConfigError: naming what is impossible, or what phimlx does not compute.
        """
        if config.get("peft_type") != "LORA":
            raise ConfigError(
                f"{CONFIG}: peft_type is {shortened(config.get('peft_type'))}; phimlx reads LoRA "
                "and DoRA.",
                hint=MERGE,
            )
        for key, harmless in HARMLESS.items():
            if config.get(key) not in (None, *harmless):
                raise ConfigError(
                    f"{CONFIG}: {key} is {shortened(config[key])}, which phimlx does not compute.",
                    hint=MERGE,
                )
        if config.get("bias") not in (None, "none", "all", "lora_only"):
            raise ConfigError(
                f"{CONFIG}: bias is {shortened(config['bias'])}, not 'none', 'all' or 'lora_only'."
            )
        flags = {key: _flag(config, key) for key in FLAGS}
        if flags["lora_bias"] and flags["use_dora"]:
            raise ConfigError(f"{CONFIG}: lora_bias goes with LoRA, and use_dora is true.")
        for key in ("target_modules", "exclude_modules"):
            value = config.get(key)
            if not (value is None or isinstance(value, str) or _is_list(value, str)):
                raise ConfigError(
                    f"{CONFIG}: {key} is {shortened(value)}, not names of modules or a pattern."
                )
        saved = config.get("modules_to_save")
        if not (saved is None or _is_list(saved, str)):
            raise ConfigError(
                f"{CONFIG}: modules_to_save is {shortened(saved)}, not names of modules."
            )
        return cls(
            LayerValues(config, "r", "rank_pattern"),
            LayerValues(config, "lora_alpha", "alpha_pattern"),
            flags,
            tuple(saved or ()),
            _tokens(config.get("trainable_token_indices")),
            _start(config.get("init_lora_weights")),
        )

    def scale(self, path: str) -> float:
        """Tell what the product of a layer's B and A is multiplied by."""
        rank = self.ranks.of(path)
        return self.alphas.of(path) / (math.sqrt(rank) if self.flags["use_rslora"] else rank)

    def tokens_of(self, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Tell which rows of a layer were trained, of which an array of that shape is stored.

        Raises:
            ConfigError: where nothing tells, or they are not as many.
        """
        ends = [end for end in self.tokens if end and path.endswith(end)]
        found = self.tokens.get(ends[0] if ends else "", ())
        if len(shape) != 2 or len(found) != shape[0]:
            raise ConfigError(
                f"{CONFIG}: trainable_token_indices names {len(found)} tokens of {path}, whose "
                f"trained rows have shape {list(shape)}."
            )
        return found

    def check_named(self, copies: Iterable[str], rows: Iterable[str]) -> None:
        """Raise ConfigError where nothing is stored of what the config says was trained.

        Args:
            copies, rows: paths of the modules and of the layers of which something is stored.
        """
        for ends, paths, key in (
            (self.saved, list(copies), "modules_to_save"),
            (self.tokens, list(rows), "trainable_token_indices"),
        ):
            absent = [end for end in ends if not any(path.endswith(end) for path in paths)]
            if absent:
                names = f" of {shortened(', '.join(absent))}" if any(absent) else ""
                raise ConfigError(f"{CONFIG}: {key} is set, but no weights{names} are there.")

    def is_copy(self, path: str) -> bool:
        """Tell whether a module was copied to be trained as a whole."""
        return any(path.endswith(end) for end in self.saved)


class LayerValues:
    """A setting that a table of patterns changes for some layers: ranks, alphas."""

    def __init__(self, config: Mapping[str, Any], key: str, table_key: str) -> None:
        kind = int if key == "r" else float
        self._key = table_key
        self._usual = number(key, config.get(key), kind)
        table = config.get(table_key) or {}
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{CONFIG}: {table_key} is {shortened(table)}, not a table of values."
            )
        if len(table) > PATTERNS or any(len(pattern) > PATTERN_LENGTH for pattern in table):
            raise ConfigError(
                f"{CONFIG}: {table_key} holds more than {PATTERNS} patterns, or one of more than "
                f"{PATTERN_LENGTH} characters."
            )
        self._patterns = {
            pattern: number(f"{table_key}.{shortened(pattern)}", value, kind)
            for pattern, value in table.items()
        }
        self._values: dict[str, float] = {}

    def read(self, paths: Iterable[str]) -> None:
        """Find the value of every layer that will be asked for."""
        paths, patterns = list(paths), list(self._patterns)
        for path, found in zip(paths, self._matches(patterns, paths), strict=True):
            self._values[path] = self._usual if found is None else self._patterns[patterns[found]]

    def of(self, path: str) -> float:
        """Tell a layer's value: that of the first pattern that the end of its path matches."""
        return self._values[path]

    def _matches(self, patterns: Sequence[str], paths: Sequence[str]) -> Sequence[int | None]:
        """Find the first pattern that matches each path."""
        plain = [re.fullmatch(r"\^?((?:[\w-]|\\?\.)+)\$?", pattern) for pattern in patterns]
        if not all(plain):
            return _match_apart(self._key, patterns, paths)
        ends = [(each[1].replace("\\.", "."), each[0].startswith("^")) for each in plain if each]
        return [
            next(
                (
                    place
                    for place, (end, anchored) in enumerate(ends)
                    if path == end or (not anchored and path.endswith(f".{end}"))
                ),
                None,
            )
            for path in paths
        ]


# A regular expression can take for ever within one call of C, which only a process's end stops.
_MATCHER = """
import json, re, sys
patterns, paths = json.load(sys.stdin)
known = [re.compile(rf"(.*\\.)?({pattern})$") for pattern in patterns]
find = lambda path: next((i for i, each in enumerate(known) if each.match(path)), None)
json.dump([find(path) for path in paths], sys.stdout)
"""


def _match_apart(key: str, patterns: Sequence[str], paths: Sequence[str]) -> Sequence[int | None]:
    """Match as PEFT's `get_pattern_key` does, in a process that is ended at a limit of time."""
    problem = "which are no regular expressions"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([patterns, paths]).encode(),
            capture_output=True,
            timeout=PATTERN_SECONDS,
            check=False,
        )
        if done.returncode == 0:
            found: list[int | None] = json.loads(done.stdout)
            return found
    except subprocess.TimeoutExpired:
        problem = "which take too long to match"
    except OSError:  # no process can be started
        problem = "which cannot be matched here"
    raise ConfigError(
        f"{CONFIG}: {key} has the patterns {shortened(', '.join(patterns))}, {problem}.",
        hint="Write names of layers there.",
    )


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not (value is None or isinstance(value, bool)):
        raise ConfigError(f"{CONFIG}: {key} is {shortened(value)}, not true or false.")
    return value is True


def _start(value: Any) -> str | None:
    """The method that took A and B out of the base weights, where it can be computed again."""
    if not (value is None or isinstance(value, bool | str)):
        raise ConfigError(
            f"{CONFIG}: init_lora_weights is {shortened(value)}, not the name of a method."
        )
    name = str(value).lower()
    if name in STARTS:
        return name
    if name.startswith(TAKING):
        raise ConfigError(
            f"{CONFIG}: init_lora_weights is {shortened(value)}, which changes the model's own "
            "weights too.",
            hint=PLAIN,
        )
    return None


def _tokens(value: Any) -> dict[str, tuple[int, ...]]:
    """Which rows of which layers were trained."""
    table = value if isinstance(value, Mapping) else {"": value}
    found = {}
    for name, tokens in table.items():
        if tokens in (None, []) and not name:
            continue
        if not _is_list(tokens, int) or not all(0 <= token < 1 << 31 for token in tokens):
            raise ConfigError(
                f"{CONFIG}: trainable_token_indices is {shortened(value)}, not a list of tokens."
            )
        if len(set(tokens)) < len(tokens) or not tokens:
            raise ConfigError(
                f"{CONFIG}: trainable_token_indices names no token, or one twice: "
                f"{shortened(tokens)}."
            )
        found[name] = tuple(tokens)
    return found


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(each) is kind for each in value)
