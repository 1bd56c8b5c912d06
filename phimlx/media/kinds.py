"""Kinds of media by the ends of their files' names."""

from __future__ import annotations

from pathlib import PurePath

SUFFIXES = {
    "image": (
        *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".heic", ".heif", ".avif"),
    ),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".m4a", ".aac"),
    "video": (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"),
}


def kind_of(name: str) -> str | None:
    """Return the kind of media that the end of a name tells; None for any other."""
    suffix = PurePath(name).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)
