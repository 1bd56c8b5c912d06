"""Data sets of the Hub -> files on this machine, in huggingface_hub's cache, checked and resumable.

Which of their files are wanted is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from phimlx.errors import DownloadError, TrainingError
from phimlx.files import translate_read_errors
from phimlx.hub.client import Remote, Repository
from phimlx.hub.destination import CacheDestination
from phimlx.hub.download import ProgressContext, without_progress
from phimlx.hub.layout import RepositoryFolder, cache_folder
from phimlx.hub.transfer import DownloadPlan

CARD = "README.md"

Choose = Callable[[list[str], Mapping[str, Any]], dict[str, list[str]]]
"""Takes the names of all files and the head of the card; returns those wanted, by split."""


def download_missing(
    name: str, choose: Choose, remote: Remote, show_progress: ProgressContext = without_progress
) -> tuple[Path, dict[str, list[str]]]:
    """Download the files of a data set that are wanted and not here.

    With HF_HUB_OFFLINE set, what is here answers.

    Args:
        name: owner/name.
        show_progress: called with the plan; its context lasts as long as the transfer.

    Returns:
        The data set's folder, and the names of the wanted files in it, by split.

    Raises:
        TrainingError: where the Hub has no such data set, or its card cannot be read.
        DownloadError: where it cannot come here.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        folder = _cached(name)
        paths = (path for path in folder.rglob("*") if path.is_file())
        names = sorted(path.relative_to(folder).as_posix() for path in paths)
        return folder, choose(names, _read_card(name, folder))
    repository = remote.repository(name, type="dataset")
    card: Mapping[str, Any] = {}
    if repository.file(CARD) is not None:
        # At its commit alone: a branch is only noted when its data are here.
        pinned = replace(repository, revision=repository.commit)
        card = _read_card(name, _plan(pinned, {CARD}).run(remote))
    chosen = choose(sorted(file.name for file in repository.files), card)
    plan = _plan(repository, {each for names in chosen.values() for each in names})
    plan.check_space()
    with show_progress(plan) as progress:
        return plan.run(remote, progress), chosen


def _plan(repository: Repository, wanted: set[str]) -> DownloadPlan:
    files = tuple(file for file in repository.files if file.name in wanted)
    return DownloadPlan(repository, CacheDestination(cache_folder(), repository), files)


def _cached(name: str) -> Path:
    """Find the folder of what was last brought here of a data set."""
    home = RepositoryFolder(cache_folder(), name, "dataset")
    with translate_read_errors(home.path, DownloadError):
        commit = home.noted_commit("main")
        if commit is None or not home.snapshot(commit).is_dir():
            raise DownloadError(
                f"The data set {name} is not on this machine, and HF_HUB_OFFLINE is set.",
                hint="Unset HF_HUB_OFFLINE, then run it again.",
            )
        return home.snapshot(commit)


def _read_card(name: str, folder: Path) -> Mapping[str, Any]:
    """Read the head of a data set's card, empty where there is none."""
    if not (folder / CARD).is_file():
        return {}
    from huggingface_hub import metadata_load
    from yaml import YAMLError  # type: ignore[import-untyped]  # huggingface_hub brings it

    try:
        return metadata_load(folder / CARD) or {}
    except (ValueError, YAMLError, RecursionError) as error:
        raise TrainingError(
            f"The card of the data set {name} cannot be read: its head is no YAML.",
            hint="Download the file that you mean, and give its path.",
        ) from error
