"""Errors, each with a sentence for a person and the next step."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PhimlxError(Exception):
    """Anything a user can cause or mend.

    `str(error)` is one sentence; `hint`, where there is one, names the next step; `result` is what
    a program is told beside them.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.result: dict[str, object] = {}


class ConfigError(PhimlxError):
    """A model's configuration is missing, unknown or contradicts itself."""


class CheckpointError(PhimlxError):
    """Weights are missing, damaged, or do not fit the configuration."""


class ModelNotFoundError(PhimlxError):
    """No model of that name is on this machine."""


class ModelAbsentError(ModelNotFoundError):
    """A model of the Hub that has not come to this machine."""


class TokenizerError(PhimlxError):
    """Tokenizer files are missing or unusable."""


class PromptError(PhimlxError):
    """Messages, tools or a template that cannot become a prompt."""


class GenerationError(PhimlxError):
    """A request that the model cannot serve: too long, or with impossible settings."""


class RemoteError(GenerationError):
    """A server that cannot be reached, refuses, ends early, or is none of ours."""


class GrammarError(GenerationError):
    """A schema, regular expression or grammar that no reply can be held to."""


class ContextLengthError(GenerationError):
    """A prompt that does not fit the context, alone or with the reply that is asked for."""


class DownloadError(PhimlxError):
    """A model that cannot come to this machine: network, permission or disk."""


class ConversionError(PhimlxError):
    """A checkpoint that cannot be converted, or an output that cannot be written."""


class UploadError(PhimlxError):
    """A model that cannot go to the Hub: its name, the token, the network or the repository."""


class MediaError(PhimlxError):
    """A picture, sound or video that cannot be read, or is larger than the limits allow."""


class TrainingError(PhimlxError):
    """Training data, settings or a run that cannot be used."""


class CacheError(PhimlxError):
    """A prompt cache that cannot be written to a file, or read from one."""


class SettingsError(PhimlxError):
    """A setting that is unknown, out of bounds or in conflict with another."""


class SessionError(PhimlxError):
    """A saved conversation that cannot be read or written."""


class HistoryError(PhimlxError):
    """A history that cannot be opened, read or written, or a conversation that is not in it."""


class ToolError(PhimlxError):
    """An MCP server that cannot be named, started or asked."""


class MachineLostError(PhimlxError):
    """One of several machines that share a run is no longer there."""


class ResourceError(PhimlxError):
    """The system gives this process too little: memory, or open files."""


def shortage(error: BaseException) -> PhimlxError | None:
    """Find what the system lacks behind an error of Python's or a library's; None for others.

    Weights that end too early are told here too: MLX reads them when it computes, wherever that is.
    """
    seen: BaseException | None = error
    while seen is not None:
        number, text = getattr(seen, "errno", None), str(seen)
        files = (os.strerror(errno.EMFILE), "maximum limit")  # mlx-lm asks for 4096 on import
        if number in (errno.EMFILE, errno.ENFILE) or any(each in text for each in files):
            return ResourceError(
                "This process may not open enough files.", "Allow more: ulimit -n 4096"
            )
        memory = ("bad_alloc", "bad alloc", "[malloc", os.strerror(errno.ENOMEM), "failed to map")
        if isinstance(seen, MemoryError) or any(each in text for each in memory):
            return ResourceError(
                "There is not enough memory.",
                "Close other programs, raise the limit (ulimit -v), or take a smaller model.",
            )
        if isinstance(seen, RuntimeError) and text.startswith("[read] Unable to read"):
            return CheckpointError(
                "A file of weights cannot be read to its end: it was changed while it was read.",
                "Run it again; where that fails too, download or convert the model again.",
            )
        seen = seen.__cause__ or seen.__context__
    return None


def system_error(error: BaseException) -> PhimlxError | None:
    """Find what the system lacks, or which file or folder it refuses; None for other errors.

    Where something is read or written that a user names, the error is of the kind that this is
    for; here ends what nobody foresaw.
    """
    if (known := shortage(error)) is not None:
        return known
    if not isinstance(error, OSError) or not error.strerror:
        return None
    if error.filename is None:
        if not error.strerror.startswith("No usable temporary directory"):
            return None
        return ResourceError(
            "There is no folder for temporary files.",
            "Set TMPDIR to a folder that can be written.",
        )
    return ResourceError(
        f"{clipped(os.fsdecode(error.filename))} cannot be used: {error.strerror.lower()}.",
        _NEXT_STEPS.get(error.errno or 0),
    )


_OWNER = "Make it yours to read and write, or name another place."
_FULL_DISK = "Free some space, then try again."
_NEXT_STEPS = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _OWNER),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _FULL_DISK),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP), "Check the path."),
    errno.EIO: "Check the disk.",
}


@contextmanager
def translate_shortage() -> Iterator[None]:
    """Raise what `shortage` finds behind a RuntimeError of MLX's in the block."""
    try:
        yield
    except RuntimeError as error:
        known = shortage(error)
        if known is None:
            raise
        raise known from error


def shortened(value: object, longest: int = 60) -> str:
    """A value as it may stand in a message, whatever a file put there."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, or nested without end
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def clipped(text: str, longest: int = 300) -> str:
    """A text that others wrote as far as a message has room for it: its beginning and its end.

    Halves of surrogates, which no stream takes, are written as escapes.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … {text[-half:]}"


def some(names: Sequence[str]) -> str:
    """Name the first of a list, and how many more there are."""
    shown = ", ".join(name if len(name) <= 100 else f"{name[:97]}..." for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
