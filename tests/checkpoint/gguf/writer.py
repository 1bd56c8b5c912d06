"""GGUF files byte by byte, whole or damaged, without the package that writes them well."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

STRING, ARRAY = 8, 9
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def value(found: Any) -> bytes:
    """A value with its type: whole numbers as uint32, others as float32."""
    if isinstance(found, bytes):  # as it is
        return found
    if isinstance(found, list):
        kind = STRING if found and isinstance(found[0], str) else 5
        items = [text(each) if kind == STRING else struct.pack("<i", each) for each in found]
        return struct.pack("<IIQ", ARRAY, kind, len(found)) + b"".join(items)
    if isinstance(found, str):
        return struct.pack("<I", STRING) + text(found)
    kind = {bool: 7, int: 4, float: 6}[type(found)]
    return struct.pack(f"<I{FORMS[kind]}", kind, found)


@dataclass
class Described:
    """A tensor as the header describes it; `offset` is counted from the end of the header."""

    name: str
    shape: Sequence[int]  # rows first
    type: int = 0
    data: bytes = b""
    offset: int | None = None


@dataclass
class Written:
    """A file, of which every part can be another than it should be."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    tensors: Sequence[Described] = ()
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    setting_count: int | None = None
    twice: Sequence[str] = ()
    alignment: int = 32

    def bytes(self) -> bytes:
        settings = [text(key) + value(found) for key, found in self.settings.items()]
        settings += [text(key) + value(self.settings[key]) for key in self.twice]
        described, body = [], b""
        for tensor in self.tensors:
            offset = len(body) if tensor.offset is None else tensor.offset
            described.append(
                text(tensor.name)
                + struct.pack("<I", len(tensor.shape))
                + struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
                + struct.pack("<IQ", tensor.type, offset)
            )
            body += tensor.data + bytes(-len(tensor.data) % self.alignment)
        counts = (
            len(described) if self.tensor_count is None else self.tensor_count,
            len(settings) if self.setting_count is None else self.setting_count,
        )
        header = self.magic + struct.pack("<IQQ", self.version, *counts)
        header += b"".join([*settings, *described])
        return header + bytes(-len(header) % self.alignment) + body
