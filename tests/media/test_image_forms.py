"""Pictures in every form that is let in, to upright RGB."""

from __future__ import annotations

import io
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from phimlx.errors import MediaError
from phimlx.media.image_file import load_image
from phimlx.media.limits import Limits

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
CORNERS = np.array([[RED, GREEN, WHITE], [BLUE, (0, 0, 0), (90, 90, 90)]], np.uint8)  # [2, 3, 3]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source: Any) -> list[Any]:
    image = load_image(source)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"big_tiff": True}),
        ("GIF", {}),
    ],
)
def test_formats_by_content_whatever_the_name(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "picture.txt"
    path.write_bytes(saved(Image.fromarray(CORNERS), kind, **options))

    for source in (path, str(path), path.read_bytes()):
        assert pixels(source) == CORNERS.tolist()


def test_jpeg_is_near() -> None:
    plain = np.full((16, 16, 3), (200, 120, 40), np.uint8)

    found = np.array(pixels(saved(Image.fromarray(plain), "JPEG", quality=95)))

    assert np.abs(found - plain).max() <= 3


def test_transparent_parts_lie_on_white() -> None:
    color = np.array([[(0, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 51), (255, 0, 0, 0)]], np.uint8)
    expected = [[[255, 255, 255], [0, 0, 0], [204, 204, 204], [255, 255, 255]]]

    assert pixels(color) == expected
    assert pixels(Image.fromarray(color)) == expected
    assert pixels(saved(Image.fromarray(color), "PNG")) == expected
    grey = np.array([[(0, 0), (0, 255), (0, 51), (255, 0)]], np.uint8)
    assert pixels(saved(Image.fromarray(grey, "LA"), "PNG")) == expected
    keyed = saved(Image.fromarray(CORNERS), "PNG", transparency=BLUE)
    assert pixels(keyed)[1][0] == [255, 255, 255]
    assert pixels(keyed)[0] == CORNERS[0].tolist()


def test_palettes_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])

    assert pixels(saved(image, "PNG")) == [[list(RED), list(GREEN), list(BLUE)]]
    assert pixels(saved(image, "GIF", transparency=1)) == [[list(RED), list(WHITE), list(BLUE)]]


