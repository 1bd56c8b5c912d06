"""The Hub <-> this machine: which folder a name means, and how a model comes here.

Knows names and the catalogue; knows nothing of HTTP, nor of what is inside the weights.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from phimlx import catalog
from phimlx.errors import DownloadError, ModelAbsentError, ModelNotFoundError, shortened
from phimlx.hub import cache as store
from phimlx.hub.cache import ADAPTER_FILES, find_snapshot, is_whole
from phimlx.hub.client import Remote, RemoteFile, Repository
from phimlx.hub.transfer import HubCache, PlainFolder, Plan, Report
from phimlx.models import registry

__all__ = [
    "NANO",
    "NANO_MULTIMODAL",
    "Download",
    "Watch",
    "download",
    "find_snapshot",
    "is_folder",
    "is_whole",
    "make_plan",
    "repositories",
    "resolve",
]

ASSETS = Path(__file__).parents[1] / "assets"
NANO = ASSETS / "nano"
NANO_MULTIMODAL = ASSETS / "nano-multimodal"

# What a model needs of the repository's top folder: no code, no pickles.
WANTED = (
    "*.json",
    "*.jinja",
    "model*.safetensors",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
)

LONGEST_JSON = 25 << 20

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(source: str | Path | None = None, original: bool = False) -> Path:
    """The folder of a model that is on this machine.

    Args:
        source: a folder, an alias of the catalogue, or a Hub id whose files are in
            huggingface_hub's cache; the catalogue's default where None. An alias means the
            pre-quantized model where that is here, else the original; a folder comes before an
            alias of the same name where it holds a model.
        original: take the original of an alias only, never the pre-quantized one.

    Raises:
        ModelAbsentError: where it is not here; the hint says how it comes here.
        ModelNotFoundError: where the name means nothing.
    """
    if isinstance(source, Path) or (source is not None and _looks_like_path(source)):
        return _folder(source)
    model = catalog.DEFAULT if source is None else catalog.find(source)
    if source is not None:
        folder = Path(source)
        holds_model = (folder / "config.json").is_file()
        if source and (holds_model or (model is None and folder.is_dir())):
            return folder
    if model is not None and model.repo is None:
        return ASSETS / model.alias
    name = catalog.DEFAULT.alias if source is None else source
    candidates = repositories(name, original)
    for repo in candidates:
        snapshot = find_snapshot(repo)
        if snapshot is not None:
            return snapshot
    if source is None:
        raise ModelAbsentError(
            f"{name}, the default model, is not on this machine.",
            hint=f"Get it with: phimlx download {name}, or try the small model that comes along "
            "right now: --model nano",
        )
    wanted = candidates[0] if original else name
    raise ModelAbsentError(
        f"{wanted} is not on this machine.", hint=f"Get it with: phimlx download {wanted}"
    )


def repositories(name: str, original: bool = False) -> list[str]:
    """The Hub repositories that a name may mean, the preferred one first.

    Raises:
        ModelNotFoundError: where it is neither an alias nor a Hub id.
    """
    model = catalog.find(name)
    if not name:
        raise ModelNotFoundError("The model's name is empty.", hint=_suggestion(name))
    if "/" in name:
        if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
            raise ModelNotFoundError(
                f"{name} is neither a folder nor a Hub id, which has the form owner/name.",
                hint=_suggestion(name),
            )
        known = model.names if model is not None else ()
        return [repo for repo in known if repo.lower() == name.lower()] or [name]
    if model is None:
        raise ModelNotFoundError(
            f"{name} is neither a folder, an alias nor a Hub id.", hint=_suggestion(name)
        )
    candidates = (model.repo,) if original else (model.quantized_repo, model.repo)
    return [repo for repo in candidates if repo is not None]


@dataclass(frozen=True)
class Download:
    """A model that has come here, or was here.

    Attributes:
        repository: None for the model that comes with phimlx.
        commit: None where nobody tells: offline, the folder's name does.
        files: how many there are.
        nbytes: their size.
    """

    folder: Path
    repository: str | None
    commit: str | None
    files: int
    nbytes: int


Watch = Callable[[Plan], AbstractContextManager[Report]]
"""Is shown a plan before anything is fetched, and takes part in its progress."""


@contextmanager
def unwatched(plan: Plan) -> Iterator[Report]:
    """Let a download run without looking."""
    yield lambda file, nbytes: None


def download(
    source: str,
    revision: str | None = None,
    *,
    original: bool = False,
    local_dir: Path | None = None,
    remote: Remote | None = None,
    watch: Watch = unwatched,
) -> Download:
    """Bring a model here, or what of it is missing; check what is here.

    Files that the model does not need stay away: see `make_plan`. With HF_HUB_OFFLINE set, what is
    here answers, unchecked.

    Args:
        source: an alias (which means the pre-quantized model) or a Hub id.
        revision: a branch, tag or commit; the main branch where None.
        original: take the original of an alias, not the pre-quantized one.
        local_dir: a folder for plain files, copied from huggingface_hub's cache where that has
            them; the cache where None.
        watch: called with the plan; its context lasts as long as the transfer.

    Raises:
        ModelNotFoundError: where the name means nothing, or the Hub has no such model.
        DownloadError: where it cannot come here: network, permission, disk, wrong contents.
    """
    from huggingface_hub import constants

    model = catalog.find(source)
    if model is not None and model.repo is None:
        return _here(ASSETS / model.alias, None)
    if _looks_like_path(source):
        raise ModelNotFoundError(
            f"{source} is a path; a download needs an alias or a Hub id.", hint=_suggestion(source)
        )
    _check_revision(revision)
    repo = repositories(source, original)[0]
    if constants.HF_HUB_OFFLINE:
        return _offline(repo, revision, local_dir)
    remote = remote or Remote()
    repository = remote.repository(repo, revision)
    plan = make_plan(repository, remote, local_dir)
    plan.check_space()
    with watch(plan) as report:
        plan.run(remote, report)
    return Download(plan.destination.folder, repo, repository.commit, len(plan.files), plan.nbytes)


def make_plan(repository: Repository, remote: Remote, local_dir: Path | None = None) -> Plan:
    """What a model needs of a repository, and where it goes: `WANTED`, and adapters in folders.

    Raises:
        DownloadError: where the repository holds no model, or the Hub does not tell.
    """
    files = [file for file in repository.files if is_wanted(file.name)]
    if not any(file.name.endswith(".safetensors") for file in files):
        raise DownloadError(
            f"{repository.name} holds no model*.safetensors, the only weights that phimlx reads."
        )
    files += _adapters(repository, remote)
    files.sort(key=_turn)
    destination = (
        HubCache(store.cache(), repository)
        if local_dir is None
        else PlainFolder(local_dir.expanduser().absolute(), repository, cache=store.cache())
    )
    return Plan(repository, destination, tuple(files))


def is_wanted(name: str) -> bool:
    """Whether a model needs a file of that name."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in WANTED)


