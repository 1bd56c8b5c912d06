"""Reasoning-vision on the command line, with a tiny model: what people type and what they read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from phimlx.checkpoint.folder import Checkpoint
from phimlx.cli.group import cli
from phimlx.machine.memory import patches_bytes
from phimlx.models.phi4siglip.config import VisionConfig
from phimlx.models.registry import part_of
from tests.media.sounds import noise, sound_file
from tests.reasoning_vision import picture, reasoning_vision_folder


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = reasoning_vision_folder(data, tmp_path_factory.mktemp("sees"), 4)
    # As the published folder is, without its long system prompt.
    text = (made / "chat_template.jinja").read_text()
    start = text.index("{% for message")
    (made / "chat_template.jinja").write_text("<think><|dummy_84|>" + text[start:])
    return made


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Image.fromarray(picture(0, 60, 40)).save(tmp_path / "cat.png")
    (tmp_path / "hum.wav").write_bytes(sound_file(noise(1.0), 16_000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str | Path, piped: str | None = None) -> Result:
    return CliRunner().invoke(cli, [*map(str, arguments)], input=piped, prog_name="phimlx")


def test_show(folder: Path) -> None:
    about = json.loads(run("show", folder, "--json").stdout)
    vision = VisionConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert about["picture"] == {"patches": 3600, "working": patches_bytes(vision, 3600, 4)}
    assert about["architecture"] == "phi4-siglip"
    assert about["whole_parameters"] == 94_416
    assert "A picture of 3,600 patches, the largest, takes about" in run("show", folder).stdout


def test_show_the_published_model() -> None:
    about = json.loads(run("show", "phi-4-reasoning-vision", "--json").stdout)
    assert about["picture"]["working"] == patches_bytes(VisionConfig.from_dict({}), 3600)
    assert about["sampling"] == {"temperature": 0.8, "top_p": 0.95}
    assert about["parameters"] - about["whole_parameters"] == 14_659_507_200


def test_generate(folder: Path, files: Path) -> None:
    call = (
        "generate",
        "--model",
        folder,
        "--temp",
        "0",
        "--max-tokens",
        "3",
        "--json",
        "--no-cache",
    )
    lengths = {}
    for mode in ("auto", "on", "off"):
        result = run(*call, "--image", "cat.png", "--reasoning", mode, "What?")
        assert result.exit_code == 0, result.stderr
        reply = json.loads(result.stdout)
        lengths[mode] = reply["stats"]["prompt_tokens"]
        if mode == "on":
            assert reply["text"] == ""
    assert lengths["on"] == lengths["off"] == lengths["auto"] + 1
    without = json.loads(run(*call, "What?").stdout)["stats"]["prompt_tokens"]
    assert lengths["auto"] == without + 6 + 1  # patches and a line's end


def test_what_is_refused(folder: Path, files: Path) -> None:
    result = run("generate", "--model", folder, "--audio", "hum.wav", "What?")
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {folder.name} sees, but does not hear: it takes no sounds.\n"
        "Hint: Use nano-multimodal, which comes along, or phi-4-multimodal.\n",
    )
    result = run("transcribe", "--model", folder, "hum.wav")
    assert result.exit_code == 1
    assert f"{folder.name} sees, but does not hear: it takes no sounds." in result.stderr
    result = run("generate", "--model", folder, "--reasoning", "maybe", "What?")
    assert result.exit_code == 2
    assert "'maybe' is not one of 'auto', 'on', 'off'" in result.stderr
    result = run("generate", "--model", "nano", "--reasoning", "off", "What?")
    assert result.stderr == (
        "Error: nano does not reason, so reasoning cannot be off.\n"
        "Hint: Leave it out, or use a model that reasons, such as phi-4-reasoning.\n"
    )


def test_chat(folder: Path, files: Path) -> None:
    lines = ["/image cat.png", "What?", "/set reasoning off", "And?", "/audio hum.wav"]
    options = ("--temp", "0", "--max-tokens", "4", "--no-cache")
    result = run("chat", "--model", folder, *options, piped="\n".join(lines))
    assert result.exit_code == 1
    assert "With your next message: picture cat.png" in result.stderr
    assert result.stderr.endswith(
        f"Error: {folder.name} sees, but does not hear: it takes no sounds.\n"
        "Hint: Use nano-multimodal, which comes along, or phi-4-multimodal.\n"
    )
    assert "reasoning  off\n" in result.stderr
    assert result.stdout.count("\n") == 2


@pytest.mark.parametrize("encoders", [False, True])
def test_convert(folder: Path, tmp_path: Path, files: Path, encoders: bool) -> None:
    out = tmp_path / "out"
    more = ["--q-encoders"] if encoders else []
    result = run("convert", folder, "--mlx-path", out, "-q", "--q-group-size", "32", *more)
    assert result.exit_code == 0, result.stderr
    tensors = Checkpoint(out).tensors
    packed = {part_of(name) for name in tensors if name.endswith(".scales")}
    assert packed == ({None, "encoders"} if encoders else {None})
    call = ("generate", "--model", out, "--temp", "0", "--max-tokens", "2", "--json", "--no-cache")
    reply = json.loads(run(*call, "--image", "cat.png", "What?").stdout)
    assert reply["stats"]["generated_tokens"] == 2


def test_convert_knows_no_adapters_of_it(folder: Path, tmp_path: Path) -> None:
    result = run("convert", folder, "--mlx-path", tmp_path / "out", "-q", "--q-adapters")
    assert result.stderr == (f"Error: {folder} has no adapters.\nHint: Leave --q-adapters out.\n")


@pytest.mark.slow
def test_train_on_text(folder: Path, tmp_path: Path, files: Path) -> None:
    """One step of LoRA over the language model; what it learned goes with pictures too."""
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]}
        for said in ("<|dummy_84|>Hello.", "<think>Hm.</think>Hello.")
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = tmp_path / "adapter"
    call = ("train", "--model", folder, "--data", data, "--adapter-path", adapter)
    result = run(*call, "--iters", "1", "--batch-size", "1", "--num-layers", "1")
    assert result.exit_code == 0, result.stderr
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["num_layers"] == 1
    options = ("--temp", "0", "--max-tokens", "2", "--json", "--no-cache", "--image", "cat.png")
    spoken = run("generate", "--model", folder, "--adapter-path", adapter, *options, "What?")
    assert spoken.exit_code == 0, spoken.stderr
    fused = tmp_path / "fused"
    result = run("fuse", "--model", folder, "--adapter-path", adapter, "--save-path", fused)
    assert result.exit_code == 0, result.stderr
    again = run("generate", "--model", fused, *options, "What?")
    assert json.loads(again.stdout)["text"] == json.loads(spoken.stdout)["text"]
