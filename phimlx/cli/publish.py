"""Publishing a converted folder: what is said before, while and after it goes to the Hub."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from phimlx.cli.bars import logger, upload_bars
from phimlx.cli.flags import flag
from phimlx.errors import UploadError
from phimlx.sizes import counted, size_text
from phimlx.terminal.output import Output

if TYPE_CHECKING:
    from phimlx.hub.upload import Target


@dataclass(frozen=True)
class PublishFlags:
    """The place of the result on the Hub."""

    upload_repo: str | None = flag(
        "--upload-repo",
        metavar="OWNER/NAME",
        help="Publish OUT on the Hub when it is complete; without MODEL, an OUT that is there.",
    )
    private: bool = flag(
        "--private",
        is_flag=True,
        help="Make that repository one that only you see, with --upload-repo.",
    )
    token: str | None = flag(
        "--token", metavar="TOKEN", help="The Hub's token  [default: HF_TOKEN or your log-in]"
    )

    def check(self) -> None:
        """Refuse flags that do not go together."""
        if self.private and self.upload_repo is None:
            raise click.UsageError("--private goes with --upload-repo.")


def check_target(flags: PublishFlags, output: Output) -> Target:
    """Find out before any work whether the Hub will take it; see `phimlx.hub.upload.check`."""
    from phimlx.hub.client import Remote
    from phimlx.hub.upload import check

    name = str(flags.upload_repo)
    target = check(name, Remote(flags.token, log=logger(output)), flags.private)
    if target.exists:
        output.note(f"{name} exists: this becomes its next commit.")
    return target


def publish(folder: Path, target: Target, output: Output) -> dict[str, Any]:
    """Upload a whole folder; returns what `--json` adds to the result.

    Raises:
        UploadError: with the command that goes on.
    """
    import phimlx
    from phimlx.hub.upload import published_files, upload

    files = published_files(folder)
    nbytes = sum(file.stat().st_size for file in files.values())
    output.note(f"Uploading {counted(len(files), 'file')}, {size_text(nbytes)}, to {target.name}.")
    again = f"phimlx convert --mlx-path {shlex.quote(str(folder))} --upload-repo {target.name}"
    again += " --private" if target.private else ""
    try:
        with upload_bars(output):
            done = upload(folder, target, f"Upload a model made with phimlx {phimlx.__version__}")
    except KeyboardInterrupt:
        output.note(f"Stopped. {folder} is whole; the upload goes on with: {again}")
        raise
    except UploadError as error:
        hint = f"{error.hint or 'Try again in a few minutes.'} The upload goes on with: {again}"
        raise UploadError(str(error), hint=hint) from error
    output.text(f"{done.url}: {counted(len(done.files), 'file')}, {size_text(done.nbytes)}")
    return {"upload": asdict(done)}


def existing(out: Path, name: str) -> UploadError:
    """Make the error of a conversion to a folder that is there."""
    again = f"phimlx convert --mlx-path {shlex.quote(str(out))} --upload-repo {name}"
    return UploadError(
        f"{out} exists already.",
        hint=f"Choose another folder, or upload this one as it is with: {again}",
    )
