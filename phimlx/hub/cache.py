"""The models on this machine: which there are, how much they take, whether they are whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phimlx import catalog
from phimlx.errors import ConfigError, DownloadError
from phimlx.files import is_file, read_json, translate_read_errors
from phimlx.hub.client import RemoteFile, translate_errors
from phimlx.hub.destination import PARTIAL, read_record
from phimlx.hub.layout import (
    RepositoryFolder,
    cache_folder,
    model_folders,
    recorded_hash,
)
from phimlx.hub.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    entries_of,
    files_of,
    is_whole,
    is_whole_adapter,
)
from phimlx.hub.transfer import ProgressCallback, locked, matches_hash, no_progress
from phimlx.models import registry

_DTYPE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclass(frozen=True)
class CachedModel:
    """A repository of a model, or of an adapter, of which something is in the cache.

    Attributes:
        repository: its name on the Hub.
        home: its place in the cache.
        snapshot: the folder of the model, or None where no whole copy is here.
        is_adapter: whether it is an adapter, not a model.
        bits: of a weight, or None where its config does not tell.
        nbytes: on disk, partial files among them.
        last_used: when its largest file was last read, as exactly as the file system notes it.
        problem: why nothing more is known of it, in a sentence; None where it can be read.
    """

    repository: str
    home: RepositoryFolder
    snapshot: Path | None = None
    is_adapter: bool = False
    bits: int | None = None
    nbytes: int = 0
    last_used: datetime | None = None
    problem: str | None = None

    @property
    def state(self) -> str:
        """`complete`, `partial` or `unreadable`."""
        if self.problem is not None:
            return "unreadable"
        return "partial" if self.snapshot is None else "complete"

    @property
    def alias(self) -> str | None:
        """The catalogue's name, or None for another model."""
        known = catalog.find(self.repository)
        return known.alias if known else None


def find_snapshot(
    repo: str, revision: str | None = None, whole: Callable[[Path], bool] = is_whole
) -> Path | None:
    """Find the newest whole copy of a repository in the cache, its main branch first.

    Args:
        revision: a branch, tag or commit that the copy must be of.
        whole: tells whether a folder is; `is_whole_adapter` for an adapter.

    Raises:
        DownloadError: where the cache cannot be read.
    """
    home = RepositoryFolder(cache_folder(), repo)
    with _readable(home.path):
        commit = home.noted_commit(revision or "main")
        candidates = [] if commit is None else [home.snapshot(commit)]
        if revision is not None:
            candidates = candidates or [home.snapshot(revision)]
        else:
            candidates += reversed(home.list_snapshots())
        return next((folder for folder in candidates if whole(folder)), None)


def list_models() -> list[CachedModel]:
    """List every model of the family that is in the cache, whole or not, by name.

    A folder that cannot be read may be one too, so it is listed with its problem.

    Raises:
        DownloadError: where the cache itself cannot be read.
    """
    root = cache_folder()
    with _readable(root):
        homes = model_folders(root)
    found = []
    for home in homes:
        try:
            with _readable(home.path):
                model = find_model(home.name) if _is_family(home) else None
        except DownloadError as error:
            model = CachedModel(home.name, home, problem=str(error))
        if model is not None:
            found.append(model)
    return found


def find_model(repo: str) -> CachedModel | None:
    """Find what is in the cache of one repository; None where nothing is.

    Raises:
        DownloadError: where it cannot be read.
    """
    home = RepositoryFolder(cache_folder(), repo)
    snapshot = bits = problem = None
    is_adapter = False
    with _readable(home.path):
        if not home.path.is_dir():
            return None
        try:
            snapshot = find_snapshot(repo)
            is_adapter = snapshot is None and _is_adapter(home)
            if is_adapter:
                snapshot = find_snapshot(repo, whole=is_whole_adapter)
            begun = (path for path in home.list_snapshots() if is_file(path / "config.json"))
            folder = snapshot or next(begun, None)
            bits = None if folder is None or is_adapter else bits_of(folder)
        except ConfigError as error:
            problem = str(error)
        stats = list(home.contents())
    largest = max(stats, key=lambda stat: stat.st_size, default=None)
    return CachedModel(
        repository=repo,
        home=home,
        snapshot=None if problem else snapshot,
        is_adapter=is_adapter,
        bits=bits,
        nbytes=sum(stat.st_size for stat in stats),
        last_used=None if largest is None else datetime.fromtimestamp(largest.st_atime, UTC),
        problem=problem,
    )