def _adapters(repository: Repository, remote: Remote) -> list[RemoteFile]:
    """The files of adapters that are nowhere else in a repository, as in transformers' layout.

    The published layout of Phi-4-multimodal has the same folders, which hold the adapters of its
    weight files again. Only config.json tells the two apart; it is read where there are folders.
    """
    files = [file for file in repository.files if file.name in ADAPTER_FILES]
    config = repository.file("config.json")
    if not files or config is None:
        return []
    content = remote.read(repository, config, 0, config.within(LONGEST_JSON))
    try:
        settings = json.loads(content)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise DownloadError(
            f"config.json of {repository.name} is not a JSON object.",
            hint="It may have been damaged on its way: try again, or choose another model.",
        )
    dialect = registry.dialect_of(settings)
    return files if dialect is not None and dialect.adapter_folders else []


def _turn(file: RemoteFile) -> tuple[bool, bool, str]:
    """Sorts files by when they come."""
    # Weights last: what is wrong with a config shows early, and half a model never looks whole.
    # The base's are the very last, since `is_whole` looks for those.
    is_weights = file.name.endswith(".safetensors")
    return is_weights, is_weights and "/" not in file.name, file.name


def is_folder(source: str) -> bool:
    """Whether a name means a folder on this machine rather than a model of the Hub."""
    return _looks_like_path(source) or (catalog.find(source) is None and Path(source).is_dir())


def _here(folder: Path, repo: str | None) -> Download:
    commit = folder.name if folder.parent.name == "snapshots" else None
    files = store.files_of(folder).values()
    return Download(folder, repo, commit, len(files), sum(path.stat().st_size for path in files))


def _offline(repo: str, revision: str | None, local_dir: Path | None) -> Download:
    folder = find_snapshot(repo, revision) if local_dir is None else local_dir
    if folder is not None and is_whole(folder):
        return _here(folder, repo)
    what = f"{repo} at {revision}" if revision else repo
    raise DownloadError(
        f"{what} is not complete on this machine, and HF_HUB_OFFLINE is set.",
        hint="Unset HF_HUB_OFFLINE, then run it again.",
    )


def _check_revision(revision: str | None) -> None:
    """A revision becomes the name of a file in the cache."""
    if revision is not None and (
        not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision) or {".", ".."} & {*revision.split("/")}
    ):
        raise ModelNotFoundError(
            f"{shortened(revision)} is no revision: a branch, a tag or a commit.",
            hint="Leave --revision out to get the newest.",
        )


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1


def _folder(source: str | Path) -> Path:
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    what = "is a file, not a folder" if folder.is_file() else "is no folder on this machine"
    raise ModelNotFoundError(
        f"{source} {what}.", hint="Give a model's folder, or an alias such as phi-4-mini."
    )


def _suggestion(name: str) -> str:
    """The nearest alias, or all of them."""
    aliases = {known.lower(): model.alias for model in catalog.FAMILY for known in model.names}
    near = difflib.get_close_matches(name.lower(), aliases, n=1, cutoff=0.7)
    if near:
        return f"Did you mean {aliases[near[0]]}?"
    return "Known are " + ", ".join(model.alias for model in catalog.FAMILY) + "."
