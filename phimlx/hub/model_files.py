"""The files that are a model: which of a repository it needs, and which of a folder go along.

Never code, and no pickles.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from phimlx.errors import ConfigError, ConversionError
from phimlx.files import MAX_BYTES, is_file, read_json
from phimlx.hub import layout
from phimlx.models import registry
from phimlx.sizes import size_text

# What a model needs of a repository's top folder.
WANTED = (
    "*.json",
    "*.jinja",
    "model*.safetensors",
    "gptq_model*.safetensors",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
)

# All that a model may have below its top folder, whatever a Hub or a record may name.
ADAPTER_FILES = tuple(
    f"{folder}/{name}"
    for folder in registry.adapter_folders()
    for name in ("adapter_config.json", "adapter_model.safetensors")
)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
# What an adapter needs of a repository's top folder: itself, and a tokenizer that has more tokens.
ADAPTER_WANTED = (
    ADAPTER_CONFIG,
    *ADAPTER_WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)

# What goes along with converted weights, where the source has it.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COMPANIONS = (
    *TOKENIZER,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.md",
)


def is_wanted(name: str, patterns: Sequence[str] = WANTED) -> bool:
    """Whether a model, or what the patterns are of, needs a file of that name from a top folder."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)


def download_order(name: str) -> tuple[bool, bool, str]:
    """Sort key by which files come: weights last, and the base's after those of adapters.

    What is wrong with a config shows early, and half a model never looks whole (see `is_whole`).
    """
    is_weights = name.endswith(".safetensors")
    return is_weights, is_weights and "/" not in name, name


def is_whole(folder: Path) -> bool:
    """Whether a downloaded folder has its config, its tokenizer and every weight file.

    A file gets its name when it is complete, so what is there is whole.

    Raises:
        OSError: where the folder cannot be read.
    """
    if not all(is_file(folder / name) for name in ("config.json", "tokenizer.json")):
        return False
    index, single = folder / "model.safetensors.index.json", "model.safetensors"
    if not is_file(index):
        return is_file(folder / single) or any(folder.glob("gptq_model*.safetensors"))
    try:
        weight_map = read_json(index).get("weight_map")
    except ConfigError:  # it names no file that could be whole
        weight_map = None
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if single not in names and is_file(folder / single):
        return True  # the index is of other weights; see `Checkpoint`
    return bool(names) and all(is_file(folder / name) for name in names)


def is_whole_adapter(folder: Path) -> bool:
    """Whether a downloaded folder has an adapter's config and its weights.

    Raises:
        OSError: where the folder cannot be read.
    """
    has_weights = any(is_file(folder / name) for name in ADAPTER_WEIGHTS)
    return has_weights and is_file(folder / ADAPTER_CONFIG)


def files_of(folder: Path) -> dict[str, Path]:
    """List a model's files by their names in the repository, links followed, no hidden ones."""
    return {name: path for name, path in entries_of(folder).items() if path.is_file()}


def entries_of(folder: Path) -> dict[str, Path]:
    """List what may be a model's file, by name: also links that lead nowhere."""
    entries = {path.name: path for path in folder.iterdir() if path.name[0] != "."}
    return entries | {name: folder / name for name in ADAPTER_FILES}


def companions(folder: Path) -> dict[str, Path]:
    """Real files of `COMPANIONS` in a model's folder, by name, links followed.

    Raises:
        ConversionError: for one that is too large, no file, or a link out of the folder.
    """
    home = layout.home_of(folder.resolve())
    found = {}
    for name in COMPANIONS:
        if not os.path.lexists(folder / name):
            continue
        file = Path(os.path.realpath(folder / name))  # a link to itself raises nothing here
        if not file.is_file():
            raise ConversionError(f"{name} is not a file.")
        if not file.is_relative_to(home):
            raise ConversionError(
                f"{name} is a link to a file outside the model's folder.",
                hint="Put the file itself there.",
            )
        if file.stat().st_size > MAX_BYTES:
            raise ConversionError(f"{name} is larger than {size_text(MAX_BYTES)}.")
        found[name] = file
    return found
