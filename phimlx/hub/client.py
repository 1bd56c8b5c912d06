"""The Hub over HTTPS: what a repository holds, the bytes of its files, and its errors as sentences.

huggingface_hub does the talking: endpoint, token, headers, addresses, errors.

Files come by plain HTTPS from their `resolve` addresses, which answer ranges for every repository,
also for those that the Hub keeps in Xet. Xet's own protocol would save bytes only where parts of
the same file are here already, writes a file out of order, and cannot go on with half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from phimlx.errors import (
    DownloadError,
    ModelNotFoundError,
    PhimlxError,
    TrainingError,
    shortened,
)
from phimlx.files import reason
from phimlx.hub.environment import check_environment
from phimlx.hub.layout import COMMIT, CONTENT_HASH, RepositoryType
from phimlx.sizes import size_text

if TYPE_CHECKING:
    from hashlib import _Hash

BACKOFF = (1, 2, 4, 8, 16, 30)  # seconds before each further try that brings nothing
LONGEST_WAIT = 120  # seconds that the Hub may ask for; beyond that the user decides
LARGEST_ANSWER = 64 << 20  # bytes of what the Hub says of a repository: 200,000 files
LONGEST_ANSWER = 60  # seconds that this may take to come

# What a repository is called, and what it is where the Hub has none of that name.
_KINDS: dict[RepositoryType, tuple[str, type[PhimlxError]]] = {
    "model": ("model", ModelNotFoundError),
    "dataset": ("data set", TrainingError),
}

_SURROGATES = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]|(^|/)(\.{0,2})(/|$)")

Result = TypeVar("Result")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository.

    Attributes:
        size: in bytes.
        hash: what its contents must have: a SHA-256 where the Hub keeps it in LFS or Xet, else
            the name that git gives to it; both in hexadecimal.
    """

    name: str
    size: int
    hash: str

    def within(self, limit: int) -> int:
        """Return its size; raises DownloadError where that is beyond any sense."""
        if self.size > limit:
            size = size_text(self.size)
            raise DownloadError(f"{self.name} has {size}, more than any model needs.")
        return self.size

    def hasher(self) -> _Hash:
        """Begin a computation of `hash`; it takes the contents."""
        if len(self.hash) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Repository:
    """The files of a repository at one commit.

    Attributes:
        name: as it was asked for; the cache keeps it under this name.
        current_name: what the Hub calls it now.
        revision: the branch, tag or commit that was asked for.
        commit: what that means today.
    """

    name: str
    current_name: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]
    type: RepositoryType = "model"

    @property
    def is_renamed(self) -> bool:
        return self.name.lower() != self.current_name.lower()

    def file(self, name: str) -> RemoteFile | None:
        """Find the file of that name; None where there is none."""
        return next((file for file in self.files if file.name == name), None)


