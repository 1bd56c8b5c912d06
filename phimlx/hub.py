"""The Hub <-> this machine: which folder a name means, and how a model comes here.

Knows huggingface_hub's cache and the catalogue; knows nothing of what is inside the weights.
"""

from __future__ import annotations

import difflib
import errno
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from phimlx import catalog
from phimlx.errors import DownloadError, ModelNotFoundError
from phimlx.sizes import size_text

NANO = Path(__file__).parent / "assets" / "nano"

# What a model needs, all of it in the repository's top folder: no code, no pickles, no adapters.
WANTED = (
    "*.json",
    "*.jinja",
    "model*.safetensors",
    "merges.txt",
    "vocab.txt",
    "LICENSE*",
    "NOTICE*",
)

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
        ModelNotFoundError: where it is not here; the hint says how it comes here.
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
        return NANO
    name = catalog.DEFAULT.alias if source is None else source
    candidates = repositories(name, original)
    for repo in candidates:
        snapshot = find_snapshot(repo)
        if snapshot is not None:
            return snapshot
    if source is None:
        raise ModelNotFoundError(
            f"{name}, the default model, is not on this machine.",
            hint=f"Get it with: phimlx download {name}, or try the small model that comes along "
            "right now: --model nano",
        )
    wanted = candidates[0] if original else name
    raise ModelNotFoundError(
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


def find_snapshot(repo: str) -> Path | None:
    """The newest whole copy of a repository in huggingface_hub's cache, its main branch first."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    snapshots = sorted(home.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    main = home / "refs" / "main"
    if main.is_file():
        snapshots.append(home / "snapshots" / main.read_text().strip())
    return next((folder for folder in reversed(snapshots) if is_whole(folder)), None)


def is_whole(folder: Path) -> bool:
    """Whether a downloaded folder has its config, its tokenizer and every weight file.

    huggingface_hub puts a file in its place when it is complete, so what is there is whole.
    """
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
        return bool(names) and all((folder / name).is_file() for name in names)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return False


def download(source: str, revision: str | None = None) -> Path:
    """Bring a model here through huggingface_hub, which draws the progress and keeps the files.

    Args:
        source: an alias (which means the pre-quantized model) or a Hub id.
        revision: a branch, tag or commit; the main branch where None.

    Returns:
        Its folder.

    Raises:
        ModelNotFoundError: where the name means nothing, or the Hub has no such model.
        DownloadError: where it cannot come here: network, permission, disk.
    """
    model = catalog.find(source)
    if model is not None and model.repo is None:
        return NANO
    if _looks_like_path(source):
        raise ModelNotFoundError(
            f"{source} is a path; a download needs an alias or a Hub id.", hint=_suggestion(source)
        )
    repo = repositories(source)[0]
    with _explained(repo, revision):
        from huggingface_hub import HfApi, constants, snapshot_download

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size or 0
            for file in info.siblings or ()
            if "/" not in file.rfilename
            and any(fnmatch(file.rfilename, pattern) for pattern in WANTED)
        }
        if not any(name.endswith(".safetensors") for name in sizes):
            raise DownloadError(
                f"{repo} holds no model*.safetensors, the only weights that phimlx reads."
            )
        cache = Path(constants.HF_HUB_CACHE)
        here = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / str(info.sha)
        needed = sum(size for name, size in sizes.items() if not (here / name).exists())
        free = free_space(cache)
        if needed > free:
            raise DownloadError(
                f"{repo} needs {size_text(needed)} of disk space, but {cache} has "
                f"{size_text(free)}.",
                hint="Free some space, or set HF_HOME to a folder on a larger disk.",
            )
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=[glob.escape(name) for name in sizes]
        )
    return Path(folder)


def free_space(folder: Path) -> int:
    """Bytes free on the disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into a sentence and the next step."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repo} is only for those who have accepted its terms.",
            hint=f"Accept them at {constants.ENDPOINT}/{repo}, then log in with: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"The Hub has no model {repo}, or it is private.",
            hint="Check the name; for a private one log in first with: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} has no revision {revision}.", hint="Leave --revision out to get the newest."
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise DownloadError(
                f"The Hub refuses this access to {repo} ({status}).",
                hint="Log in again with: hf auth login, or correct or unset HF_TOKEN.",
            ) from error
        if status == 429:
            raise DownloadError(
                "The Hub has had too many requests from here.",
                hint="Try again in a few minutes; logging in with: hf auth login raises the limit.",
            ) from error
        raise DownloadError(
            f"The Hub answers with an error ({status}) for {repo}.",
            hint="Try again in a few minutes; what has come stays.",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(
            "HF_HUB_OFFLINE is set, so nothing is downloaded.", hint="Unset HF_HUB_OFFLINE."
        ) from error
    except PermissionError as error:
        raise DownloadError(
            f"{error.filename or constants.HF_HUB_CACHE} cannot be written.",
            hint="Make it writable, or set HF_HOME to another folder.",
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise DownloadError(
                f"The disk of {constants.HF_HUB_CACHE} is full.",
                hint="Free some space and run it again, or set HF_HOME to a larger disk.",
            ) from error
        raise DownloadError(
            f"The Hub cannot be reached at {constants.ENDPOINT}.",
            hint="Check the network, then run it again.",
        ) from error


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