def remove(model: CachedModel) -> None:
    """Delete a repository from the cache: every revision of it, and partial files.

    Raises:
        DownloadError: where a download of it is under way, or the disk refuses.
    """
    home = model.home
    if home.path.is_symlink():
        raise DownloadError(
            f"{home.path} is a link to another place, so it is left alone.",
            hint="Delete the folder that it points to, then the link.",
        )
    with translate_errors(model.repository, place=home.root), ExitStack() as held:
        for lock in sorted(home.locks.glob("*.lock")):
            held.enter_context(locked(lock, lambda: _refuse(model)))
        _release_shared(home)
        # What points to contents goes first: an interruption leaves nothing that looks whole.
        for folder in (home.snapshots, home.path):
            if folder.exists():
                shutil.rmtree(folder)
        shutil.rmtree(home.locks, ignore_errors=True)


def verify(folder: Path, progress: ProgressCallback = no_progress) -> tuple[int, list[str]]:
    """Check the files of a model folder against the hashes that came with them.

    Returns:
        How many files have the contents that they should, and the names of those of which
        nothing is recorded.

    Raises:
        DownloadError: naming what is missing, damaged or cannot be read.
    """
    with _readable(folder):
        recorded = _recorded(folder)
        here = files_of(folder)
        missing = sorted(recorded.keys() - here)
        wrong = [
            name
            for name in sorted(recorded.keys() & here)
            if (folder / name).stat().st_size != recorded[name].size
            or not matches_hash(folder / name, recorded[name], progress)
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
    with _readable(folder):
        return sum(file.size for file in _recorded(folder).values())


def bits_of(folder: Path) -> int | None:
    """Bits of a weight, or None where the folder's config does not tell.

    Raises:
        ConfigError: where that cannot be read.
    """
    config = read_json(folder / "config.json", hint="Download the model again.")
    quantization = config.get("quantization")
    if isinstance(quantization, dict):
        bits = quantization.get("bits")
        return bits if isinstance(bits, int) else None
    return _DTYPE_BITS.get(str(config.get("dtype") or config.get("torch_dtype")))


def _recorded(folder: Path) -> dict[str, RemoteFile]:
    """List what is known of a folder's files, by a download's record or by the names of blobs."""
    record = read_record(folder)
    if record is not None:
        known = record.files.items()
        return {name: file for name, file in known if "/" not in name or name in ADAPTER_FILES}
    found = {}
    for name, path in entries_of(folder).items():
        hash = recorded_hash(path)
        if hash is not None:
            size = path.stat().st_size if path.exists() else 0
            found[name] = RemoteFile(name, size, hash)
    return found


def _refuse(model: CachedModel) -> None:
    raise DownloadError(
        f"{model.repository} is being downloaded right now.",
        hint="Wait for that download, or stop it, then run this again.",
    )


def _release_shared(home: RepositoryFolder) -> None:
    """Have huggingface_hub delete a repository that shares contents with others in its cache.

    From its version 2 on, blobs may be links into one store for all repositories; only it knows
    which of those contents nobody else needs.
    """
    if not any(path.is_symlink() for path in home.blobs.glob("*")):
        return
    from huggingface_hub import scan_cache_dir

    # By revisions it would delete copies too: repositories that were duplicated share commits.
    nothing = scan_cache_dir(home.root).delete_revisions()
    replace(nothing, repos=frozenset({home.path})).execute()


def _is_family(home: RepositoryFolder) -> bool:
    """Whether a config says so; where none is here or can be read, the name or a download of ours.

    Raises:
        OSError: where the repository's folder cannot be read.
    """
    told: list[Mapping[str, Any]] = []
    for snapshot in home.list_snapshots():
        if is_file(snapshot / "config.json"):
            with suppress(ConfigError):
                told.append(read_json(snapshot / "config.json"))
    if told:
        return any(map(is_of_family, told))
    if _is_adapter(home):
        return any(map(_adapts_family, home.list_snapshots()))
    return catalog.find(home.name) is not None or home.has_blob_like(PARTIAL)


def _is_adapter(home: RepositoryFolder) -> bool:
    """Whether a repository is an adapter's: it has the config of one, and none of a model."""
    folders = home.list_snapshots()
    has = [
        any(is_file(each / name) for each in folders) for name in (ADAPTER_CONFIG, "config.json")
    ]
    return has == [True, False]


def _adapts_family(folder: Path) -> bool:
    """Whether an adapter's config names a model of the family; where it names none, it may be."""
    with suppress(ConfigError):
        config = read_json(folder / ADAPTER_CONFIG, missing_ok=True)
        named = config.get("base_model_name_or_path", config.get("model"))
        if isinstance(named, str) and catalog.find(named) is None:
            return re.search(r"(?<![a-z])phi(?![a-z])", named, re.IGNORECASE) is not None
    return True


def is_of_family(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of a model that phimlx knows."""
    dialect = registry.dialect_of(config)
    if dialect is not None and dialect.is_shared:
        return catalog.has_known_sizes(config)
    return bool(registry.find(config.get("model_type")))


def _readable(place: Path) -> AbstractContextManager[None]:
    hint = "Make it yours to read, or set HF_HOME to another folder."
    return translate_read_errors(place, DownloadError, hint)
