"""Bars of downloads and uploads, what a download brings, and a question before a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from phimlx.errors import ModelAbsentError
from phimlx.hub.client import Remote, RemoteFile
from phimlx.hub.transfer import DownloadPlan, ProgressCallback
from phimlx.sizes import counted, size_text
from phimlx.terminal.output import Output

ASK_ABOVE = 1_000_000_000  # bytes


def download_bars(
    output: Output, agree: Callable[[DownloadPlan], None] = lambda plan: None
) -> Callable[[DownloadPlan], AbstractContextManager[ProgressCallback]]:
    """Make what `phimlx.hub.download.download` may be given as `show_progress`.

    Args:
        agree: called with the plan first; raises where it is not to be carried out.
    """

    @contextmanager
    def show_progress(plan: DownloadPlan) -> Iterator[ProgressCallback]:
        if plan.repository.is_renamed:
            output.note(f"{plan.repository.name} is called {plan.repository.current_name} now.")
        agree(plan)
        if not output.as_json:
            output.note(download_summary(plan))
        try:
            with bars(plan, output) as progress:
                yield progress
        except KeyboardInterrupt:
            output.note("Stopped. What has come stays: the same command goes on from there.")
            raise

    return show_progress


@contextmanager
def bars(plan: DownloadPlan, output: Output) -> Iterator[ProgressCallback]:
    """Draw a bar for everything and, where there are several files, one for the one that comes."""
    several = len(plan.files) > 1
    with ExitStack() as whole, ExitStack() as part:
        total = whole.enter_context(output.progress(plan.nbytes, "Total", "B"))
        current: RemoteFile | None = None
        bar = total

        def progress(file: RemoteFile, nbytes: int) -> None:
            nonlocal current, bar
            if several and file is not current:
                part.close()
                number = plan.files.index(file) + 1
                label = f"{file.name} ({number}/{len(plan.files)})"
                bar = part.enter_context(output.progress(file.size, label, "B"))
                current = file
            if several:
                bar.update(nbytes)
            total.update(nbytes)

        yield progress


def logger(output: Output) -> Callable[[str], None]:
    """Make what `phimlx.hub.client.Remote` may be given as `log`; its notes leave bars whole."""

    def log(text: str) -> None:
        with output.beside_bars():
            output.note(text)

    return log


@contextmanager
def upload_bars(output: Output) -> Iterator[None]:
    """Show huggingface_hub's own bars while files go out, where somebody watches."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled() or (output.is_watched and not output.as_json):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def download_summary(plan: DownloadPlan) -> str:
    """Say in a sentence what a download brings."""
    here = plan.nbytes - plan.remaining
    places = {"is here": here, "is copied from the Hub's cache": plan.copied}
    known = [f"{size_text(nbytes)} {where}" for where, nbytes in places.items() if nbytes]
    return (
        f"Downloading {plan.repository.name} ({plan.repository.commit[:7]}): "
        f"{counted(len(plan.files), 'file')}, {size_text(plan.nbytes)}"
        + (f", of which {' and '.join(known)}." if known else ".")
    )


def download_missing(
    model: str | None,
    output: Output,
    absent: ModelAbsentError,
    always_ask: bool = False,
    *,
    adapter: bool = False,
) -> None:
    """Download a model that a command needs; raise `absent` where nobody wants or can say so.

    Args:
        adapter: whether it is an adapter.
        always_ask: before a small model too.
    """
    from huggingface_hub import constants

    from phimlx import catalog
    from phimlx.hub.download import check_family, download

    def agree(plan: DownloadPlan) -> None:
        if not adapter and catalog.find(plan.repository.name) is None:
            check_family(plan.repository, remote)
        if always_ask or plan.remaining > ASK_ABOVE:
            question = f"Download {plan.repository.name}, {size_text(plan.remaining)}, now?"
            if not output.confirm(question, default=True):
                raise absent

    if constants.HF_HUB_OFFLINE or not output.can_ask:
        raise absent
    output.note(str(absent))
    remote = Remote(log=logger(output))
    name = model or catalog.DEFAULT.alias
    bars = download_bars(output, agree)
    download(name, adapter=adapter, remote=remote, show_progress=bars)