@dataclass(frozen=True)
class Remote:
    """The Hub, as the environment names it: HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.

    Attributes:
        token: to use instead of the one that the environment or a login gives.
        wait: lets seconds pass.
        log: takes a sentence about a pause.
    """

    token: str | None = None
    wait: Callable[[float], None] = time.sleep
    log: Callable[[str], None] = lambda text: None

    def repository(
        self, name: str, revision: str | None = None, type: RepositoryType = "model"
    ) -> Repository:
        """Ask what a repository holds.

        Raises:
            ModelNotFoundError, DownloadError: where the Hub does not tell, or tells what no Hub
                should: names that would leave a folder, hashes that are none.
            TrainingError: where it has no such data set.
            SettingsError: where the environment names no Hub.
        """
        check_environment()
        from huggingface_hub import constants

        at = "" if revision is None else f"/revision/{quote(revision, safe='')}"
        url = f"{constants.ENDPOINT}/api/{type}s/{quote(name)}{at}"

        def ask() -> bytes:
            with self._asked(url, {"Accept-Encoding": "gzip"}, params={"blobs": True}) as response:
                return _bounded(name, response.iter_bytes())

        with translate_errors(name, revision, type=type):
            answer = self.with_retries(ask)
            try:
                info = json.loads(answer)
                files = tuple(_listed_file(entry) for entry in info.get("siblings") or ())
                commit, current_name = str(info["sha"]), str(info["id"])
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DownloadError(
                    f"What answers at {constants.ENDPOINT} does not speak as the Hub does.",
                    hint="Check HF_ENDPOINT, and whether a log-in page stands in between.",
                ) from error
        _check(name, commit, files)
        return Repository(name, current_name, revision or "main", commit, files, type)

    def url(self, repository: Repository, file: RemoteFile) -> str:
        """The address at which the Hub keeps a file."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            repository.current_name,
            file.name,
            repo_type=repository.type,
            revision=repository.commit,
        )

    @contextmanager
    def open(
        self, repository: Repository, file: RemoteFile, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Ask for the bytes of a file from `start`, up to `stop` where that is given.

        Yields where the bytes begin and the bytes, chunk by chunk; they begin at 0 where the
        server ignores ranges. There are none where it has none from `start` on.

        Raises huggingface_hub's errors. A redirect to another host is followed without the token.
        """
        # Compressed on the way, a range would count other bytes.
        headers = {"Accept-Encoding": "identity"}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        with self._asked(self.url(repository, file), headers, accepted=416) as response:
            if response.status_code == 416:
                yield start, iter(())
                return
            begin = 0
            if response.status_code == 206:
                found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
                begin = int(found[1]) if found else start
            yield begin, response.iter_bytes()

    @contextmanager
    def _asked(
        self, url: str, headers: dict[str, str], accepted: int = 200, **more: Any
    ) -> Iterator[Any]:
        """Open an answer whose body comes as it is read; raises huggingface_hub's errors.

        A refusal is judged by its status and headers alone, for its body may have no end.
        """
        from huggingface_hub import constants, get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        with get_session().stream(
            "GET",
            url,
            headers=build_hf_headers(token=self.token, library_name="phimlx", headers=headers),
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects=True,
            **more,
        ) as response:
            if response.is_error and response.status_code != accepted:
                status, request = response.status_code, response.request
                hf_raise_for_status(
                    type(response)(status, headers=response.headers, request=request)
                )
            yield response

    def read(self, repository: Repository, file: RemoteFile, start: int, stop: int) -> bytes:
        """Read some bytes of a file, and no others; fewer where it is shorter."""

        def ask() -> bytes:
            data = bytearray()
            with self.open(repository, file, start, stop) as (begin, chunks):
                for chunk in chunks:
                    data += chunk
                    if begin + len(data) > stop:
                        break  # a server that ignores ranges sends all of it
            return bytes(data[start - begin : stop - begin])

        with translate_errors(repository.name, repository.revision, type=repository.type):
            return self.with_retries(ask)

    def with_retries(self, ask: Callable[[], Result]) -> Result:
        """Return the answer of a Hub that may be busy; raise at once where it cannot be reached."""
        from huggingface_hub import errors

        failures = 0
        while True:
            try:
                return ask()
            except errors.HfHubHTTPError as error:
                failures += 1
                self.pause(error, failures)

    def pause(self, error: Exception, failures: int) -> None:
        """Wait before another try; raise `error` where that cannot help, or has not.

        Args:
            failures: tries in a row that brought nothing, the last among them.
        """
        from huggingface_hub import errors

        seconds: float | None = BACKOFF[failures - 1] if failures <= len(BACKOFF) else None
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            asked = retry_after(error.response.headers)
            if status not in (408, 429) and status < 500:
                seconds = None
            elif seconds is not None and asked is not None:
                seconds = asked if asked <= LONGEST_WAIT else None
            what = "The Hub is busy"
        else:
            what = "The connection was lost"
        if seconds is None:
            raise error
        self.log(f"{what}; trying again in {seconds:g} s.")
        self.wait(seconds)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: Retry-After (RFC 9110), else RateLimit's reset."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    if value:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    limit = re.search(r"r=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else None


def _bounded(name: str, chunks: Iterator[bytes]) -> bytes:
    """Read an answer about a repository, whose size and time have limits."""
    began, data = time.monotonic(), bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > LARGEST_ANSWER:
            raise DownloadError(f"The Hub's answer about {name} is larger than any repository's.")
        if time.monotonic() - began > LONGEST_ANSWER:
            raise DownloadError(
                f"The Hub's answer about {name} has not ended after {LONGEST_ANSWER:g} s.",
                hint="Check the network, then run it again; what has come stays.",
            )
    return bytes(data)


