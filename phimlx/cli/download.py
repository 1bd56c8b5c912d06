"""`phimlx download`: bring a model or an adapter from the Hub to this machine."""

from __future__ import annotations

from pathlib import Path

import click

from phimlx.cli.available import show_available
from phimlx.cli.options import json_option
from phimlx.terminal.output import Output


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--revision", metavar="R", help="A branch, tag or commit  [default: main]")
@click.option("--original", is_flag=True, help="Take an alias's original, not the one at 4 bits.")
@click.option(
    "--local-dir",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Put plain files there instead of into the Hub's cache; what that has is copied.",
)
@click.option(
    "--token", metavar="TOKEN", help="The Hub's token  [default: HF_TOKEN or your log-in]"
)
@json_option
def command(
    model: str | None,
    revision: str | None,
    original: bool,
    local_dir: Path | None,
    token: str | None,
    as_json: bool,
) -> None:
    """Bring MODEL, an alias or a Hub id, to this machine; an adapter's Hub id brings the adapter.
    Without MODEL it lists what there is.

    An alias brings the model at 4 bits; the original comes by its Hub id or with --original:

    \b
      phimlx download phi-4-mini
      phimlx download microsoft/Phi-4-mini-instruct

    It goes to the Hub's own cache, where mlx-lm and transformers find it too. However it is
    interrupted, the same command goes on where it stopped. Every file is checked against the
    hash that the Hub has of it, what is here already too; a folder as MODEL is only checked.
    """
    from phimlx.cli.bars import download_bars, logger
    from phimlx.hub.client import Remote
    from phimlx.hub.download import download
    from phimlx.hub.resolve import is_folder, meant
    from phimlx.sizes import size_text

    output = Output(json=as_json)
    if model is None:
        show_available(output)
        return
    model = str(meant(model))
    if is_folder(model):
        check_folder(model, output)
        return
    done = download(
        model,
        revision,
        original=original,
        local_dir=local_dir,
        remote=Remote(token, log=logger(output)),
        show_progress=download_bars(output),
    )
    output.json(
        {
            "model": model,
            "repository": done.repository,
            "commit": done.commit,
            "path": str(done.folder),
            "files": done.files,
            "bytes": done.nbytes,
        }
    )
    output.text(f"{done.folder}: {done.files} files, {size_text(done.nbytes)}")
    if not as_json:
        name = done.repository if original else model
        place = done.folder if local_dir or revision else name
        base = "BASE --adapter-path " if done.is_adapter else ""
        output.note(f"Try it: phimlx chat --model {base}{place}")


def check_folder(source: str, output: Output) -> None:
    """Compare a folder with the hashes that came with it, and read its headers."""
    from phimlx.checkpoint.folder import Checkpoint
    from phimlx.checkpoint.header import read_header
    from phimlx.hub import cache
    from phimlx.hub.model_files import ADAPTER_WEIGHTS, is_whole_adapter
    from phimlx.hub.resolve import resolve
    from phimlx.sizes import size_text

    folder = resolve(source)
    with output.progress(cache.recorded_bytes(folder), "Checking", "B") as bar:
        right, unrecorded = cache.verify(folder, lambda file, nbytes: bar.update(nbytes))
    if is_whole_adapter(folder):
        files = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
        tensors = sum(1 for file in files for _ in read_header(file))
    else:
        files = Checkpoint(folder).files
        tensors = len(Checkpoint(folder).tensors)
    nbytes = sum(file.stat().st_size for file in files)
    output.json(
        {
            "model": source,
            "path": str(folder),
            "files_right": right,
            "files_without_hash": unrecorded,
            "tensors": tensors,
            "weight_bytes": nbytes,
        }
    )
    output.text(f"{folder}: {tensors} tensors, {size_text(nbytes)} of weights, every header whole")
    if right:
        output.text(f"{right} files have the contents that the Hub published.")
    if right and unrecorded:
        output.note(f"No hash came with {', '.join(unrecorded)}.")
    elif unrecorded:
        output.note("No hashes came with it, so its contents cannot be compared.")
