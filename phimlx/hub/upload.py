"""A converted folder -> a repository on the Hub, in one commit; what can be checked is, beforehand.

huggingface_hub does the talking: it sends files over Xet or LFS, and nothing that is there already.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phimlx.checkpoint.folder import Checkpoint
from phimlx.errors import UploadError, shortened
from phimlx.hub.client import Remote, retry_after
from phimlx.hub.environment import check_environment
from phimlx.hub.model_files import companions

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DESCRIPTIONS = ("config.json", "README.md", "model.safetensors.index.json")
TOKENS = "settings/tokens"


@dataclass(frozen=True)
class Target:
    """A repository that this token may write to.

    Attributes:
        name: with its owner.
        private: whether nobody else is to see it, where it is made now.
        weights: files of an earlier model's weights that it holds; None where it does not exist.
    """

    name: str
    private: bool
    weights: tuple[str, ...] | None
    remote: Remote

    @property
    def exists(self) -> bool:
        return self.weights is not None


@dataclass(frozen=True)
class Upload:
    """A model that was published."""

    repository: str
    url: str
    commit: str
    files: tuple[str, ...]
    nbytes: int


def check(name: str, remote: Remote, private: bool = False) -> Target:
    """Ask the Hub whether a model may be uploaded, before any work is done for it.

    Args:
        name: `owner/name`; the repository need not exist.
        remote: holds the token, where the environment's is not meant.
        private: whether it must be one that nobody else sees.

    Raises:
        UploadError: where the name is none, there is no token or one that may not write, the owner
            is somebody else, or the repository is public and must not be.
        SettingsError: where the environment names no Hub.
    """
    check_environment()
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        owner, _ = name.split("/")
    except (HFValidationError, ValueError) as error:
        raise UploadError(
            f"{shortened(name)} is no name for a repository, which has the form owner/name.",
            hint="Letters, digits, -, _ and . may stand in a name, at most 96 of them.",
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise UploadError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded.", hint="Unset HF_HUB_OFFLINE."
        )
    token = remote.token or get_token()
    if token is None:
        raise UploadError(
            "An upload needs a token that may write, and there is none here.",
            hint=f"Make one at {constants.ENDPOINT}/{TOKENS}, then log in with: hf auth login",
        )
    api = HfApi(token=token, library_name="phimlx")
    with translate_upload_errors(name):
        try:
            info: Any = remote.with_retries(lambda: api.model_info(name))
        except RepositoryNotFoundError:
            _check_creation(remote.with_retries(api.whoami), owner, name)
            return Target(name, private, None, remote)
        remote.with_retries(lambda: api.auth_check(name, write=True))
    if private and not info.private:
        raise UploadError(
            f"{name} exists, and everybody can see it.",
            hint=f"Make it private at {constants.ENDPOINT}/{name}/settings, or choose another "
            "name.",
        )
    held = (sibling.rfilename for sibling in info.siblings or ())
    return Target(name, private, tuple(file for file in held if _is_weights(file)), remote)


def upload(folder: Path, target: Target, message: str) -> Upload:
    """Publish a model folder, as one commit: the repository never holds half of it.

    Weights of an earlier model go in the same commit. However it is stopped, the folder stays as
    it is, and the next call sends only what has not arrived.

    Args:
        target: as `check` found it; where hours have passed since, check again.
        message: of the commit.

    Raises:
        ConfigError, CheckpointError: where the folder is not a whole model.
        UploadError: where the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = published_files(folder)
    api = HfApi(token=target.remote.token, library_name="phimlx")

    def commit() -> Any:
        stale = sorted(set(target.weights or ()) - files.keys())
        additions = [CommitOperationAdd(name, str(file)) for name, file in files.items()]
        deletions = [CommitOperationDelete(name) for name in stale]
        for addition in additions:
            if _is_weights(addition.path_in_repo):
                # One at a time: several go in threads, which an interrupt would wait for.
                api.preupload_lfs_files(target.name, [addition], free_memory=False)
        return api.create_commit(
            target.name, [*deletions, *additions], commit_message=message, num_threads=1
        )

    with translate_upload_errors(target.name):
        if not target.exists:
            _create(api, target)
        done = target.remote.with_retries(lambda: _sending(commit))
    return Upload(
        repository=target.name,
        url=f"{api.endpoint}/{target.name}",
        commit=str(done.oid),
        files=tuple(files),
        nbytes=sum(file.stat().st_size for file in files.values()),
    )


