"""Data as a person names it -> the files of its splits: a file, a folder, or a Hub data set."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from phimlx.errors import TrainingError, clipped
from phimlx.hub.client import Remote
from phimlx.hub.datasets import download_missing
from phimlx.hub.download import ProgressContext, without_progress
from phimlx.media.kinds import kind_of
from phimlx.training.data.rows import COMPRESSED, READERS, DataFile

SPLITS = ("train", "valid", "test")
MEDIA = "media"  # pictures, sounds and videos, which are no split

# What files of a split are called in a folder, before their suffix and a shard's number.
STEMS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}
# Words in the names of files and folders, as the Hub itself goes by.
# Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits
WORDS = {
    "train": ("train", "training"),
    "valid": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# Where a data set of the Hub has the same rows in several kinds of file, the first of these.
PREFERRED = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?")
_SHARD = re.compile(r"-(\d+)-of-(\d+)")

Splits = dict[str, list[DataFile]]
"""The files of each split that is there, by its name in `SPLITS`."""


def find_splits(
    source: str | Path,
    remote: Remote | None = None,
    show_progress: ProgressContext = without_progress,
    with_media: bool = False,
) -> Splits:
    """The files that `source` means, brought here from the Hub where they are not.

    Args:
        source: a file, which is all training data; a folder with train.*, valid.* (validation.*,
            val.*) and test.*; or a data set of the Hub, `owner/name`, where it has several
            followed by a colon and a configuration or else a split to learn from:
            `owner/name:train_sft`. What is on this machine comes before what the Hub has under the
            same name.
        show_progress: called with the plan of a download; its context lasts as long as that.
        with_media: bring the pictures, sounds and videos along that lie beside the files.

    Raises:
        TrainingError: where there is no such data, or it cannot be told what is for training.
        DownloadError: where it cannot come here.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # unlike pathlib's, it takes a name of any length
        return _in_folder(path)
    found = _HUB_ID.fullmatch(str(source))
    is_named_as_file = path.suffix.lower() in READERS
    is_here = os.path.exists(path)
    if is_here or found is None or is_named_as_file or isinstance(source, Path):
        if not is_here:
            raise TrainingError(
                f"There is no data {clipped(str(source))}.",
                hint="Give a file, a folder with train.jsonl, or owner/name of a Hub data set.",
            )
        return {"train": [DataFile(path, path.name)]}
    name, config = found.groups()
    choose = partial(_choose, name, config, with_media)
    folder, chosen = download_missing(name, choose, remote or Remote(), show_progress)
    return _ordered(
        {
            split: [DataFile(folder / each, each, bounds=folder) for each in names]
            for split, names in chosen.items()
        }
    )


def _in_folder(folder: Path) -> Splits:
    named: Splits = defaultdict(list)
    for path in sorted(folder.iterdir()):
        stem = _SHARD.sub("", path.name.partition(".")[0]).lower()
        if stem in STEMS and path.is_file():
            named[STEMS[stem]].append(DataFile(path, path.name))
    splits = {split: files for split, each in named.items() if (files := _data_files(split, each))}
    for files in splits.values():
        first, *others = files
        if others and not all(_SHARD.search(file.name) for file in files):
            raise TrainingError(
                f"{folder} has both {first.name} and {others[0].name}.",
                hint="Leave one of them there, or name a file instead of the folder.",
            )
        _check_shards([file.name for file in files], str(folder))
    if "train" not in splits:
        raise TrainingError(
            f"{folder} has no training data: no file train.*.",
            hint="Name the file to learn from train.jsonl, or give its path instead of the folder.",
        )
    return _ordered(splits)


def _data_files(split: str, files: list[DataFile]) -> list[DataFile]:
    """Choose the files of data among those named after a split, such as train.py or train.sh.

    Where there are none it is what is to be unpacked, or, of training, whatever has the name.
    """
    for suffixes in (READERS, COMPRESSED):
        chosen = [file for file in files if file.path.suffix.lower() in suffixes]
        if chosen:
            return chosen
    return files[:1] if split == "train" else []


