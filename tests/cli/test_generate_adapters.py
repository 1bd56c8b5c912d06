"""`phimlx generate --prompts` with lines that name adapters."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

import phimlx
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.peft import write_peft
from phimlx.cli.group import cli
from phimlx.cli.options import split_adapters
from phimlx.models.lora import LoRA

PATH = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    width, height = phimlx.load("nano").model.config.projection_shapes["mlp.down_proj"]
    for number, name in enumerate("abc"):
        a, b = (mx.random.key(10 * number + each) for each in range(2))
        lora = LoRA(mx.random.normal((width, 2), key=a), mx.random.normal((2, height), key=b), 3.0)
        write_peft(folder / name, Adapter({PATH: lora}))
    return folder


def test_lines_name_adapters(adapters: Path, tmp_path: Path) -> None:
    lines = [
        ({"prompt": "Hi", "adapter": "one"}, "a"),
        ("Hi", "c"),
        ({"prompt": "Hi", "adapter": "two", "id": 7}, "b"),
        ({"prompt": "Hi", "adapter": "three"}, None),
        ({"prompt": "Hi", "adapter": ["one"]}, None),
    ]
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text("".join(f"{json.dumps(line)}\n" for line, _ in lines))
    arguments = [
        *("generate", "--model", "nano", "--dtype", "float32", "--temp", "0"),
        *("--max-tokens", "12", "--adapter-path", str(adapters / "c")),
        *("--adapter-path", f"one={adapters / 'a'}", "--adapter-path", f"two={adapters / 'b'}"),
        *("--prompts", str(source), "--output", str(target)),
    ]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "Error: 2 of 5 lines could not be answered: 4, 5." in result.stderr
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    for row, (_, name) in zip(rows[:3], lines, strict=False):
        assert name is not None
        phi = phimlx.load("nano", adapters / name, "float32")
        assert row["text"] == phi.generate("Hi", temperature=0, max_tokens=12).text
    assert len({row["text"] for row in rows[:3]}) == 3
    assert rows[3]["error"] == "There is no adapter 'three'."
    assert rows[4]["error"] == "There is no adapter ['one']."


def test_what_does_not_go_together(adapters: Path, tmp_path: Path) -> None:
    source = tmp_path / "q.jsonl"
    source.write_text('"Hi"\n')
    prompts = ["--prompts", str(source), "--output", str(tmp_path / "o")]
    for given, more, message in (
        (["one=a"], ["Hi"], "NAME=ADAPTER belongs to --prompts, whose lines give the name."),
        (["one=a", "one=b"], prompts, "--adapter-path is given twice for 'one'."),
        (["a", "b"], prompts, "With --prompts give each a name: NAME=ADAPTER."),
    ):
        flags = [text for each in given for text in ("--adapter-path", each)]
        result = CliRunner().invoke(cli, ["generate", "--model", "nano", *flags, *more])
        assert result.exit_code == 2
        assert message in result.stderr
    for name, message in (
        (f"a b={adapters / 'a'}", "'a b' is no name of an adapter."),
        (f"one={tmp_path / 'none'}", f"There is no adapter folder {tmp_path / 'none'}."),
    ):
        result = CliRunner().invoke(
            cli, ["generate", "--model", "nano", "--adapter-path", name, *prompts]
        )
        assert (result.exit_code, message in result.stderr) == (1, True)
    assert not (tmp_path / "o").exists()


def test_a_folder_with_an_equals_sign_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rank=8").mkdir()
    assert split_adapters(["rank=8"]) == ("rank=8", {})
    assert split_adapters(["./rank=9", "x=rank=8"]) == ("./rank=9", {"x": "rank=8"})
    assert split_adapters(["you/a", "x=you/b"]) == ("you/a", {"x": "you/b"})
    assert split_adapters([]) == (None, {})
