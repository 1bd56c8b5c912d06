"""The models on this machine: which there are, how much they take, whether they are whole.

Knows the layout of huggingface_hub's cache, where they lie; knows nothing of the network.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phimlx import catalog
from phimlx.errors import DownloadError
from phimlx.hub.client import RemoteFile, explained
from phimlx.hub.transfer import PARTIAL, Report, is_right, locked, record_of
from phimlx.models import registry

# All that a model may have below its top folder, whatever a Hub or a record may name.
ADAPTER_FILES = tuple(
    f"{folder}/{name}"
    for folder in registry.adapter_folders()
    for name in ("adapter_config.json", "adapter_model.safetensors")
)

_DTYPE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
_CONTENT_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Stored:
    """A repository of which something is in the store.

    Attributes:
        repository: its name on the Hub.
        home: the folder with all of it, partial files among it.
        snapshot: the folder of the model, or None where no whole copy is here.
        bits: of a weight, or None where its config does not tell.
        nbytes: on disk, partial files among them.
        last_used: when its largest file was last read, as exactly as the file system notes it.
    """

    repository: str
    home: Path
    snapshot: Path | None
    bits: int | None
    nbytes: int
    last_used: datetime | None

    @property
    def alias(self) -> str | None:
        """The catalogue's name, or None for another model."""
        known = catalog.find(self.repository)
        return known.alias if known else None


