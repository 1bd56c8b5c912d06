"""Picture files that lie, break off or ask for too much: each is refused, or harmless."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from phimlx.errors import MediaError
from phimlx.media.image_file import load_image
from phimlx.media.limits import Limits

DAMAGED = "{} is damaged or cut short: it cannot be read as {}."
UNKNOWN = "{} is no PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF or HEIC picture."
TOO_MANY = "{} has {} pixels; at most 100,000,000 are read."
TOO_LONG = "{} has {} pixels; its longer side may be at most 200 times the shorter."
SAVE_AGAIN = "Open it in another program and save it again."
OTHER_FORMAT = "Save it as PNG or JPEG."
MORE_PIXELS = "If you trust it, raise the limit with --max-pixels."
MORE_ASPECT = "If you trust it, raise the limit with --max-aspect."


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """A good picture with enough in it to be cut."""
    noise = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(width: int, height: int, *extra: bytes, bits: int = 8, color: int = 2) -> bytes:
    """A PNG that declares a size and holds one row of zeros."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(min(width, 4096) * 3 + 1)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), *extra, rows, chunk(b"IEND", b"")]
    )


def jpeg_declaring(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_declaring(width: int, height: int) -> bytes:
    data = bytearray(encoded("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def gif_frame_declaring(width: int, height: int) -> bytes:
    """The screen is small, its first frame is not."""
    data = bytearray(encoded("GIF"))
    start = data.index(b"\x2c", 13 + 3 * 256)
    data[start + 5 : start + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp_declaring(width: int, height: int) -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def webp_canvas(width: int, height: int) -> bytes:
    canvas = struct.pack("<I", 0x02)[:4] + (width - 1).to_bytes(3, "little")
    canvas += (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_declaring(width: int, height: int, lossless: bool) -> bytes:
    data = bytearray(encoded("WEBP", lossless=lossless))
    if lossless:
        data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    else:
        data[26:30] = struct.pack("<HH", width, height)
    return bytes(data)


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A little-endian TIFF of one directory at 8: tag, type, count, value."""
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", following) + bytes(64)


def tiff_declaring(width: int, height: int, *more: tuple[int, int, int, int]) -> bytes:
    return tiff(
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1),
        (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, height), (279, 4, 1, 64), *more,
        following=8,
    )  # fmt: skip


def zipped() -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(10_000_000))
    return file.getvalue()


MB70 = zlib.compress(bytes(70_000_000), 9)

Case = tuple[Callable[[], bytes], str, str | None]
"""What makes a file, and the message and the hint that refuse it."""


def damaged(form: str, make: Callable[[], bytes]) -> Case:
    return make, DAMAGED.format("{}", form), SAVE_AGAIN


def too_large(size: str, make: Callable[[], bytes]) -> Case:
    return make, TOO_MANY.format("{}", size), MORE_PIXELS


def unknown(make: Callable[[], bytes]) -> Case:
    return make, UNKNOWN, OTHER_FORMAT


HOSTILE: dict[str, Case] = {
    "empty.png": (lambda: b"", "{} is empty.", None),
    "text.png": unknown(lambda: b"not a picture\n"),
    "zeros.jpg": unknown(lambda: bytes(4096)),
    "page.png": unknown(lambda: b"<!DOCTYPE html><html></html>"),
    "drawing.svg": unknown(
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    ),
    "script.eps": unknown(lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "layers.psd": unknown(lambda: b"8BPS\0\1" + bytes(40)),
    "paper.pdf": unknown(lambda: b"%PDF-1.7\n"),
    "phone.heic": damaged("HEIC", lambda: b"\0\0\0\x18ftypheic" + bytes(40)),
    "phone.avif": damaged("AVIF", lambda: b"\0\0\0\x18ftypavif" + bytes(40)),
    "zip.png": unknown(zipped),
    "magic-only.png": damaged("PNG", lambda: b"\x89PNG\r\n\x1a\n"),
    "magic-only.jpg": damaged("JPEG", lambda: b"\xff\xd8\xff"),
    "magic-only.gif": damaged("GIF", lambda: b"GIF89a"),
    "magic-only.bmp": damaged("BMP", lambda: b"BM"),
    "magic-only.webp": damaged("WEBP", lambda: b"RIFF\0\0\0\0WEBP"),
    "magic-only.tiff": damaged("TIFF", lambda: b"II*\0"),
    "cut.png": damaged("PNG", lambda: encoded("PNG")[:-900]),
    "cut.jpg": damaged("JPEG", lambda: encoded("JPEG")[:-400]),
    "cut.gif": damaged("GIF", lambda: encoded("GIF")[:-700]),
    "cut.bmp": damaged("BMP", lambda: encoded("BMP")[:-700]),
    "cut.webp": damaged("WEBP", lambda: encoded("WEBP")[:-300]),
    "cut.tiff": damaged("TIFF", lambda: encoded("TIFF")[:-700]),
    "head.jpg": damaged("JPEG", lambda: encoded("JPEG")[:30]),
    "bomb.png": too_large("50,000 × 50,000", lambda: png(50_000, 50_000)),
    "largest.png": too_large("2,147,483,647 × 2,147,483,647", lambda: png(2**31 - 1, 2**31 - 1)),
    "bomb.jpg": too_large("65,500 × 65,500", lambda: jpeg_declaring(65_500, 65_500)),
    "bomb.gif": too_large("65,535 × 65,535", lambda: gif_declaring(65_535, 65_535)),
    "frame-bomb.gif": too_large("12,000 × 12,000", lambda: gif_frame_declaring(12_000, 12_000)),
    "huge-frame-bomb.gif": damaged("GIF", lambda: gif_frame_declaring(65_535, 65_535)),
    "bomb.bmp": too_large("60,000 × 60,000", lambda: bmp_declaring(60_000, 60_000)),
    "bomb.webp": too_large("16,777,216 × 16,777,216", lambda: webp_canvas(2**24, 2**24)),
    "lossy-bomb.webp": too_large(
        "16,383 × 16,383", lambda: webp_declaring(16_383, 16_383, lossless=False)
    ),
    "lossless-bomb.webp": too_large(
        "16,384 × 16,384", lambda: webp_declaring(16_384, 16_384, lossless=True)
    ),
    "bomb.tiff": too_large("900,000 × 900,000", lambda: tiff_declaring(900_000, 900_000)),
    "thread.png": (lambda: png(100_000, 1), TOO_LONG.format("{}", "100,000 × 1"), MORE_ASPECT),
    "thread.jpg": (
        lambda: jpeg_declaring(3, 9_000),
        TOO_LONG.format("{}", "3 × 9,000"),
        MORE_ASPECT,
    ),
    "flat.png": damaged("PNG", lambda: png(0, 40)),
    "flat.jpg": damaged("JPEG", lambda: jpeg_declaring(0, 40)),
    "flat.gif": damaged("GIF", lambda: gif_frame_declaring(0, 0)),
    "flat.bmp": damaged("BMP", lambda: bmp_declaring(0, 0)),
    "flat.tiff": damaged("TIFF", lambda: tiff_declaring(0, 0)),
    "text-bomb.png": damaged("PNG", lambda: png(4, 4, chunk(b"zTXt", b"Comment\0\0" + MB70))),
    "odd-depth.png": damaged("PNG", lambda: png(4, 4, bits=5)),
    "wrong-checksum.png": damaged(
        "PNG", lambda: encoded("PNG").replace(b"IHDR\0\0\0\x28", b"IHDR\0\0\0\x29")
    ),
    "huge-chunk.png": damaged("PNG", lambda: png(4, 4, struct.pack(">I", 2**31 - 1) + b"tEXt")),
    "directory-of-itself.tiff": damaged(
        "TIFF", lambda: tiff((330, 4, 1, 8), (34665, 4, 1, 8), following=8)
    ),
    "directory-behind-the-end.tiff": damaged(
        "TIFF", lambda: b"II*\0" + struct.pack("<I", 2**32 - 2)
    ),
    "profile-bomb.png": damaged("PNG", lambda: png(4, 4, chunk(b"iCCP", b"p\0\0" + MB70))),
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    if name.endswith("heic"):
        pytest.importorskip("pillow_heif")
    content, message, hint = HOSTILE[name]
    path = tmp_path / name
    path.write_bytes(content())

    with pytest.raises(MediaError) as raised:
        load_image(path)

    assert str(raised.value) == message.format(path)
    assert raised.value.hint == hint


@pytest.fixture
def opened_sizes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is decoded, by class."""
    from PIL import ImageFile

    seen: list[str] = []
    load = ImageFile.ImageFile.load

    def watched(self: ImageFile.ImageFile) -> object:
        seen.append(type(self).__name__)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    return seen


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", [name for name in HOSTILE if "bomb" in name or "thread" in name])
def test_nothing_is_decoded_before_its_size_is_known(
    name: str, tmp_path: Path, opened_sizes: list[str]
) -> None:
    with pytest.raises(MediaError):
        load_image(HOSTILE[name][0]())

    assert opened_sizes == []


def test_limits_rule_and_not_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)

    assert load_image(encoded("PNG")).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_limits_can_be_raised_and_lowered() -> None:
    long = encoded("PNG", (600, 2))

    assert load_image(long, Limits(max_aspect=300)).size == (600, 2)
    with pytest.raises(MediaError) as raised:
        load_image(long, Limits(max_aspect=299.5))
    assert str(raised.value) == (
        "The picture has 600 × 2 pixels; its longer side may be at most 299.5 times the shorter."
    )
    with pytest.raises(MediaError) as raised:
        load_image(long, Limits(max_aspect=300, max_pixels=1199))
    assert str(raised.value) == "The picture has 600 × 2 pixels; at most 1,199 are read."


def test_limits_hold_for_pictures_and_arrays_in_memory() -> None:
    small = Limits(max_pixels=99)
    message = "The picture has 20 × 5 pixels; at most 99 are read."

    for picture in (Image.new("RGB", (20, 5)), np.zeros((5, 20), np.uint8)):
        with pytest.raises(MediaError) as raised:
            load_image(picture, small)
        assert str(raised.value) == message


def test_a_picture_opened_elsewhere_whose_file_is_cut() -> None:
    with pytest.raises(MediaError) as raised:
        load_image(Image.open(io.BytesIO(encoded("PNG")[:-900])))

    assert str(raised.value) == DAMAGED.format("The picture", "a picture")


@pytest.mark.parametrize("step", ["load", "getexif", "convert"])
def test_memory_that_runs_out_is_no_damage(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")

    def exhausted(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PngImagePlugin.PngImageFile, step, exhausted)
    with pytest.raises(MediaError) as raised:
        load_image(file.getvalue())

    assert str(raised.value) == "The picture needs more memory than there is."
    assert raised.value.hint == "Close other programs, or give a smaller file."


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_bytes_changed_at_random_never_break_out(kind: str) -> None:
    good = encoded(kind, (16, 12))
    changes = np.random.default_rng(11)
    outcomes = set()
    for _ in range(60):
        data = np.frombuffer(good, np.uint8).copy()
        spots = changes.integers(2, min(len(data), 200), 3)
        data[spots] = changes.integers(0, 256, 3)
        try:
            outcomes.add(load_image(data.tobytes(), Limits(max_pixels=10_000)).mode)
        except MediaError as error:
            outcomes.add(type(error).__name__)

    assert outcomes <= {"RGB", "MediaError"}
    assert "MediaError" in outcomes


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
def test_a_tag_longer_than_its_file_is_passed_over() -> None:
    assert load_image(tiff_declaring(8, 8, (270, 2, 2**32 - 1, 8))).size == (8, 8)


def test_rows_that_a_picture_leaves_out_are_black() -> None:
    assert load_image(png(400, 400)).getextrema() == ((0, 0), (0, 0), (0, 0))


def test_of_many_frames_only_the_first_is_decoded() -> None:
    frames = [Image.new("L", (8, 8), shade % 256) for shade in range(3000)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        count = 60 if kind in ("WEBP", "TIFF") else 3000
        file = io.BytesIO()
        frames[200].save(file, kind, save_all=True, append_images=frames[:count], lossless=True)

        picture = load_image(file.getvalue())

        assert np.asarray(picture).tolist() == np.full((8, 8, 3), 200).tolist(), kind


def exif(orientation: bytes) -> bytes:
    """An EXIF block with one entry, 0x0112, whose type, count and value are given."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + orientation + bytes(4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "block",
    [
        exif(struct.pack(">HIHH", 3, 1, 99, 0)),
        exif(struct.pack(">HIHH", 3, 1, 0, 0)),
        exif(struct.pack(">HI4s", 2, 4, b"six\0")),
        exif(struct.pack(">HII", 3, 2**31, 8)),
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0no tiff header",
    ],
    ids=["99", "0", "text", "endless", "cut", "no-header"],
)
def test_a_broken_orientation_leaves_the_picture_as_it_is_stored(block: bytes) -> None:
    plain = load_image(encoded("JPEG"))

    turned = load_image(encoded("JPEG", exif=block))

    assert (np.asarray(turned) == np.asarray(plain)).all()
