"""Downloads of models and adapters: which files one needs, where they go, and the transfer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from phimlx import catalog
from phimlx.errors import DownloadError, ModelNotFoundError, shortened
from phimlx.files import is_file, parse_json_object
from phimlx.hub.cache import find_snapshot, is_of_family
from phimlx.hub.client import Remote, RemoteFile, Repository, translate_errors
from phimlx.hub.destination import CacheDestination, FolderDestination
from phimlx.hub.layout import cache_folder, place_of
from phimlx.hub.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WANTED,
    ADAPTER_WEIGHTS,
    download_order,
    files_of,
    is_wanted,
    is_whole,
    is_whole_adapter,
)
from phimlx.hub.resolve import ASSETS, looks_like_path, repositories, suggestion
from phimlx.hub.transfer import DownloadPlan, ProgressCallback, no_progress
from phimlx.models import registry

LONGEST_JSON = 25 << 20


@dataclass(frozen=True)
class DownloadResult:
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

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, not a model."""
        return is_whole_adapter(self.folder) and not is_file(self.folder / "config.json")


ProgressContext = Callable[[DownloadPlan], AbstractContextManager[ProgressCallback]]
"""Takes a plan before anything is fetched; gives a callback for as long as the transfer lasts."""


@contextmanager
def without_progress(plan: DownloadPlan) -> Iterator[ProgressCallback]:
    """Let a download run without looking: a `ProgressContext`."""
    yield no_progress


def download(
    source: str,
    revision: str | None = None,
    *,
    original: bool = False,
    local_dir: Path | None = None,
    adapter: bool = False,
    remote: Remote | None = None,
    show_progress: ProgressContext = without_progress,
) -> DownloadResult:
    """Download a model or an adapter, or what of it is missing; check what is here.

    Files that the model does not need stay away: see `plan_download`. With HF_HUB_OFFLINE set, what
    is here answers, unchecked.

    Args:
        source: an alias (which means the pre-quantized model) or a Hub id.
        revision: a branch, tag or commit; the main branch where None.
        original: take the original of an alias, not the pre-quantized one.
        local_dir: a folder for plain files, copied from huggingface_hub's cache where that has
            them; the cache where None.
        adapter: take an adapter's files alone, also where the repository holds a model too.
        show_progress: called with the plan; its context lasts as long as the transfer.

    Raises:
        ModelNotFoundError: where the name means nothing, or the Hub has no such model.
        DownloadError: where it cannot come here: network, permission, disk, wrong contents.
    """
    from huggingface_hub import constants

    model = catalog.find(source)
    if model is not None and model.repo is None:
        return _here(ASSETS / model.alias, None)
    if looks_like_path(source):
        raise ModelNotFoundError(
            f"{source} is a path; a download needs an alias or a Hub id.", hint=suggestion(source)
        )
    _check_revision(revision)
    repo = repositories(source, original)[0]
    if constants.HF_HUB_OFFLINE:
        return _offline(repo, revision, local_dir, adapter)
    remote = remote or Remote()
    repository = remote.repository(repo, revision)
    plan = plan_download(repository, remote, local_dir, adapter or None)
    plan.check_space()
    with show_progress(plan) as progress:
        plan.run(remote, progress)
    return DownloadResult(
        plan.destination.folder, repo, repository.commit, len(plan.files), plan.nbytes
    )


def plan_download(
    repository: Repository,
    remote: Remote,
    local_dir: Path | None = None,
    adapter: bool | None = None,
) -> DownloadPlan:
    """Plan what a model needs of a repository, adapters in folders too, and where it goes.

    A repository without a model's weights may be an adapter's; then it is what that needs.

    Args:
        adapter: whether it must be one, or must not; None for whatever it is.

    Raises:
        ModelNotFoundError: where it is an adapter and must not be.
        DownloadError: where the repository holds no model and no adapter, or the Hub does not tell.
    """
    files = [file for file in repository.files if is_wanted(file.name)]
    has_model = any(file.name.endswith(".safetensors") for file in files)
    is_adapter = not has_model and repository.file(ADAPTER_CONFIG) is not None
    if is_adapter and adapter is False:
        raise ModelNotFoundError(
            f"{repository.name} is an adapter, not a model.",
            hint=f"Get it with: phimlx download {repository.name}",
        )
    if adapter or is_adapter:
        files = _adapter_files(repository)
    elif not has_model:
        raise DownloadError(
            f"{repository.name} holds no model*.safetensors, the only weights that phimlx reads."
        )
    else:
        files += _adapters(repository, remote)
    files.sort(key=lambda file: download_order(file.name))
    destination = (
        CacheDestination(cache_folder(), repository)
        if local_dir is None
        else FolderDestination(local_dir.expanduser().absolute(), repository, cache=cache_folder())
    )
    return DownloadPlan(repository, destination, tuple(files))