def cache() -> Path:
    """huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def home_of(repo: str) -> Path:
    """Where the cache keeps a repository."""
    return cache() / f"models--{repo.replace('/', '--')}"


def find_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The newest whole copy of a repository in the cache, its main branch first.

    Args:
        revision: a branch, tag or commit that the copy must be of.
    """
    home = home_of(repo)
    named = home / "refs" / (revision or "main")
    pinned = [home / "snapshots" / named.read_text().strip()] if named.is_file() else []
    if revision is not None:
        candidates = pinned or [home / "snapshots" / revision]
    else:
        newest = sorted(home.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
        candidates = [*pinned, *reversed(newest)]
    return next((folder for folder in candidates if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether a downloaded folder has its config, its tokenizer and every weight file.

    A file gets its name when it is complete, so what is there is whole.
    """
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return False
    names = set(map(str, weight_map.values()))
    return all((folder / name).is_file() for name in names)


def models() -> list[Stored]:
    """Every model of the family that is in the cache, whole or not, by name."""
    found = []
    for home in sorted(cache().glob("models--*--*")):
        repo = home.name.removeprefix("models--").replace("--", "/", 1)
        stored = read(repo)
        if stored is not None and _is_family(stored):
            found.append(stored)
    return found


def read(repo: str) -> Stored | None:
    """What is in the cache of one repository, or None where nothing is."""
    home = home_of(repo)
    if not home.is_dir():
        return None
    snapshot = find_snapshot(repo)
    begun = (path.parent for path in home.glob("snapshots/*/config.json"))
    folder = snapshot or next(begun, None)
    stats = [file.stat() for file in _files(home)]
    largest = max(stats, key=lambda stat: stat.st_size, default=None)
    return Stored(
        repository=repo,
        home=home,
        snapshot=snapshot,
        bits=None if folder is None else bits_of(folder),
        nbytes=sum(stat.st_size for stat in stats),
        last_used=None if largest is None else datetime.fromtimestamp(largest.st_atime, UTC),
    )


def remove(stored: Stored) -> None:
    """Delete a repository from the cache: every revision of it, and partial files.

    Raises:
        DownloadError: where a download of it is under way, or the disk refuses.
    """
    if stored.home.is_symlink():
        raise DownloadError(
            f"{stored.home} is a link to another place, so it is left alone.",
            hint="Delete the folder that it points to, then the link.",
        )
    root = stored.home.parent
    locks = root / ".locks" / stored.home.name
    with explained(stored.repository, place=root), ExitStack() as held:
        for lock in sorted(locks.glob("*.lock")):
            held.enter_context(locked(lock, lambda: _refuse(stored)))
        _release_shared(root, stored.home)
        # What points to contents goes first: an interruption leaves nothing that looks whole.
        for folder in (stored.home / "snapshots", stored.home):
            if folder.exists():
                shutil.rmtree(folder)
        shutil.rmtree(locks, ignore_errors=True)


def verify(folder: Path, report: Report = lambda file, nbytes: None) -> tuple[int, list[str]]:
    """Check the files of a model folder against the hashes that came with them.

    Returns:
        How many files have the contents that they should, and the names of those of which
        nothing is recorded.

    Raises:
        DownloadError: naming what is missing or damaged.
    """
    recorded = _recorded(folder)
    here = files_of(folder)
    missing = sorted(recorded.keys() - here)
    wrong = [
        name
        for name in sorted(recorded.keys() & here)
        if (folder / name).stat().st_size != recorded[name].size
        or not is_right(folder / name, recorded[name], report)
    ]
    for what, which in (("lacks", missing), ("is damaged:", wrong)):
        if which:
            raise DownloadError(
                f"{folder} {what} {', '.join(which)}.",
                hint="Download it again; what is right stays as it is.",
            )
    return len(recorded), sorted(here.keys() - recorded)


def recorded_bytes(folder: Path) -> int:
    """Size of the files that `verify` reads."""
    return sum(file.size for file in _recorded(folder).values())


def files_of(folder: Path) -> dict[str, Path]:
    """A model's files by their names in the repository, links followed, hidden ones left out."""
    return {name: path for name, path in _entries(folder).items() if path.is_file()}


def _entries(folder: Path) -> dict[str, Path]:
    """What may be a model's file, by name."""
    entries = {path.name: path for path in folder.iterdir() if path.name[0] != "."}
    return entries | {name: folder / name for name in ADAPTER_FILES}


def _recorded(folder: Path) -> dict[str, RemoteFile]:
    """What is known of a folder's files: by a download's record, or by the names of blobs."""
    entries = _read_json(record_of(folder)).get("files") if record_of(folder).is_file() else None
    if isinstance(entries, dict):
        try:
            return {
                name: RemoteFile(name, int(entry["size"]), str(entry["hash"]))
                for name, entry in entries.items()
                if "/" not in name or name in ADAPTER_FILES
            }
        except (KeyError, TypeError, ValueError):
            return {}
    found = {}
    for name, path in _entries(folder).items():
        blob = Path(os.readlink(path)) if path.is_symlink() else path
        if blob.parent.name == "blobs" and _CONTENT_HASH.fullmatch(blob.name):
            size = path.stat().st_size if path.exists() else 0
            found[name] = RemoteFile(name, size, blob.name)
    return found


def _refuse(stored: Stored) -> None:
    raise DownloadError(
        f"{stored.repository} is being downloaded right now.",
        hint="Wait for that download, or stop it, then run this again.",
    )


def _release_shared(root: Path, home: Path) -> None:
    """Have huggingface_hub delete a repository that shares contents with others in its cache.

    From its version 2 on, blobs may be links into one store for all repositories; only it knows
    which of those contents nobody else needs.
    """
    if not any(path.is_symlink() for path in home.glob("blobs/*")):
        return
    from huggingface_hub import scan_cache_dir

    # By revisions it would delete copies too: repositories that were duplicated share commits.
    nothing = scan_cache_dir(root).delete_revisions()
    replace(nothing, repos=frozenset({home})).execute()


def _is_family(stored: Stored) -> bool:
    configs = [_config(path.parent) for path in stored.home.glob("snapshots/*/config.json")]
    if configs:
        return any(registry.find(config.get("model_type")) for config in configs)
    return stored.alias is not None or any(stored.home.glob(f"blobs/*{PARTIAL}"))


def _files(home: Path) -> Iterator[Path]:
    """The files that hold contents: blobs, and in snapshots what is no link to one."""
    for path in home.glob("blobs/*"):
        if path.is_file():
            yield path
    for path in home.glob("snapshots/*/**/*"):
        if path.is_file() and not path.is_symlink():
            yield path


def _config(snapshot: Path) -> dict[str, Any]:
    return _read_json(snapshot / "config.json")


def bits_of(folder: Path) -> int | None:
    """Bits of a weight, or None where the folder's config does not tell."""
    config = _config(folder)
    quantization = config.get("quantization")
    if isinstance(quantization, dict):
        bits = quantization.get("bits")
        return bits if isinstance(bits, int) else None
    return _DTYPE_BITS.get(str(config.get("dtype") or config.get("torch_dtype")))


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file holds none."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
