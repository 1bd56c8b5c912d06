"""Files of tools that people hand over, and what is said where they cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from phimlx.errors import PromptError
from phimlx.prompt.tools import load_tools


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "{path} holds no tools."),
        ("3", "{path}: Tools must be a list."),
        ('["search"]', "{path}: tools[0] is not an object."),
        ('[{"name": "a"}, {"description": "b"}]', "{path}: tools[1] has no name."),
    ],
)
def test_what_holds_no_tools_is_said(content: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(content)
    with pytest.raises(PromptError) as caught:
        load_tools(path)
    assert str(caught.value) == reason.format(path=path)
    assert (
        caught.value.hint == 'A tool is {"name": …, "description": …, "parameters": {JSON schema}}.'
    )


def test_tools_are_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_bytes(b'\xef\xbb\xbf[{"name": "search"}]')
    assert load_tools(path) == [{"name": "search"}]
