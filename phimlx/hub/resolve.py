"""Names of models: a path, an alias of the catalogue or a Hub id, and the folder that it means."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from phimlx import catalog
from phimlx.checkpoint.gguf.find import MAGIC, find_gguf
from phimlx.errors import CheckpointError, ModelAbsentError, ModelNotFoundError
from phimlx.files import is_file, translate_read_errors
from phimlx.hub.cache import find_snapshot
from phimlx.hub.model_files import ADAPTER_WEIGHTS, is_whole_adapter

ASSETS = Path(__file__).parents[1] / "assets"
NANO = ASSETS / "nano"
NANO_MULTIMODAL = ASSETS / "nano-multimodal"

FOLDER = "Give a model's folder, or an alias such as phi-4-mini."
ORIGINAL = (
    "Give the folder of the original model, with config.json and model.safetensors, or an alias "
    "such as phi-4-mini."
)
PYTORCH = ("a PyTorch file, and only safetensors weights are read", ORIGINAL)
# Files that are given as a model, by the end of their name: what they are, and what helps.
FILES = {
    ".gguf": (
        "a GGUF file, which phimlx runs when it is converted",
        "Convert it with: phimlx convert FILE --mlx-path OUT -q",
    ),
    ".safetensors": ("a weight file, not a model's folder", FOLDER),
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), PYTORCH),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def meant(source: str | Path) -> str | Path:
    """Return the model that a name of the user's own stands for; any other name as it is.

    Raises:
        SettingsError: where the user's file of settings does not hold.
    """
    from phimlx.preferences.file import read_alias

    model: str | Path = read_alias(source).get("model", source)
    return model


def resolve(source: str | Path | None = None, original: bool = False) -> Path:
    """Find the folder of a model that is on this machine.

    Args:
        source: a folder, an alias of the user's or the catalogue's, or a Hub id whose files are
            in huggingface_hub's cache; the catalogue's default where None. An alias means the
            pre-quantized model where that is here, else the original; a folder comes before an
            alias of the same name where it holds a model.
        original: take the original of an alias only, never the pre-quantized one.

    Raises:
        ModelAbsentError: where it is not here; the hint says how it comes here.
        ModelNotFoundError: where the name means nothing.
        CheckpointError: where it is a folder that cannot be read.
        DownloadError: where what is in huggingface_hub's cache cannot be read.
    """
    if source is not None:
        source = meant(source)
        with translate_read_errors(Path(source), CheckpointError):
            folder = _local_folder(source)
        if folder is not None:
            return folder
    name = catalog.DEFAULT.alias if source is None else str(source)
    model = catalog.find(name)
    if model is not None and model.repo is None:
        return ASSETS / model.alias
    candidates = repositories(name, original)
    for repo in candidates:
        snapshot = find_snapshot(repo)
        if snapshot is not None:
            return snapshot
    if any(find_snapshot(repo, whole=is_whole_adapter) for repo in candidates):
        raise ModelNotFoundError(
            f"{name} is an adapter, not a model.",
            hint=f"Give it with --adapter-path {name}, and with --model what it was trained on.",
        )
    if source is None:
        raise ModelAbsentError(
            f"{name}, the default model, is not on this machine.",
            hint=f"Get it with: phimlx download {name}, or try the small model that comes along "
            "right now: --model nano",
        )
    wanted = candidates[0] if original else name
    get = f"et it with: phimlx download {wanted}"
    hint = f"G{get}"
    if model is None and "phi" not in wanted.lower():
        hint = f"If it is a Phi model, g{get}"
    elif model is not None and model.has_small_kin and not original:
        hint += f", or try the small one that comes along right now: --model {NANO_MULTIMODAL.name}"
    raise ModelAbsentError(f"{wanted} is not on this machine.", hint=hint)


def resolve_adapter(source: str | Path) -> Path:
    """Find the folder of an adapter; one that is there comes before a Hub id of the same name.

    Args:
        source: a folder, or a Hub id whose files are in huggingface_hub's cache.

    Raises:
        ModelAbsentError: where a Hub id is not here; the hint says how it comes here.
        ModelNotFoundError: where it means nothing, or a model.
        DownloadError: where what is in huggingface_hub's cache cannot be read.
    """
    name, folder = str(source), Path(os.path.expanduser(source))
    if isinstance(source, Path) or looks_like_path(name) or folder.is_dir() or "/" not in name:
        if is_file(folder):
            raise ModelNotFoundError(
                f"{name} is a file, not an adapter's folder.",
                hint=f"Give its folder: {folder.parent}",
            )
        if not folder.is_dir():
            raise ModelNotFoundError(
                f"There is no adapter folder {name}.",
                hint="Give a folder on this machine, or an adapter's Hub id: owner/name",
            )
        return folder
    repo = repositories(name)[0]
    snapshot = find_snapshot(repo, whole=is_whole_adapter)
    if snapshot is None and find_snapshot(repo) is not None:
        raise ModelNotFoundError(
            f"{name} is a model, not an adapter.", hint=f"Give it with --model {name}"
        )
    if snapshot is None:
        raise ModelAbsentError(
            f"{name} is not on this machine.", hint=f"Get it with: phimlx download {name}"
        )
    return snapshot


def find_local_gguf(source: str) -> Path | None:
    """Find the GGUF file that a name means, itself or alone in its folder; None for another name.

    Raises:
        CheckpointError: where a folder holds several, or cannot be read.
    """
    source = str(meant(source))
    if not looks_like_path(source) and catalog.find(source) is not None:
        return None
    path = Path(os.path.expanduser(source))
    with translate_read_errors(path, CheckpointError):
        file = find_gguf(path) if source else None
        if file is None or file.suffix.lower() == ".gguf":
            return file
        with file.open("rb") as opened:
            return file if opened.read(4) == MAGIC else None


def repositories(name: str, original: bool = False) -> list[str]:
    """List the Hub repositories that a name may mean, the preferred one first.

    Raises:
        ModelNotFoundError: where it is neither an alias nor a Hub id, or a model that does not run.
    """
    name = str(meant(name))
    model = catalog.find(name)
    sibling = None if model else catalog.sibling(name)
    if sibling is not None:
        raise ModelNotFoundError(*sibling.refusal())
    if Path(name).suffix.lower() in (".gguf", ".safetensors"):
        raise ModelNotFoundError(f"There is no file {name}, and no model of that name.", FOLDER)
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
    source = str(meant(source))
    return looks_like_path(source) or (catalog.find(source) is None and Path(source).is_dir())


def looks_like_path(source: str) -> bool:
    """Whether a name can only be a path."""
    return source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1


def _local_folder(source: str | Path) -> Path | None:
    """Find the folder that a name means; None where it is an alias or a Hub id."""
    if isinstance(source, Path) or looks_like_path(source):
        folder = Path(os.path.expanduser(source))
        if folder.is_dir():
            return folder
        if is_file(folder):
            raise _file_error(source, folder)
        raise ModelNotFoundError(f"{source} is no folder on this machine.", hint=FOLDER)
    folder = Path(source)
    if is_file(folder / "config.json"):
        return folder if source else None
    if catalog.find(source) is not None:
        return None
    if is_file(folder):
        raise _file_error(source, folder)
    return folder if source and folder.is_dir() else None


def _file_error(source: str | Path, file: Path) -> ModelNotFoundError:
    """Say what a file is that was given as a model, and what to give instead."""
    what, hint = FILES.get(file.suffix.lower(), ("a file, not a folder", FOLDER))
    with file.open("rb") as opened:
        if opened.read(4) == MAGIC:
            what, hint = FILES[".gguf"]
    if file.name in ADAPTER_WEIGHTS:
        what, hint = "an adapter's file", f"Give its folder: --adapter-path {file.parent}"
    elif hint == FOLDER and is_file(file.parent / "config.json"):
        hint = f"Give its folder: {file.parent}"
    return ModelNotFoundError(f"{source} is {what}.", hint=hint.replace("FILE", str(source)))


def suggestion(name: str) -> str:
    """Name the nearest alias, or all of them, as a hint."""
    aliases = {known.lower(): model.alias for model in catalog.FAMILY for known in model.names}
    near = difflib.get_close_matches(name.lower(), aliases, n=1, cutoff=0.7)
    if near:
        return f"Did you mean {aliases[near[0]]}?"
    return "Known are " + ", ".join(model.alias for model in catalog.FAMILY) + "."