def test_greyscale_and_one_bit() -> None:
    grey = np.array([[0, 128, 255]], np.uint8)
    assert pixels(saved(Image.fromarray(grey), "PNG")) == [[[0] * 3, [128] * 3, [255] * 3]]
    bits = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    assert pixels(saved(bits, "PNG")) == [[[0] * 3, [255] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_sixteen_bits_the_upper_eight_count(kind: str) -> None:
    deep = Image.fromarray(np.array([[0, 255, 256, 32768, 65535]], np.uint16))

    assert pixels(saved(deep, kind)) == [[[shade] * 3 for shade in (0, 0, 1, 128, 255)]]


@pytest.mark.parametrize(("mode", "what"), [("I", "32-bit integers"), ("F", "32-bit floats")])
def test_pictures_without_a_white(mode: str, what: str) -> None:
    with pytest.raises(MediaError) as raised:
        load_image(saved(Image.new(mode, (2, 2)), "TIFF"))

    assert str(raised.value) == (
        f"The picture stores {what}, which do not say how bright they are."
    )
    assert raised.value.hint == "Save it with 8 bits per channel."


def test_cmyk_and_adobes_inverted_cmyk() -> None:
    ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan: red
    marked = saved(ink, "JPEG", quality=95)  # Pillow writes the Adobe marker, inverted
    assert b"Adobe" in marked

    for source in (saved(ink, "TIFF"), marked):
        assert np.abs(np.array(pixels(source)) - RED).max() <= 3


def test_a_color_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    assert pixels(saved(Image.fromarray(CORNERS), "PNG", icc_profile=profile)) == CORNERS.tolist()


# Where EXIF 2.3 says that the stored first row and first column are seen.
SEEN = {
    1: CORNERS,
    2: CORNERS[:, ::-1],
    3: CORNERS[::-1, ::-1],
    4: CORNERS[::-1],
    5: CORNERS.swapaxes(0, 1),
    6: CORNERS.swapaxes(0, 1)[:, ::-1],
    7: CORNERS.swapaxes(0, 1)[::-1, ::-1],
    8: CORNERS.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "PIL"])
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source: Any = saved(
        Image.fromarray(CORNERS), "PNG" if kind == "PIL" else kind, exif=exif, lossless=True
    )
    if kind == "PIL":
        source = Image.open(io.BytesIO(source))

    assert pixels(source) == SEEN[orientation].tolist()


def test_a_picture_in_memory_is_left_as_it_was() -> None:
    image = Image.fromarray(CORNERS)
    image.getexif()[0x0112] = 6

    assert pixels(image) == SEEN[6].tolist()
    assert (image.size, image.mode) == ((3, 2), "RGB")
    assert image.getexif()[0x0112] == 6


def test_arrays() -> None:
    grey = np.array([[0, 51, 255]], np.uint8)
    expected = [[[0] * 3, [51] * 3, [255] * 3]]

    assert pixels(CORNERS) == pixels(CORNERS[::-1][::-1]) == CORNERS.tolist()
    assert pixels(grey) == pixels(grey[..., None]) == expected
    for kind in (np.float16, np.float32, np.float64):
        assert pixels(grey.astype(kind) / kind(255)) == expected
    assert pixels(np.float32([[0.0, 0.5, 0.999]])) == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize(
    ("array", "message", "hint"),
    [
        (
            np.zeros((3, 8, 8), np.uint8),
            "An array of shape (3, 8, 8) is no picture.",
            "Give [height, width], or [height, width, channels] with 1, 3 or 4 channels.",
        ),
        (
            np.zeros((0, 8), np.uint8),
            "An array of shape (0, 8) is no picture.",
            "Give [height, width], or [height, width, channels] with 1, 3 or 4 channels.",
        ),
        (
            np.zeros((1, 8, 8, 3), np.uint8),
            "An array of shape (1, 8, 8, 3) is no picture.",
            "Give [height, width], or [height, width, channels] with 1, 3 or 4 channels.",
        ),
        (
            np.zeros((8, 8), np.int64),
            "An array of int64 is no picture.",
            "Give uint8 from 0 to 255, or floats from 0 to 1.",
        ),
        (
            np.full((8, 8), 255.0),
            "An array of floats is a picture only if all of them lie from 0 to 1.",
            "Divide by the largest value that means white.",
        ),
        (
            np.full((8, 8), np.nan),
            "An array of floats is a picture only if all of them lie from 0 to 1.",
            "Divide by the largest value that means white.",
        ),
        (
            -np.ones((8, 8)),
            "An array of floats is a picture only if all of them lie from 0 to 1.",
            "Divide by the largest value that means white.",
        ),
        (
            12,
            "A picture cannot be made of int.",
            "Give a path, an https URL, bytes, a PIL picture or a numpy array.",
        ),
    ],
)
def test_arrays_that_are_no_pictures(array: Any, message: str, hint: str) -> None:
    with pytest.raises(MediaError) as raised:
        load_image(array)

    assert (str(raised.value), raised.value.hint) == (message, hint)


def test_a_bare_exif_block_in_a_jpeg_turns_it() -> None:
    plain = Image.fromarray(np.repeat(np.repeat(CORNERS, 16, 0), 16, 1))
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12" + struct.pack(">HIHH", 3, 1, 8, 0) + bytes(4)

    assert load_image(saved(plain, "JPEG", exif=block)).size == (32, 48)


def smooth(size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Colours that run across, so that little is lost in coding; `size` is width and height."""
    across, down = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack((across, down, 255 - across), 2).astype(np.uint8))


def coded(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind == "HEIF":
        heif = pytest.importorskip("pillow_heif")
        file = io.BytesIO()
        heif.from_pillow(image).save(file, **options)
        return file.getvalue()
    return saved(image, kind, **options)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_what_telephones_make(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "IMG_0001.jpg"
    path.write_bytes(coded(smooth(), kind, quality=95))

    found = load_image(path)

    assert (found.mode, found.size) == ("RGB", (96, 64))
    assert np.abs(np.asarray(found, int) - np.asarray(smooth(), int)).mean() < 2


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_telephones_turn_pictures_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    jpeg = load_image(saved(smooth(), "JPEG", exif=exif, quality=95))

    found = load_image(coded(smooth(), kind, exif=exif.tobytes(), quality=95))

    assert found.size == jpeg.size
    assert np.abs(np.asarray(found, int) - np.asarray(jpeg, int)).mean() < 4


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_their_transparent_parts_lie_on_white(kind: str) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert np.asarray(load_image(coded(image, kind, quality=95))).min() >= 250


@pytest.mark.parametrize(
    ("brands", "kind"),
    [
        (b"heic\0\0\0\0mif1heic", "HEIC"),
        (b"heix\0\0\0\0mif1heix", "HEIC"),
        (b"mif1\0\0\0\0mif1heic", "HEIC"),
        (b"mif1\0\0\0\0mif1miafMiHBheic", "HEIC"),
        (b"msf1\0\0\0\0mif1hevc", "HEIC"),
        (b"avif\0\0\0\0mif1miaf", "AVIF"),
        (b"mif1\0\0\0\0mif1miafavif", "AVIF"),
        (b"avis\0\0\0\0msf1", "AVIF"),
    ],
)
def test_brands_tell_the_coding(brands: bytes, kind: str) -> None:
    if kind == "HEIC":
        pytest.importorskip("pillow_heif")
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(200)
    with pytest.raises(MediaError, match=f"it cannot be read as {kind}"):
        load_image(data)


@pytest.mark.parametrize(
    "brands", [b"isom\0\0\0\0iso2avc1mp41", b"M4A \0\0\0\0isom", b"qt  \0\0\0\0qt  "]
)
def test_films_are_no_pictures(brands: bytes) -> None:
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(200)
    with pytest.raises(MediaError, match="is no PNG"):
        load_image(data)


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_telephone_pictures_cut_short(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8))
    data = coded(noise, kind)
    with pytest.raises(MediaError, match=r"damaged or cut short|is no PNG") as error:
        load_image(data[: round(share * len(data))])
    assert error.value.hint


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_telephone_pictures_meet_the_limits(kind: str) -> None:
    data = coded(smooth(), kind)
    with pytest.raises(MediaError, match=r"96 × 64 pixels; at most 6,000 are read"):
        load_image(data, Limits(max_pixels=6000))
    long = coded(Image.new("RGB", (640, 64)), kind)
    with pytest.raises(MediaError, match="its longer side may be at most 5 times"):
        load_image(long, Limits(max_aspect=5))


@pytest.mark.parametrize(
    ("kind", "size", "message"),
    [
        ("HEIF", (60_000, 60_000), "at most 100,000,000 are read"),
        ("HEIF", (9000, 12_000), "at most 100,000,000 are read"),
        ("HEIF", (2**31, 2**31), "cannot be read as HEIC"),
        ("HEIF", (9000, 9000), "cannot be read as HEIC"),
        ("HEIF", (0, 0), "cannot be read as HEIC"),
        ("HEIF", (1, 1), "cannot be read as HEIC"),
        ("AVIF", (9000, 12_000), "at most 100,000,000 are read"),
        ("AVIF", (2**31, 2**31), "cannot be read as AVIF"),
        ("AVIF", (0, 0), "cannot be read as AVIF"),
    ],
)
def test_telephone_pictures_that_lie_about_their_size(
    kind: str, size: tuple[int, int], message: str
) -> None:
    """In `ispe`, ISO 23008-12, 6.5.3: what it declares is compared before anything is decoded."""
    data = coded(smooth(), kind)
    place = data.index(b"ispe") + 8
    with pytest.raises(MediaError, match=message):
        load_image(data[:place] + struct.pack(">II", *size) + data[place + 8 :])


def test_without_pillow_heif_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    with pytest.raises(MediaError) as error:
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    assert str(error.value) == (
        "The picture is HEIC, which needs pillow-heif, and that is not installed."
    )
    assert error.value.hint == "Install it with: pip install 'phimlx[heic]'"
