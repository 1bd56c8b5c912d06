"""A download as tests see it: it takes no time to wait, and what it said can be read."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from phimlx.errors import PhimlxError
from phimlx.hub import download
from phimlx.hub.client import Remote

REPO = "someone/tune"
WEIGHTS = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {
    "config.json": b'{"model_type": "phi3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}


@dataclass
class Witness:
    """Downloads `REPO`, or another; counts what was reported of the last download."""

    waits: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    counted: int = 0

    def get(self, repo: str = REPO, local_dir: Path | None = None) -> Path:
        self.counted = 0
        remote = Remote(wait=self.waits.append, log=self.said.append)
        plan = download.plan_download(remote.repository(repo), remote, local_dir)
        return plan.run(remote, self.count)

    def count(self, file: object, nbytes: int) -> None:
        self.counted += nbytes

    def fails(self, repo: str = REPO) -> PhimlxError:
        with pytest.raises(PhimlxError) as caught:
            self.get(repo)
        return caught.value


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
