"""`phimlx cache`, and what generate and chat keep by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from phimlx.cli.group import cli
from phimlx.generation.prefix_store import list_entries, prefixes_folder

TEXT = "one two three four five six seven eight nine ten " * 30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *given, **more: tmp_path / "cache")
    return prefixes_folder()


def phimlx(*arguments: str, piped: str | None = None) -> Result:
    return CliRunner().invoke(cli, arguments, input=piped, prog_name="phimlx")


def generate(prompt: str, *more: str) -> dict[str, Any]:
    options = ["--model", "nano", "--dtype", "float32", "--temp", "0", "--max-tokens", "4"]
    found = phimlx("generate", *options, "--json", "--prompt", prompt, *more)
    assert found.exit_code == 0, found.output
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def cached(prompt: str, *more: str) -> int:
    return int(generate(prompt, *more)["stats"]["cached_tokens"])


def test_generate_keeps_what_it_is_told_to(folder: Path) -> None:
    assert cached(TEXT) == 0
    assert not folder.exists()  # 700 tokens are few
    assert cached(TEXT + "A?", "--cache") == 0
    plain = generate(TEXT + "And B?")
    again = generate(TEXT + "And B?", "--cache")
    assert again["stats"]["cached_tokens"] > 600
    assert again["text"] == plain["text"]
    assert cached(TEXT + "And B?", "--no-cache") == 0
    assert len(list_entries(folder)) == 1


def test_long_prompts_are_kept_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phimlx.generation import prefix_store

    monkeypatch.setattr(
        prefix_store.PrefixStore.__init__, "__defaults__", (lambda text: None, None, None, 400)
    )
    assert cached(TEXT + "A?") == 0
    assert cached(TEXT + "And B?") > 600


def test_a_chat_keeps_what_was_said(folder: Path) -> None:
    options = ["chat", "--model", "nano", "--temp", "0", "--max-tokens", "4", "--cache"]
    first = phimlx(*options, piped=f"{TEXT}\n")
    assert first.exit_code == 0
    (entry,) = list_entries(folder)
    used = entry.used
    second = phimlx(*options, piped=f"{TEXT}\n")
    assert second.stdout == first.stdout
    (entry,) = list_entries(folder)
    assert entry.used > used
    assert phimlx(*options[:-1], "--no-cache", piped=f"{TEXT}\n").stdout == first.stdout


def test_what_is_kept_is_listed(folder: Path) -> None:
    empty = phimlx("cache", "list")
    assert (empty.exit_code, empty.stdout) == (0, f"0 bytes of 10.0 GB in {folder}\n")
    generate(TEXT, "--cache")
    generate(TEXT, "--cache", "--kv-bits", "8")
    found = json.loads(phimlx("cache", "list", "--json").stdout)
    assert found["folder"] == str(folder)
    assert found["limit"] == 10**10
    assert found["bytes"] == sum(each["bytes"] for each in found["prompts"])
    assert [(each["model"], each["kv_bits"], each["adapter"]) for each in found["prompts"]] == [
        ("nano", 8, False),
        ("nano", None, False),
    ]
    for each in found["prompts"]:
        path = Path(each["path"])
        assert each["bytes"] == path.stat().st_size
        assert 600 < each["tokens"] < 800
    (folder / path.name.replace(path.name[:4], "beef")).write_text("damaged")
    lines = phimlx("cache", "list").stdout.splitlines()
    assert lines[0].split() == ["model", "tokens", "size", "last", "used"]
    assert [line.split()[0] for line in lines if "nano" in line or "unreadable" in line] == [
        "unreadable",
        "nano",
        "nano",
    ]


@pytest.mark.parametrize("name", ["nano", "folder"])
def test_what_is_kept_is_cleared(folder: Path, name: str) -> None:
    from phimlx.hub.resolve import NANO

    generate(TEXT, "--cache")
    assert "Deleted 0 prompts" in phimlx("cache", "clear", "--model", "phi-4").stdout
    assert len(list_entries(folder)) == 1
    cleared = phimlx("cache", "clear", "--model", str(NANO) if name == "folder" else name)
    assert cleared.stdout.startswith("Deleted 1 prompt: ")
    assert list(folder.iterdir()) == []
    generate(TEXT, "--cache")
    (name_of,) = folder.iterdir()
    (folder / f".{name_of.stem}.01234567.safetensors").write_text("left behind")
    found = json.loads(phimlx("cache", "clear", "--json").stdout)
    assert found["deleted"] == 1
    assert list(folder.iterdir()) == []


def test_wrong_use() -> None:
    assert phimlx("cache").exit_code == 2
    assert phimlx("cache", "empty").exit_code == 2


def test_a_limit_that_is_none(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PHIMLX_CACHE_LIMIT", "much")
    found = phimlx("cache", "list")
    assert found.exit_code == 1
    said = (
        "Error: PHIMLX_CACHE_LIMIT: cache-limit: 'much' is not a valid number.\nHint: Unset it.\n"
    )
    assert found.output == said
    monkeypatch.setenv("PHIMLX_CACHE_LIMIT", "0")
    assert cached(TEXT, "--cache") == 0
    assert not folder.exists()