def _listed_file(entry: Any) -> RemoteFile:
    """A file as the Hub's API lists it; raises where what it says is no listing."""
    lfs = entry.get("lfs")
    size = entry["size"] if lfs is None else lfs["size"]
    hash = entry.get("blobId") if lfs is None else lfs["sha256"]
    if not isinstance(entry["rfilename"], str) or type(size) is not int:
        raise TypeError(entry)
    return RemoteFile(entry["rfilename"], size, str(hash))


def _check(name: str, commit: str, files: tuple[RemoteFile, ...]) -> None:
    """Refuse what could reach outside a folder: hashes become names of files too."""
    seen: set[str] = set()
    for file in files:
        if _UNSAFE.search(file.name):
            raise DownloadError(
                f"{name} lists a file {shortened(file.name)}, which would leave its "
                "folder; nothing of it is downloaded."
            )
        if _SURROGATES.search(file.name):
            raise DownloadError(
                f"{name} lists a file {shortened(file.name)}, a name that no disk takes."
            )
        if file.name in seen:
            raise DownloadError(f"{name} lists the file {shortened(file.name)} twice.")
        seen.add(file.name)
        if not CONTENT_HASH.fullmatch(file.hash) or file.size < 0:
            raise DownloadError(
                f"{name} lists {shortened(file.name)} without a hash, so what comes could not be "
                "checked.",
                hint="Unset HF_ENDPOINT to use the Hub itself.",
            )
    if not COMMIT.fullmatch(commit):
        raise DownloadError(f"{name} names {shortened(commit)} as its commit, which is none.")


@contextmanager
def translate_errors(
    repo: str,
    revision: str | None = None,
    place: Path | None = None,
    elsewhere: str = "set HF_HOME to",
    type: RepositoryType = "model",
) -> Iterator[None]:
    """Turn what huggingface_hub and the disk raise into a sentence and the next step.

    Args:
        place: where files are written, if any are.
        elsewhere: how a person chooses another place.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        page = repo if type == "model" else f"{type}s/{repo}"
        raise DownloadError(
            f"{repo} is only for those who have accepted its terms.",
            hint=f"Accept them at {constants.ENDPOINT}/{page}, then log in with: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        what, not_found = _KINDS[type]
        raise not_found(
            f"The Hub has no {what} {repo}, or it is private.",
            hint="Check the name; for a private one log in first with: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} has no revision {revision}.", hint="Leave --revision out to get the newest."
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(repo, error.response) from error
    except errors.OfflineModeIsEnabled as error:
        raise DownloadError(
            "HF_HUB_OFFLINE is set, so nothing is downloaded.", hint="Unset HF_HUB_OFFLINE."
        ) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        raise DownloadError(
            f"The Hub cannot be reached at {constants.ENDPOINT}.",
            hint="Check the network, then run it again; what has come stays.",
        ) from error
    except OSError as error:
        if place is None:
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"The disk of {place} is full.",
                hint=f"Free some space and run it again, or {elsewhere} a folder on a larger disk.",
            ) from error
        named = str(error.filename or "")
        which = named if os.path.isabs(named) else place  # others are within a folder that is open
        raise DownloadError(
            f"{which} cannot be used: {reason(error)}.",
            hint=f"Make it yours to read and write, or {elsewhere} another folder.",
        ) from error


def _refusal(repo: str, response: Any) -> DownloadError:
    status = response.status_code
    if status in (401, 403):
        return DownloadError(
            f"The Hub refuses this access to {repo} ({status}).",
            hint="Log in again with: hf auth login, or correct or unset HF_TOKEN.",
        )
    if status == 429:
        asked = retry_after(response.headers)
        again = "in a few minutes" if asked is None else f"in {asked:,.0f} s"
        return DownloadError(
            "The Hub has had too many requests from here.",
            hint=f"Try again {again}; logging in with: hf auth login raises the limit.",
        )
    return DownloadError(
        f"The Hub answers with an error ({status}) for {repo}.",
        hint="Try again in a few minutes; what has come stays.",
    )
