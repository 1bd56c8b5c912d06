"""README's commands work as printed, and its folder map is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The first fenced block under a heading."""
    section = README.split(f"## {heading}\n", 1)[1]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_ten_things_work_as_printed(tmp_path: Path) -> None:
    lines = block("Ten things to do", "sh").splitlines()
    assert len(lines) == 10
    (tmp_path / "phimlx").symlink_to(ROOT / "phimlx")  # as in the clone, and nothing is left there
    for line in lines:
        done = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path,
            env=environment(),
            input="What is 3 + 4?\n",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (line, done.returncode, done.stderr) == (line, 0, done.stderr)
        assert done.stdout.strip(), line


def test_python_block_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block("From Python", "python")],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 stop ")


@pytest.mark.parametrize("name", ["demo", "test"])
def test_the_two_commands_are_there(name: str) -> None:
    assert f"scripts/{name} " in block("Two commands", "sh")
    assert os.access(ROOT / "scripts" / name, os.X_OK)


def test_the_folder_map_is_true() -> None:
    lines = block("Where things are", "").splitlines()
    parent, mapped = Path(), set()
    for line in lines:
        name = line.split()[0]
        path = parent / name if line.startswith(" ") else Path(name)
        if not line.startswith(" "):
            parent = path
        assert (ROOT / path).exists(), path
        mapped.add(path)
    hidden = {"__pycache__", "__main__.py", "py.typed"}
    for item in (ROOT / "phimlx").iterdir():
        assert item.name in hidden or Path("phimlx") / item.name in mapped, item


def test_contributing_names_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:phimlx|convert|tests|scripts)/[\w./]*)", text))
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path
    rooms = {path.name for path in (ROOT / "phimlx").iterdir() if (path / "__init__.py").exists()}
    assert {name for name in rooms if f"`phimlx/{name}/`" not in text} == set()


def test_the_changelog_says_each_thing_once_in_whole_lists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    items = re.split(r"\n(?=- )", re.sub(r"\n+#.*", "", text))[1:]
    begins = [item[:60] for item in items]
    assert sorted(set(begins)) == sorted(begins)
    assert "\n\n- " not in re.sub(r"#.*\n\n- ", "", text)
    for release in re.split(r"\n## ", text)[1:]:
        headings = re.findall(r"\n### (\w+)\n", release)
        assert headings == [name for name in ("Added", "Changed", "Fixed") if name in headings]
