"""The Xing header of an MP3, the frame that counts the others: one for a file that has none."""

from __future__ import annotations

_RATES = (44100, 48000, 32000)  # Hz, of MPEG 1; half of it in MPEG 2, a quarter in 2.5
_VERSIONS = {3: 1, 2: 2, 0: 4}  # bits of the header: what divides the rate
_MARKS = (b"Xing", b"Info", b"VBRI")
# Frames that nobody decodes: far above what any limit lets through, within what decoders count.
_ENDLESS = 1 << 24


def xing_frame(data: bytes) -> bytes:
    """Make a frame to put before an MP3 that does not count its frames; empty for anything else.

    libsndfile guesses how many there are from the first, and stops there: where the bitrate
    varies, in the middle of the sound. Told of more than there can be, it reads to the end.

    Source: ISO 11172-3, 2.4.1.3 (header); Xing's VBR header, as every encoder writes it.
    """
    start = _past_id3(data)
    header = data[start : start + 4]
    if len(header) < 4 or any(mark in data[start : start + 200] for mark in _MARKS):
        return b""
    divisor = _VERSIONS.get(header[1] >> 3 & 3)
    rate = header[2] >> 2 & 3
    if header[0] != 0xFF or header[1] >> 5 != 7 or header[1] >> 1 & 3 != 1:
        return b""  # no frame of layer III
    if divisor is None or rate == 3:
        return b""
    mono = header[3] >> 6 == 3
    side = (17 if mono else 32) if divisor == 1 else (9 if mono else 17)
    # At the highest bitrate, without padding or checksum.
    size = (144 * 320_000 if divisor == 1 else 72 * 160_000) * divisor // _RATES[rate]
    frame = bytes((0xFF, header[1] | 1, 14 << 4 | rate << 2, header[3])) + bytes(side)
    frame += b"Xing" + (1).to_bytes(4, "big") + _ENDLESS.to_bytes(4, "big")
    return frame.ljust(size, b"\0")


def _past_id3(data: bytes) -> int:
    """Find where the tag at the beginning ends, of which the size is four times seven bits."""
    if not data.startswith(b"ID3") or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size
