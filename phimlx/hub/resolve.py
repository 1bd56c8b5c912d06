"""Which folder on this machine a name means: a path, an alias of the catalogue or a Hub id."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from phimlx import catalog
from phimlx.errors import ModelAbsentError, ModelNotFoundError
from phimlx.hub.cache import find_snapshot

ASSETS = Path(__file__).parents[1] / "assets"
NANO = ASSETS / "nano"
NANO_MULTIMODAL = ASSETS / "nano-multimodal"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(source: str | Path | None = None, original: bool = False) -> Path:
    """Find the folder of a model that is on this machine.

    Args:
        source: a folder, an alias of the catalogue, or a Hub id whose files are in
            huggingface_hub's cache; the catalogue's default where None. An alias means the
            pre-quantized model where that is here, else the original; a folder comes before an
            alias of the same name where it holds a model.
        original: take the original of an alias only, never the pre-quantized one.

    Raises:
        ModelAbsentError: where it is not here; the hint says how it comes here.
        ModelNotFoundError: where the name means nothing.
        DownloadError: where what is here of it cannot be read.
    """
    if isinstance(source, Path) or (source is not None and looks_like_path(source)):
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
    """List the Hub repositories that a name may mean, the preferred one first.

    Raises:
        ModelNotFoundError: where it is neither an alias nor a Hub id.
    """
    model = catalog.find(name)
    if not name:
        raise ModelNotFoundError("The model's name is empty.", hint=suggestion(name))
    if "/" in name:
        if not _HUB_ID.fullmatch(name) or "--" in name or ".." in name:
            raise ModelNotFoundError(
                f"{name} is neither a folder nor a Hub id, which has the form owner/name.",
                hint=suggestion(name),
            )
        known = model.names if model is not None else ()
        return [repo for repo in known if repo.lower() == name.lower()] or [name]
    if model is None:
        raise ModelNotFoundError(
            f"{name} is neither a folder, an alias nor a Hub id.", hint=suggestion(name)
        )
    candidates = (model.repo,) if original else (model.quantized_repo, model.repo)
    return [repo for repo in candidates if repo is not None]


def is_folder(source: str) -> bool:
    """Whether a name means a folder on this machine rather than a model of the Hub."""
    return looks_like_path(source) or (catalog.find(source) is None and Path(source).is_dir())


def looks_like_path(source: str) -> bool:
    """Whether a name can only be a path."""
    return source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1


def _folder(source: str | Path) -> Path:
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    what = "is a file, not a folder" if folder.is_file() else "is no folder on this machine"
    raise ModelNotFoundError(
        f"{source} {what}.", hint="Give a model's folder, or an alias such as phi-4-mini."
    )


def suggestion(name: str) -> str:
    """Name the nearest alias, or all of them, as a hint."""
    aliases = {known.lower(): model.alias for model in catalog.FAMILY for known in model.names}
    near = difflib.get_close_matches(name.lower(), aliases, n=1, cutoff=0.7)
    if near:
        return f"Did you mean {aliases[near[0]]}?"
    return "Known are " + ", ".join(model.alias for model in catalog.FAMILY) + "."
