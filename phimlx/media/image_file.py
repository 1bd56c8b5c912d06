"""One picture, however it is given: upright, eight bits, red, green and blue."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from phimlx.errors import MediaError
from phimlx.extras import import_extra
from phimlx.media.limits import Limits, out_of_memory, raising, source_name
from phimlx.media.source import read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | Path | bytes | Image | np.ndarray[Any, Any]"
ImageSize = tuple[int, int]  # width, height
Result = TypeVar("Result")

_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4 A
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_UNSCALED = {"I": "32-bit integers", "F": "32-bit floats"}


def load_image(source: ImageSource, limits: Limits | None = None) -> Image:
    """Read an image as RGB, turned as its EXIF orientation says.

    Transparent parts lie on white, as transformers' Phi4MultimodalImageProcessor lays them; of 16
    bits the upper eight count; of an animation the first frame. An orientation outside 1-8, or EXIF
    data that cannot be read, leave the picture as it is stored.

    Args:
        source: a path, an https URL, a file's bytes, a PIL picture, or an array of [height, width]
            or [height, width, 1, 3 or 4], uint8 or floats from 0 to 1.

    Raises:
        MediaError: it cannot be had, is none of the formats read here, is damaged, or is larger
            or longer than the limits allow.
    """
    from PIL import Image as pil

    limits = limits or Limits()
    name = source_name(source) if isinstance(source, str | Path) else "The picture"
    kind = "a picture"
    if isinstance(source, np.ndarray):
        height, width = _array_size(source)
        check_pixels((width, height), name, limits)
        image = pil.fromarray(_eight_bits(source))
    elif isinstance(source, pil.Image):
        image = source
    elif isinstance(source, str | Path | bytes):
        data = read_bytes(source, limits)
        detected = _detect_format(data, name)
        kind = detected.name
        if detected.extra:
            without = f"{name} is {kind}, which needs pillow-heif, and that is not installed."
            import_extra(detected.plugin[0], detected.extra, without, MediaError)
        if detected.declared:
            check_pixels(detected.declared(data), name, limits)
        image = _translate_errors(lambda: detected.open(data), name, kind)
    else:
        raise MediaError(
            f"A picture cannot be made of {type(source).__name__}.",
            hint="Give a path, an https URL, bytes, a PIL picture or a numpy array.",
        )
    check_pixels(image.size, name, limits)
    if image.mode in _UNSCALED:
        raise MediaError(
            f"{name} stores {_UNSCALED[image.mode]}, which do not say how bright they are.",
            hint="Save it with 8 bits per channel.",
        )
    _translate_errors(image.load, name, kind)
    check_pixels(image.size, name, limits)  # what HEIC holds may be larger than it declares
    return _translate_errors(lambda: _upright(_rgb(image), _orientation(image)), name, kind)


def check_pixels(size: ImageSize, name: str, limits: Limits) -> None:
    """Refuse a picture, or a frame of a video, whose declared width and height pass the limits.

    Raises:
        MediaError: more pixels, or a longer shape, than the limits allow.
    """
    width, height = size
    if width * height > limits.max_pixels:
        raise MediaError(
            f"{name} has {width:,} × {height:,} pixels; at most {limits.max_pixels:,} are read.",
            hint=raising("max_pixels"),
        )
    if max(size) > limits.max_aspect * min(size) > 0:
        raise MediaError(
            f"{name} has {width:,} × {height:,} pixels; its longer side may be at most "
            f"{limits.max_aspect:g} times the shorter.",
            hint=raising("max_aspect"),
        )


@dataclass(frozen=True)
class _ImageFormat:
    """An image format that is let in.

    Attributes:
        magic: what its files begin with.
        plugin: module and class of the reader. Opened through them, a file meets these limits
            alone, and not the one that Pillow keeps for the whole process.
        declared: the size in a file's first bytes, where Pillow allocates as soon as it opens.
        extra: the extra of phimlx that brings the plugin, where that is not Pillow's own.
    """

    name: str
    magic: re.Pattern[bytes]
    plugin: tuple[str, str]
    declared: Callable[[bytes], ImageSize] | None = None
    extra: str | None = None

    def open(self, data: bytes) -> Image:
        module, factory = self.plugin
        return getattr(importlib.import_module(module), factory)(BytesIO(data))


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _gif_size(data: bytes) -> ImageSize:
    return _little(data[6:8]), _little(data[8:10])


def _webp_size(data: bytes) -> ImageSize:
    """Width and height of the canvas (RFC 9649, 2.7.1.1 VP8X, 2.5 VP8, 2.6 VP8L)."""
    match data[12:16]:
        case b"VP8X":
            return _little(data[24:27]) + 1, _little(data[27:30]) + 1
        case b"VP8L":
            bits = _little(data[21:25])
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case _:
            return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF


# ISO 23008-12, 10: brands of a box `ftyp`, of which the first is the file's own. Where that says
# no more than that it holds images, one of the others tells how they are coded.
_AVIF = rb".{4}ftyp(?:avif|avis|(?:mif1|msf1|miaf).{4}(?:.{4}){0,12}?avi[fs])"
_HEIC = rb".{4}ftyp(?:hei[cxms]|hev[cxms]|(?:mif1|msf1|miaf).{4}(?:.{4}){0,12}?he[iv][cxms])"

_IMAGE_FORMATS = tuple(
    _ImageFormat(name, re.compile(magic, re.DOTALL), plugin, declared, extra)
    for name, magic, plugin, declared, extra in (
        ("PNG", rb"\x89PNG\r\n\x1a\n", ("PIL.PngImagePlugin", "PngImageFile"), None, None),
        ("JPEG", rb"\xff\xd8\xff", ("PIL.JpegImagePlugin", "jpeg_factory"), None, None),
        ("WEBP", rb"RIFF.{4}WEBP", ("PIL.WebPImagePlugin", "WebPImageFile"), _webp_size, None),
        ("GIF", rb"GIF8[79]a", ("PIL.GifImagePlugin", "GifImageFile"), _gif_size, None),
        ("BMP", rb"BM", ("PIL.BmpImagePlugin", "BmpImageFile"), None, None),
        ("TIFF", rb"II[*+]\0|MM\0[*+]", ("PIL.TiffImagePlugin", "TiffImageFile"), None, None),
        ("AVIF", _AVIF, ("PIL.AvifImagePlugin", "AvifImageFile"), None, None),
        ("HEIC", _HEIC, ("pillow_heif.as_plugin", "HeifImageFile"), None, "heic"),
    )
)


def _detect_format(data: bytes, name: str) -> _ImageFormat:
    for known in _IMAGE_FORMATS:
        if known.magic.match(data):
            return known
    raise MediaError(
        f"{name} is no PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF or HEIC picture.",
        hint="Save it as PNG or JPEG.",
    )


def _translate_errors(decode: Callable[[], Result], name: str, kind: str) -> Result:
    """Run a decoder, whose way of failing on bad bytes may be any exception there is."""
    try:
        return decode()
    except MemoryError as error:
        raise out_of_memory(name) from error
    except Exception as error:
        raise MediaError(
            f"{name} is damaged or cut short: it cannot be read as {kind}.",
            hint="Open it in another program and save it again.",
        ) from error


def _rgb(image: Image) -> Image:
    from PIL import Image as pil

    if image.mode in _SIXTEEN_BITS:
        image = pil.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif "A" in image.getbands() or image.info.get("transparency") is not None:
        white = pil.new("RGBA", image.size, "white")
        image = pil.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # a remark about the pixels, which are whole
        return None


def _upright(image: Image, orientation: object) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def _array_size(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """Height and width of an array that is a picture."""
    whole = array.ndim in (2, 3) and array.size > 0
    if not whole or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise MediaError(
            f"An array of shape {array.shape} is no picture.",
            hint="Give [height, width], or [height, width, channels] with 1, 3 or 4 channels.",
        )
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise MediaError(
            f"An array of {array.dtype} is no picture.",
            hint="Give uint8 from 0 to 255, or floats from 0 to 1.",
        )
    return array.shape[0], array.shape[1]


def _eight_bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return array
    if not (array.min() >= 0 and array.max() <= 1):  # not a number is neither
        raise MediaError(
            "An array of floats is a picture only if all of them lie from 0 to 1.",
            hint="Divide by the largest value that means white.",
        )
    return np.rint(array * array.dtype.type(255)).astype(np.uint8)