def _choose(
    name: str, config: str | None, with_media: bool, names: list[str], card: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Choose the files of a data set for each split, and what lies beside them."""
    chosen = _by_card(name, config, names, card)
    files = [each for files in chosen.values() for each in files]
    _check_shards(files, name)
    # Parquet holds what its rows show.
    if with_media and any(not each.lower().endswith(".parquet") for each in files):
        chosen[MEDIA] = [each for each in names if kind_of(each) is not None]
    return chosen


def _by_card(
    name: str, config: str | None, names: list[str], card: Mapping[str, Any]
) -> dict[str, list[str]]:
    """As the configurations of its card say, or else its files' names."""
    names = [each for each in names if PurePosixPath(each).suffix.lower() in READERS]
    configs = card.get("configs")
    listed = {
        str(entry["config_name"]): entry
        for entry in (configs if isinstance(configs, list) else [])
        if isinstance(entry, dict) and "config_name" in entry
    }
    if listed:
        entry, split = _config(name, config, listed)
        if entry.get("data_files") is not None:
            return _listed(name, split, _one_kind(_matching(entry, names)))
        folder = str(entry.get("data_dir") or "").strip("/")
    else:
        folder = config or ""
    if folder:
        names = [each for each in names if each.startswith(folder + "/")]
        if not names:
            raise TrainingError(
                f"The data set {name} has no configuration {folder}.",
                hint="Leave it out, or look at the data set's page for what it has.",
            )
    splits: dict[str, list[str]] = defaultdict(list)
    for each in names:
        splits[_split_of(each.removeprefix(folder))].append(each)
    if set(splits) == {""}:
        splits = {"train": splits[""]}  # no name tells: all of it is to learn from
    splits.pop("", None)
    chosen = _one_kind(splits)
    if "train" not in chosen:
        held = f"it has {', '.join(names[:5])}" if names else "it has no data file of a known kind"
        raise TrainingError(
            f"In the data set {name} no file is for training; {held}.",
            hint="Download the file that you mean, and give its path.",
        )
    return chosen


def _config(
    name: str, wanted: str | None, listed: Mapping[str, Any]
) -> tuple[Mapping[str, Any], str | None]:
    """The configuration that was asked for, or else the one that goes without saying.

    In that one `wanted` may be a split, which is returned with it.
    """
    if wanted is not None and wanted in listed:
        return listed[wanted], None
    usual = [key for key, entry in listed.items() if entry.get("default") is True]
    usual += [key for key in listed if key == "default" or len(listed) == 1]
    if usual and (wanted is None or wanted in _split_names(listed[usual[0]])):
        return listed[usual[0]], wanted
    said = f"no configuration {wanted}" if wanted else "several configurations"
    first = next(iter(listed))
    raise TrainingError(
        f"The data set {name} has {said}; it has {', '.join(listed)}.",
        hint=f"Name one of them: {name}:{first}",
    )


def _split_names(entry: Mapping[str, Any]) -> list[str]:
    files = entry.get("data_files")
    items = files if isinstance(files, list) else []
    return [str(item["split"]) for item in items if isinstance(item, dict) and "split" in item]


def _matching(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """The files that a configuration's `data_files` mean, by the names that it gives to splits."""
    given = entry["data_files"]
    folder = PurePosixPath(str(entry.get("data_dir") or ""))
    splits: dict[str, list[str]] = defaultdict(list)
    for item in given if isinstance(given, list) else [given]:
        is_split = isinstance(item, dict) and "split" in item
        split = str(item["split"]) if is_split else "train"
        patterns = item.get("path") if isinstance(item, dict) else item
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            full = str(folder / str(pattern))
            splits[split] += [each for each in names if fnmatchcase(each, full)]
    return splits


def _listed(name: str, wanted: str | None, splits: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """The files of a configuration's splits, or of the one that was asked for."""
    if wanted is not None and wanted in splits:
        return {"train": splits[wanted]}
    known = {word: split for split, words in WORDS.items() for word in words}
    chosen = {known[split]: files for split, files in splits.items() if split in known}
    if "train" not in chosen:
        has = ", ".join(splits) or "none with a file of a known kind"
        raise TrainingError(
            f"The data set {name} has no split train; it has {has}.",
            hint=f"Name the one to learn from: {name}:{next(iter(splits), 'train')}",
        )
    return chosen


def _split_of(name: str) -> str:
    """The split that a file's path speaks of, or an empty text.

    A word counts where it stands alone between what are no letters; the last one decides.
    """
    found = ""
    for word in re.split(r"[\W\d_]+", name.lower()):
        found = next((split for split, words in WORDS.items() if word in words), found)
    return found


def _one_kind(splits: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Keep of each split the files of one kind, for others hold the same rows once more."""
    chosen = {}
    for split, names in splits.items():
        kinds = Counter(PurePosixPath(each).suffix.lower() for each in names)
        kind = next((kind for kind in PREFERRED if kinds[kind]), "")
        alike = (each for each in names if PurePosixPath(each).suffix.lower() == kind)
        chosen[split] = sorted(set(alike))
    return {split: names for split, names in chosen.items() if names}


def _check_shards(names: Iterable[str], place: str) -> None:
    """Raise TrainingError where a file of several that make one up is missing."""
    seen: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name in names:
        found = _SHARD.search(name)
        if found:
            seen[_SHARD.sub("", name), int(found[2])].add(int(found[1]))
    for (name, count), numbers in seen.items():
        if len(numbers) < count:
            raise TrainingError(
                f"{place} has only {len(numbers)} of the {count} parts of {name}.",
                hint="Get the others, or rename these if they are all that you want.",
            )


def _ordered(splits: Splits) -> Splits:
    return {split: splits[split] for split in SPLITS if split in splits}