def published_files(folder: Path) -> dict[str, Path]:
    """List what of a folder is the model: no journal, no code, no report with this machine's paths.

    Raises:
        ConfigError, CheckpointError: where it is not a whole model.
        ConversionError: for a file that is no file, or a link out of the folder.
    """
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensors  # every header is read, and the index checked
    weights = {file.name: file for file in checkpoint.files}
    described = {name: folder / name for name in DESCRIPTIONS if (folder / name).is_file()}
    return dict(sorted({**companions(folder), **described, **weights}.items()))


@contextmanager
def translate_upload_errors(repo: str) -> Iterator[None]:
    """Turn what huggingface_hub raises while it writes into a sentence and the next step."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.RepositoryNotFoundError as error:  # of a repository that was just there, or 401
        raise UploadError(
            f"The Hub does not let this token write to {repo}.",
            hint=f"Check what the token may do at {constants.ENDPOINT}/{TOKENS}.",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(repo, error) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        raise UploadError(
            f"The Hub cannot be reached at {constants.ENDPOINT}.", hint="Check the network."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UploadError(
            f"What answers at {constants.ENDPOINT} does not speak as the Hub does.",
            hint="Check HF_ENDPOINT, and whether a log-in page stands in between.",
        ) from error


def _create(api: HfApi, target: Target) -> None:
    """Make the repository; where one has appeared since the check, it must do as well."""
    created = target.remote.with_retries(
        lambda: api.create_repo(target.name, private=target.private or None, exist_ok=True)
    )
    if target.private and not api.model_info(created.repo_id).private:
        raise UploadError(
            f"{target.name} was to be private, but everybody can see it; nothing was uploaded.",
            hint="Choose another name.",
        )


def _sending(send: Callable[[], Any]) -> Any:
    """Send files; what the transfer raises on its own account becomes an UploadError.

    Xet raises errors of Rust's, LFS wraps an answer of the storage into another error.
    """
    from huggingface_hub import errors

    try:
        return send()
    except errors.HTTPError:  # type: ignore[attr-defined]
        raise
    except (RuntimeError, OSError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, errors.HTTPError):  # type: ignore[attr-defined]
            raise cause from error
        raise UploadError(f"The upload failed: {shortened(str(error), 200)}.") from error


def _check_creation(account: Mapping[str, Any], owner: str, name: str) -> None:
    """Compare the token's owner with where a new repository is to be.

    The Hub answers only for repositories that exist, and this one is made when all work is done. Of
    what it does not tell here, nothing is assumed: it will refuse the upload itself.
    """
    from huggingface_hub import constants

    me = str(account.get("name"))
    orgs = account.get("orgs") or ()
    roles = {str(each.get("name")).lower(): each.get("roleInOrg") for each in orgs}
    if owner.lower() not in {me.lower(), *roles}:
        raise UploadError(
            f"{owner} is neither you, {me}, nor an organisation of yours.",
            hint=f"Upload to {me}/{name.partition('/')[2]}, or log in as another with: hf auth "
            "login",
        )
    if roles.get(owner.lower()) == "read":
        raise UploadError(
            f"In the organisation {owner} you may only read.", hint="Ask its admin for more."
        )
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise UploadError(
            f"This token may not write to {name}.",
            hint=f"Make one that may at {constants.ENDPOINT}/{TOKENS}, then log in with: hf auth "
            "login",
        )


def _is_weights(name: str) -> bool:
    return re.fullmatch(r"model[^/]*\.safetensors(\.index\.json)?", name) is not None


def _refusal(repo: str, error: Any) -> UploadError:
    from huggingface_hub import constants

    status = error.response.status_code
    if status == 401:
        return UploadError(
            "The Hub does not know this token (401).",
            hint="Log in again with: hf auth login, or correct or unset HF_TOKEN.",
        )
    if status == 403:
        return UploadError(
            f"The Hub does not let this token write to {repo} (403).",
            hint=f"Check what the token may do at {constants.ENDPOINT}/{TOKENS}.",
        )
    if status == 429:
        asked = retry_after(error.response.headers)
        again = "in a few minutes" if asked is None else f"in {asked:,.0f} s"
        return UploadError(
            "The Hub has had too many requests from here.", hint=f"Try again {again}."
        )
    return UploadError(
        f"The Hub answers with an error ({status}) for {repo}.", hint="Try again in a few minutes."
    )
