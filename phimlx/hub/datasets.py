"""Data sets of the Hub -> files on this machine, in huggingface_hub's cache, checked and resumable.

Knows how the Hub is asked for data sets; which of their files are wanted is the caller's affair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from phimlx.errors import DownloadError, ModelNotFoundError, TrainingError, shortened
from phimlx.hub import cache as store
from phimlx.hub.client import Remote, RemoteFile, Repository, explained, listed_file
from phimlx.hub.resolve import Watch, unwatched
from phimlx.hub.transfer import HubCache, Plan
from phimlx.training.data.rows import DataFile

CARD = "README.md"

Choose = Callable[[list[str], Mapping[str, Any]], dict[str, list[str]]]
"""Takes the names of all files and the head of the card; returns those wanted, by split."""

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def bring(
    name: str, choose: Choose, remote: Remote, watch: Watch = unwatched
) -> dict[str, list[DataFile]]:
    """The files of a data set that are wanted, brought here where they are not.

    With HF_HUB_OFFLINE set, what is here answers.

    Args:
        name: owner/name.
        watch: called with the plan of the download; its context lasts as long as that.

    Raises:
        TrainingError: where the Hub has no such data set, or its card cannot be read.
        DownloadError: where it cannot come here.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        folder = _cached(name)
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = sorted(path.relative_to(folder).as_posix() for path in paths)
        chosen = choose(names, _read_card(name, folder))
    else:
        source = _DatasetRemote(remote.token, remote.wait, remote.tell)
        repository = source.repository(name)
        card: Mapping[str, Any] = {}
        about = repository.file(CARD)
        if about is not None:
            # At its commit alone: a branch is only noted when its data are here.
            pinned = replace(repository, revision=repository.commit)
            plan = Plan(pinned, _DatasetCache(store.cache(), pinned), (about,))
            card = _read_card(name, plan.run(source))
        chosen = choose(sorted(file.name for file in repository.files), card)
        wanted = {each for names in chosen.values() for each in names}
        files = tuple(file for file in repository.files if file.name in wanted)
        plan = Plan(repository, _DatasetCache(store.cache(), repository), files)
        plan.check_space()
        with watch(plan) as report:
            folder = plan.run(source, report)
    return {
        split: [DataFile(folder / each, each) for each in names] for split, names in chosen.items()
    }


@dataclass(frozen=True)
class _DatasetRemote(Remote):
    """The Hub, asked for data sets."""

    def repository(self, name: str, revision: str | None = None) -> Repository:
        from huggingface_hub import HfApi, constants

        def ask() -> Any:
            return HfApi().dataset_info(
                name,
                revision=revision,
                files_metadata=True,
                token=self.token,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            )

        with _told(name, revision):
            try:
                info = self.patiently(ask)
                files = tuple(listed_file(sibling) for sibling in info.siblings or ())
                _check(name, str(info.sha), files)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DownloadError(
                    f"What answers at {constants.ENDPOINT} does not speak as the Hub does.",
                    hint="Check HF_ENDPOINT, and whether a log-in page stands in between.",
                ) from error
        asked, current = f"datasets/{name}", f"datasets/{info.id}"
        return Repository(asked, current, revision or "main", str(info.sha), files)

    def url(self, repository: Repository, file: RemoteFile) -> str:
        from huggingface_hub import hf_hub_url

        name = repository.current_name.removeprefix("datasets/")
        return hf_hub_url(name, file.name, repo_type="dataset", revision=repository.commit)


@dataclass(frozen=True)
class _DatasetCache(HubCache):
    """A data set's place in huggingface_hub's cache."""

    @property
    def home(self) -> Path:
        return _home(self.repository.name.removeprefix("datasets/"), self.root)


def _home(name: str, cache: Path) -> Path:
    return cache / f"datasets--{name.replace('/', '--')}"


def _cached(name: str) -> Path:
    """The folder of what was last brought here of a data set."""
    home = _home(name, store.cache())
    noted = home / "refs" / "main"
    folder = home / "snapshots" / noted.read_text().strip() if noted.is_file() else home
    if folder == home or not folder.is_dir():
        raise DownloadError(
            f"The data set {name} is not on this machine, and HF_HUB_OFFLINE is set.",
            hint="Unset HF_HUB_OFFLINE, then run it again.",
        )
    return folder


def _read_card(name: str, folder: Path) -> Mapping[str, Any]:
    """The head of a data set's card, empty where there is none."""
    if not (folder / CARD).is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(folder / CARD) or {}
    except Exception as error:  # a YAML library's own, which is not ours to import
        raise TrainingError(
            f"The card of the data set {name} cannot be read: its head is no YAML.",
            hint="Download the file that you mean, and give its path.",
        ) from error


def _check(name: str, commit: str, files: tuple[RemoteFile, ...]) -> None:
    """Refuse what could reach outside the cache: names, hashes and the commit name files there."""
    for file in files:
        if file.name.startswith("/") or ".." in PurePosixPath(file.name).parts:
            raise DownloadError(
                f"The data set {name} lists a file {shortened(file.name)}, which would leave its "
                "folder; nothing of it is downloaded."
            )
    if not all(_HASH.fullmatch(each) for each in (commit, *(file.hash for file in files))):
        raise ValueError("a hash that is none")


@contextmanager
def _told(name: str, revision: str | None) -> Iterator[None]:
    """What the Hub answers for a data set, as a sentence and the next step."""
    try:
        with explained(f"datasets/{name}", revision):
            yield
    except ModelNotFoundError as error:
        raise TrainingError(
            f"The Hub has no data set {name}, or it is private.",
            hint="Check the name; for a private one log in first with: hf auth login",
        ) from error
