#!/usr/bin/env python3
"""Every fault of a download and what becomes of it, beside huggingface_hub's own: a table.

Three sides: phimlx; the most careful program that huggingface_hub's parts make, which downloads
file by file, then compares all hashes and fetches once more what is wrong; and its snapshot, which
most programs take. Runs against a Hub on this machine, in a temporary folder, in two minutes, and
needs no network. That Hub speaks HTTPS's part alone: Xet's servers cannot be had here.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import disable_progress_bars, logging

from phimlx.errors import PhimlxError
from phimlx.hub import download
from phimlx.hub.client import Remote
from tests.hub.loopback_hub import Fault, Hub, serve

REPO = "someone/tune"
WEIGHTS = "model.safetensors"
FILES = {
    "config.json": b'{"model_type": "phi3"}',
    "tokenizer.json": b"{}",
    WEIGHTS: random.Random(0).randbytes(2_000_000),
}
SIZE = len(FILES[WEIGHTS])
OURS = "from phimlx.hub import download; download.download('someone/tune')"
THEIRS = "from huggingface_hub import hf_hub_download as get; [get('someone/tune', n) for n in {}]"
SNAPSHOT = "from huggingface_hub import snapshot_download; snapshot_download('someone/tune')"
THEIRS = THEIRS.format(list(FILES))


@dataclass(frozen=True)
class Case:
    """One fault: what the weights' next answers get wrong, or what else is prepared.

    Attributes:
        runs: how often a download that failed is begun again.
        spoil: what happens to a whole copy that is here, before it is asked for again.
    """

    name: str
    faults: list[Fault] = field(default_factory=list)
    prepare: Callable[[Hub], None] = lambda server: None
    unreachable: bool = False
    runs: int = 1
    spoil: Callable[[Path], object] | None = None
    other: str = ""  # what becomes of another download that came half-way: killed, goes on


def hostile_name(name: str) -> Callable[[Hub], None]:
    return lambda server: server.repos[REPO].update({name: b"x"})


def busy(status: int, **headers: str) -> Fault:
    return Fault(status=status, headers={name.replace("_", "-"): headers[name] for name in headers})


def blob_of_weights(cache: Path) -> Path:
    (blob,) = (path for path in cache.glob("models--*/blobs/*") if path.stat().st_size == SIZE)
    return blob


def flip(path: Path) -> None:
    """Change one byte in the middle."""
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)
        file.seek(SIZE // 2)
        file.write(bytes([byte[0] ^ 1]))


CASES = [
    Case("nothing"),
    Case("no network", unreachable=True),
    *(Case(f"cut at {n}/8", [Fault(cut=SIZE * n // 8)]) for n in range(8)),
    Case("cut 20 times", [Fault(cut=SIZE // 21) for _ in range(20)]),
    Case("cut 20 times, run until whole", [Fault(cut=SIZE // 21) for _ in range(20)], runs=20),
    Case("cut, then the range ignored", [Fault(cut=SIZE // 2), Fault(whole=True)]),
    Case("cut, then another range", [Fault(cut=SIZE // 2), Fault(elsewhere=9)]),
    Case("killed half-way, run again", [Fault(hold=SIZE // 2)], other="killed"),
    Case("two at once", [Fault(hold=SIZE // 2)], other="goes on"),
    Case("wrong bytes, once", [Fault(wrong=True)]),
    Case("wrong bytes, always", [Fault(wrong=True) for _ in range(20)]),
    Case("one byte too many, once", [Fault(longer=1)]),
    Case("one byte too many, always", [Fault(longer=1) for _ in range(20)]),
    Case("1000 bytes too few, once", [Fault(longer=-1000)]),
    Case("a trickle of 1 kB pieces", [Fault(piece=1000)]),
    Case("429, Retry-After 7", [busy(429, Retry_After="7")]),
    Case("429, Retry-After 3600", [busy(429, Retry_After="3600") for _ in range(20)]),
    Case("500, once", [busy(500)]),
    Case("503, always", [busy(503) for _ in range(20)]),
    Case("gated", [busy(403, X_Error_Code="GatedRepo") for _ in range(20)]),
    Case("bad token", prepare=lambda server: server.refusals.update(
        {REPO: (401, {"X-Error-Message": "Invalid credentials in Authorization header"})}
    )),
    Case("missing", prepare=lambda server: server.repos.clear()),
    Case("renamed", prepare=lambda server: (
        server.repos.update({"someone/new": server.repos.pop(REPO)}),
        server.moved.update({REPO: "someone/new"}),
    )[0]),
    Case("whole, then a byte changes", spoil=lambda cache: flip(blob_of_weights(cache))),
    Case("whole, then cut short", spoil=lambda cache: os.truncate(blob_of_weights(cache), 9)),
    Case("whole, then removed", spoil=lambda cache: blob_of_weights(cache).unlink()),
    Case("a name ../x.json", prepare=hostile_name("../x.json")),
    Case("a name /etc/x.json", prepare=hostile_name("/etc/x.json")),
    Case("a name ..\\x.json", prepare=hostile_name("..\\x.json")),
    Case("a hash that is none", prepare=lambda server: server.listed.update(
        {(REPO, "config.json"): {"blobId": "../../x"}}
    )),
]  # fmt: skip


def ours(server: Hub) -> str:
    waited: list[float] = []
    try:
        done = download.download(REPO, remote=Remote(wait=waited.append))
    except PhimlxError as error:
        return f"error: {error}"
    return outcome(done.folder, server, waited)


def theirs(server: Hub) -> str:
    """Download file by file, then compare all hashes; what is wrong is fetched once more."""
    waited: list[float] = []
    with patch("time.sleep", waited.append):
        try:
            for again in (False, True):
                paths = [Path(hf_hub_download(REPO, name, force_download=again)) for name in FILES]
                compared = HfApi().verify_repo_checksums(REPO)
                if not (compared.mismatches or compared.missing_paths):
                    return outcome(paths[0].parent, server, waited)
        except Exception as error:
            return f"error: {type(error).__name__}"
    return "error: hashes do not match, twice"


def unchecked(server: Hub) -> str:
    """Take a snapshot, as most programs do."""
    waited: list[float] = []
    with patch("time.sleep", waited.append):
        try:
            folder = snapshot_download(REPO)
        except Exception as error:
            return f"error: {type(error).__name__}"
    return outcome(Path(folder), server, waited)


def outcome(folder: Path, server: Hub, waited: list[float]) -> str:
    """What is in the folder, and at what price."""
    right = all((folder / name).read_bytes() == content for name, content in FILES.items())
    again = server.served[WEIGHTS] - SIZE
    text = "complete" if right else "WRONG BYTES ACCEPTED"
    if again:
        text += f", {again / SIZE:.0%} of it fetched twice"
    pause = sum(seconds for seconds in waited if seconds >= 1)
    return text + (f", waits {pause:g} s" if pause else "")


def start(code: str, server: Hub, cache: Path) -> subprocess.Popen[bytes]:
    """Begin a download in a process of its own, and return when half of the weights are out."""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache)}
    root = Path(__file__).parents[1]
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=root)
    while server.served[WEIGHTS] < SIZE // 2:
        time.sleep(0.05)
    time.sleep(0.5)  # what is on its way arrives
    return child


def until_whole(get: Callable[[], str], runs: int) -> str:
    """The outcome of the first of so many downloads that comes through, else of the last."""
    for number in range(1, runs + 1):
        result = get()
        if not result.startswith("error"):
            return result if number == 1 else f"{result}, in {number} runs"
    return result


def run(case: Case, get: Callable[[Hub], str], code: str) -> str:
    """The outcome of one download through one fault, with an empty cache."""
    with serve() as server, tempfile.TemporaryDirectory() as folder:
        server.repos[REPO] = dict(FILES)
        server.faults[WEIGHTS] = list(case.faults)
        case.prepare(server)
        url = "http://127.0.0.1:1" if case.unreachable else server.url
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        with (
            patch.object(constants, "ENDPOINT", url),
            patch.object(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
            patch.object(constants, "HF_HUB_CACHE", folder),
        ):
            if case.spoil is not None:
                get(server)
                server.served.clear()
                case.spoil(Path(folder))
                server.served[WEIGHTS] = SIZE
                return get(server)
            if not case.other:
                return until_whole(lambda: get(server), case.runs).replace(url, "the Hub")
            child = start(code, server, Path(folder))
            if case.other == "killed":
                child.kill()
                child.wait()
            threading.Timer(0.5, server.release.set).start()
            result = get(server)
            child.wait()
            return result


SIDES = {
    "phimlx": (ours, OURS),
    "hf_hub_download, verify_repo_checksums": (theirs, THEIRS),
    "snapshot_download": (unchecked, SNAPSHOT),
}


def main() -> None:
    logging.set_verbosity_error()
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    disable_progress_bars()
    for case in CASES:
        print(case.name)
        for side, (get, code) in SIDES.items():
            print(f"    {side:<40}{run(case, get, code)}", flush=True)


if __name__ == "__main__":
    main()
