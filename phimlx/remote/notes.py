"""Notes by which a server that runs is found: one file each, for its own user."""

from __future__ import annotations

import contextlib
import hmac
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex

from phimlx.errors import PhimlxError, RemoteError
from phimlx.files import read_json, write_json
from phimlx.folders import runtime_folder
from phimlx.remote.client import Client
from phimlx.remote.phi import RemotePhi, loaded_models

ANSWER_SECONDS = 0.3
LARGEST = 4096  # bytes of a note


def notes_folder() -> Path:
    """Return the folder of the notes."""
    return runtime_folder() / "servers"


def proof(secret: str, nonce: str) -> str:
    """Prove that one knows the secret of a note, without telling it."""
    return hmac.new(secret.encode(), nonce.encode(), "sha256").hexdigest()


@dataclass(frozen=True)
class Note:
    """What a server writes down of itself.

    Attributes:
        url: where it is reached from this machine.
        pid: of its process.
        secret: of the server's, by which it is told from another program at that address.
    """

    url: str
    pid: int
    secret: str

    @property
    def path(self) -> Path:
        return notes_folder() / f"{self.pid}-{self.secret[:8]}.json"

    def write(self) -> None:
        """Write it for its user alone. Raises OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.path, asdict(self), private=True)

    def remove(self) -> None:
        """Remove it, as far as that goes."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


def read_notes() -> list[Note]:
    """Read the notes of servers whose processes live; those of others are removed.

    A file that another user could have written is nobody's note.
    """
    try:
        paths = sorted(notes_folder().glob("*.json"))
    except OSError:
        return []
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            if not _is_own(path):
                continue
            note = _read(path)
            if note is not None and _is_alive(note.pid):
                found.append(note)
            else:
                path.unlink(missing_ok=True)
    return found


def find_loaded(stamp: str, key: str | None) -> RemotePhi | None:
    """Find a server of this user's that holds a model, by its files' stamp; None for none.

    A server that does not answer at once is passed over, and so is one that wants another key.
    """
    for note in read_notes():
        with contextlib.suppress(PhimlxError):
            nonce = token_hex(16)
            stranger = Client(note.url)  # which gets no key before it has proved itself
            health = stranger.ask(f"/health?nonce={nonce}", seconds=ANSWER_SECONDS)
            told = str(health.get("proof")).encode(errors="replace")
            if not hmac.compare_digest(told, proof(note.secret, nonce).encode()):
                continue
            client = Client(note.url, key)
            for about in loaded_models(client, ANSWER_SECONDS):
                if about.stamp == stamp and about.max_tokens is None:
                    return RemotePhi(client, about)
    return None


def _is_own(path: Path) -> bool:
    status = os.lstat(path)
    private = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and private


def _read(path: Path) -> Note | None:
    try:
        value = read_json(path, RemoteError, limit=LARGEST)
        note = Note(value["url"], value["pid"], value["secret"])
    except (KeyError, RemoteError):
        return None
    kinds = (type(note.url), type(note.pid), type(note.secret)) == (str, int, str)
    return note if kinds and note.secret.isascii() and note.pid > 0 else None


def _is_alive(pid: int) -> bool:
    """Whether a process of this user's has that id."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return False
    return True