def check_family(repository: Repository, remote: Remote) -> None:
    """Read a repository's config; one that cannot be read tells nothing.

    Raises:
        ModelNotFoundError: where it is of a model that is no Phi.
    """
    config = repository.file("config.json")
    if config is None:
        return
    content = remote.read(repository, config, 0, config.within(LONGEST_JSON))
    settings = parse_json_object(content, f"config.json of {repository.name}", DownloadError)
    if not is_of_family(settings):
        raise ModelNotFoundError(
            f"{repository.name} is no Phi model (its model_type is "
            f"{shortened(settings.get('model_type'))}).",
            hint="See what there is with: phimlx list --available",
        )


def _adapter_files(repository: Repository) -> list[RemoteFile]:
    """List the files that an adapter needs."""
    names = {file.name for file in repository.files}
    if ADAPTER_CONFIG not in names:
        raise DownloadError(f"{repository.name} holds no {ADAPTER_CONFIG}: it is no adapter.")
    if names.isdisjoint(ADAPTER_WEIGHTS):
        pickled = sorted(names & {"adapter_model.bin", "adapters.npz"})
        what = f" but {pickled[0]}" if pickled else ""
        raise DownloadError(
            f"{repository.name} holds no weights of an adapter{what}; phimlx reads "
            f"{' or '.join(ADAPTER_WEIGHTS)}.",
            hint="Load it with PEFT and save it again with save_pretrained, which writes "
            "safetensors."
            if pickled
            else None,
        )
    return [file for file in repository.files if is_wanted(file.name, ADAPTER_WANTED)]


def _adapters(repository: Repository, remote: Remote) -> list[RemoteFile]:
    """List the files of adapters that are nowhere else in a repository: transformers' layout.

    The published layout of Phi-4-multimodal has the same folders, which hold the adapters of its
    weight files again. Only config.json tells the two apart; it is read where there are folders.
    """
    files = [file for file in repository.files if file.name in ADAPTER_FILES]
    config = repository.file("config.json")
    if not files or config is None:
        return []
    content = remote.read(repository, config, 0, config.within(LONGEST_JSON))
    settings = parse_json_object(
        content,
        f"config.json of {repository.name}",
        DownloadError,
        hint="It may have been damaged on its way: try again, or choose another model.",
    )
    dialect = registry.dialect_of(settings)
    return files if dialect is not None and dialect.adapter_folders else []


def _here(folder: Path, repo: str | None) -> DownloadResult:
    place = place_of(folder)
    files = files_of(folder).values()
    return DownloadResult(
        folder, repo, place and place[1], len(files), sum(path.stat().st_size for path in files)
    )


def _offline(
    repo: str, revision: str | None, local_dir: Path | None, adapter: bool
) -> DownloadResult:
    for whole in (is_whole_adapter,) if adapter else (is_whole, is_whole_adapter):
        folder = find_snapshot(repo, revision, whole) if local_dir is None else local_dir
        with translate_errors(repo, revision, folder):
            if folder is not None and whole(folder):
                return _here(folder, repo)
    what = f"{repo} at {revision}" if revision else repo
    raise DownloadError(
        f"{what} is not complete on this machine, and HF_HUB_OFFLINE is set.",
        hint="Unset HF_HUB_OFFLINE, then run it again.",
    )


def _check_revision(revision: str | None) -> None:
    """Refuse what cannot be one: a revision becomes the name of a file in the cache."""
    if revision is not None and (
        not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", revision) or {".", ".."} & {*revision.split("/")}
    ):
        raise ModelNotFoundError(
            f"{shortened(revision)} is no revision: a branch, a tag or a commit.",
            hint="Leave --revision out to get the newest.",
        )
