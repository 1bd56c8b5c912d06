"""A model of the Hub as it would look here, from its config and headers alone."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phimlx.errors import DownloadError
from phimlx.hub.client import Remote, RemoteFile, Repository, translate_errors
from phimlx.hub.download import LONGEST_JSON, plan_download
from phimlx.sizes import size_text

FIRST_BYTES = 128 << 10  # holds most headers whole
LONGEST_HEADER = 25 << 20
LARGEST_FILE = 1 << 40
JSON = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "quantize_config.json",
    "quant_config.json",
)


@contextmanager
def preview(repo: str, remote: Remote | None = None) -> Iterator[tuple[Path, Repository]]:
    """Make a folder that stands for a repository of the Hub while the block runs.

    Its JSON files are whole. Its weight files have their header and their size; the rest is a
    hole, which takes no space on the disk and must not be read.

    Raises:
        ModelNotFoundError, DownloadError: where the Hub does not tell.
    """
    remote = remote or Remote()
    repository = remote.repository(repo)
    files = plan_download(repository, remote, adapter=False).files
    with tempfile.TemporaryDirectory(prefix="phimlx-") as temporary:
        folder = Path(temporary) / repository.current_name.rpartition("/")[2]
        with translate_errors(repo, place=folder):
            for file in files:
                path = folder / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.name in JSON:
                    content = remote.read(repository, file, 0, file.within(LONGEST_JSON))
                    path.write_bytes(content)
                elif path.suffix == ".safetensors":
                    file.within(LARGEST_FILE)
                    with path.open("wb") as opened:
                        opened.write(read_header(remote, repository, file))
                        opened.truncate(file.size)
        yield folder, repository


def read_header(remote: Remote, repository: Repository, file: RemoteFile) -> bytes:
    """Read the length and the header of a safetensors file, perhaps with a few bytes that follow.

    Source: https://github.com/huggingface/safetensors#format
    """
    first = remote.read(repository, file, 0, min(FIRST_BYTES, file.size))
    length = struct.unpack("<Q", first[:8])[0] if len(first) >= 8 else 0
    if length > LONGEST_HEADER:
        raise DownloadError(
            f"{file.name} of {repository.name} has a header of {size_text(length)}, so it is no "
            "safetensors file."
        )
    stop = min(8 + length, file.size)
    if stop <= len(first):
        return first
    return first + remote.read(repository, file, len(first), stop)
