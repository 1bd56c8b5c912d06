"""Pictures and files that were copied, as files that may go with a message."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path
from shutil import which
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from platformdirs import user_state_path

from phimlx.errors import MediaError, PhimlxError, shortened
from phimlx.files import translate_write_errors, write_file
from phimlx.terminal.attachments import media_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from phimlx.media.limits import Limits

NAME = "The picture in the clipboard"
SECONDS = 10.0  # that the program which holds the clipboard may take to answer
PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

# Programs that print the names of files that were copied: on a Mac as paths, else as addresses.
_MAC_FILES = """\
use framework "AppKit"
use scripting additions
set board to current application's NSPasteboard's generalPasteboard()
set found to board's readObjectsForClasses:{current application's |NSURL|} options:(missing value)
set names to {}
repeat with each in found
    if (each's isFileURL()) as boolean then set end of names to (each's |path|()) as text
end repeat
set AppleScript's text item delimiters to linefeed
return names as text
"""
_FILES = {
    "osascript": ("-e", _MAC_FILES),
    "wl-paste": ("--no-newline", "--type", "text/uri-list"),
    "xclip": ("-selection", "clipboard", "-t", "text/uri-list", "-o"),
}


def paste_folder() -> Path:
    """Return the folder that keeps pictures that were pasted, for their owner alone."""
    return user_state_path("phimlx") / "pasted"


def paste_files(limits: Limits | None = None) -> list[tuple[str, str]]:
    """Find the kinds and paths of what the clipboard holds: files, else a picture, which is kept.

    Raises:
        MediaError: where it holds neither, something else, or more than the limits allow.
        PhimlxError: where it cannot be read, or the picture not be kept.
    """
    names = copied_files()
    if not names:
        found = _grab()
        if not isinstance(found, list):
            return [("image", str(keep_picture(found, limits)))]
        names = found
    files = [(name, media_file(name)) for name in names]
    unknown = [name for name, file in files if file is None]
    if unknown:
        raise MediaError(
            f"{shortened(unknown[0])} was copied, which is no picture, sound or video.",
            hint="Copy such files alone.",
        )
    return [file for _, file in files if file is not None]


def copied_files() -> list[str]:
    """List the files that were copied, in a file manager; none where that cannot be told."""
    names = [name for name in _FILES if (name == "osascript") == (sys.platform == "darwin")]
    for program in (path for path in map(which, names) if path):
        try:
            done = subprocess.run(
                [program, *_FILES[Path(program).name]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=SECONDS,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):  # nothing of that kind is there
            continue
        lines = done.stdout.decode(errors="surrogateescape").splitlines()
        return [_path(line) for line in lines if line.startswith(("/", "file:"))]
    return []


def _path(line: str) -> str:
    return unquote(urlsplit(line).path) if line.startswith("file:") else line


def _grab() -> Image | list[str]:
    """Return the picture in the clipboard, or the names of files where Pillow knows them."""
    from PIL import ImageGrab, UnidentifiedImageError
    from PIL.Image import DecompressionBombError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our own limit follows
            found = ImageGrab.grabclipboard()
    except NotImplementedError as error:
        raise PhimlxError(
            "The clipboard cannot be read: neither wl-paste nor xclip is installed.",
            "Install wl-clipboard, or xclip for X11; or save the picture and say /image FILE.",
        ) from error
    except DecompressionBombError as error:
        raise MediaError(
            f"{NAME} is too large.", "Save it smaller, then say /image FILE."
        ) from error
    except (UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise MediaError(f"{NAME} cannot be read.", "Save it, then say /image FILE.") from error
    except OSError as error:  # the program's own words among them
        raise PhimlxError(
            f"The clipboard cannot be read: {shortened(str(error), 120)}.",
            "Save the picture, then say /image FILE.",
        ) from error
    if not found:
        raise MediaError(
            "The clipboard holds no picture, sound or video.",
            "Copy one, or take a screenshot into it: Control-Shift-Command-4 on a Mac.",
        )
    return found


def keep_picture(image: Image, limits: Limits | None = None) -> Path:
    """Write a picture as PNG, under its digest: a chat that is saved names its files.

    Raises:
        MediaError: where it is larger than the limits allow, or cannot be decoded.
        PhimlxError: where it cannot be written.
    """
    from phimlx.media.image_file import check_pixels
    from phimlx.media.limits import Limits

    check_pixels(image.size, NAME, limits or Limits())
    held = BytesIO()
    try:
        picture = image if image.mode in PNG_MODES else image.convert("RGB")
        picture.save(held, "PNG", compress_level=1)
    except (OSError, SyntaxError, ValueError) as error:  # it is decoded only now
        raise MediaError(f"{NAME} cannot be read.", "Save it, then say /image FILE.") from error
    data = held.getvalue()
    path = paste_folder() / f"pasted-{hashlib.sha256(data).hexdigest()[:12]}.png"
    with translate_write_errors(path, PhimlxError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(path, data, private=True)
    return path
