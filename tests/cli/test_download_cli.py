"""`phimlx download`: what is printed, and how errors end; and the question before a large one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

import phimlx
from phimlx import api
from phimlx.cli import bars
from phimlx.cli.group import cli
from phimlx.cli.options import load_or_download
from phimlx.errors import ModelAbsentError
from phimlx.hub.cache import find_snapshot
from phimlx.hub.transfer import fetch
from phimlx.terminal.conversation import Conversation
from phimlx.terminal.output import Output
from tests.cli.terminal import CTRL_C, Terminal
from tests.convert.tiny import PHI_4, write_model
from tests.hub.loopback_hub import COMMIT, Fault, Hub, serve_alone

HOME = Path(phimlx.__file__).parents[1]
QUANTIZED = "mlx-community/Phi-4-mini-instruct-4bit"
ORIGINAL = "microsoft/Phi-4-mini-instruct"
FILES = {
    "config.json": b'{"model_type": "phi3"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(20_000),
}
SIZE = sum(map(len, FILES.values()))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with serve_alone(monkeypatch, tmp_path / "hub") as running:
        running.repos[QUANTIZED] = dict(FILES)
        running.repos[ORIGINAL] = dict(FILES)
        yield running


GET_ONE = "Get one with: phimlx download NAME\n"


def run(*arguments: str | Path, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)), input=input, prog_name="phimlx")


def snapshot(tmp_path: Path, repo: str) -> Path:
    return tmp_path / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("arguments", "repo", "name"),
    [
        (["phi-4-mini"], QUANTIZED, "phi-4-mini"),
        (["phi-4-mini", "--original"], ORIGINAL, ORIGINAL),
        ([ORIGINAL], ORIGINAL, ORIGINAL),
    ],
)
def test_what_a_person_reads(
    server: Hub, tmp_path: Path, arguments: list[str], repo: str, name: str
) -> None:
    result = run("download", *arguments)
    assert result.exit_code == 0
    assert result.stdout == f"{snapshot(tmp_path, repo)}: 3 files, 20.0 kB\n"
    assert result.stderr == (
        f"Downloading {repo} (0123456): 3 files, 20.0 kB.\nTry it: phimlx chat --model {name}\n"
    )


def test_a_folder_of_ones_own(server: Hub, tmp_path: Path) -> None:
    result = run("download", "phi-4-mini", "--local-dir", "mine")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'mine'}: 3 files, 20.0 kB\n"
    assert result.stderr.endswith(f"Try it: phimlx chat --model {tmp_path / 'mine'}\n")


def test_a_folder_of_ones_own_says_what_the_cache_has(server: Hub, tmp_path: Path) -> None:
    run("download", "phi-4-mini")
    result = run("download", "phi-4-mini", "--local-dir", "mine")
    assert result.stderr.startswith(
        f"Downloading {QUANTIZED} (0123456): 3 files, 20.0 kB, of which 20.0 kB is copied from the "
        "Hub's cache.\n"
    )


def test_a_revision_is_tried_by_its_folder(server: Hub, tmp_path: Path) -> None:
    result = run("download", "phi-4-mini", "--revision", "v1")
    folder = snapshot(tmp_path, QUANTIZED)
    assert result.stderr.endswith(f"Try it: phimlx chat --model {folder}\n")


def test_json(server: Hub, tmp_path: Path) -> None:
    result = run("download", "phi-4-mini", "--revision", "v1", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == {
        "model": "phi-4-mini",
        "repository": QUANTIZED,
        "commit": COMMIT,
        "path": str(snapshot(tmp_path, QUANTIZED)),
        "files": 3,
        "bytes": SIZE,
    }
    assert result.stderr == ""


def test_the_token_given_is_the_one_sent(server: Hub) -> None:
    assert run("download", "phi-4-mini", "--token", "hf_mine").exit_code == 0
    assert server.authorizations[f"hub/api/models/{QUANTIZED}"] == "Bearer hf_mine"


def test_a_renamed_repository(server: Hub) -> None:
    server.moved["someone/old"] = ORIGINAL
    result = run("download", "someone/old")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"someone/old is called {ORIGINAL} now.\n")


def test_an_interrupt_says_what_stays_and_the_next_run_goes_on(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        fetch(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("phimlx.hub.transfer.fetch", interrupted)
        result = run("download", "phi-4-mini")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr.endswith(
        "Stopped. What has come stays: the same command goes on from there.\n"
    )
    result = run("download", "phi-4-mini")
    assert result.exit_code == 0
    assert "3 files, 20.0 kB, of which 22 bytes is here.\n" in result.stderr


ON_A_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); "
    "from phimlx.cli.main import main; sys.argv[0] = 'phimlx'; main()"
)


def test_ctrl_c_on_a_terminal_stops_at_once_and_loses_nothing(server: Hub, tmp_path: Path) -> None:
    server.faults["model.safetensors"] = [Fault(hold=7_000)]
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", ON_A_TERMINAL, "download", "phi-4-mini"]
    with Terminal(arguments, Path.cwd(), PYTHONPATH=str(HOME), **environment) as terminal:
        terminal.expect("Total")
        terminal.expect("model.safetensors (3/3)")
        terminal.type(CTRL_C)
        terminal.expect("Stopped. What has come stays: the same command goes on from there.")
        assert terminal.wait() == 130
    server.release.set()
    assert find_snapshot(QUANTIZED) is None
    assert run("download", "phi-4-mini").exit_code == 0
    assert server.ranges["model.safetensors"] == [0, 7_000]


@pytest.mark.slow
def test_a_remark_leaves_the_bars_whole(server: Hub, tmp_path: Path) -> None:
    server.faults["model.safetensors"] = [Fault(status=503, headers={"Retry-After": "0"})]
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path)}
    arguments = [sys.executable, "-c", ON_A_TERMINAL, "download", "phi-4-mini"]
    with Terminal(arguments, Path.cwd(), PYTHONPATH=str(HOME), **environment) as terminal:
        shown = terminal.expect("The Hub is busy; trying again in 0 s.")
        assert shown.splitlines()[-1].rpartition("\r")[2].strip() == (
            "The Hub is busy; trying again in 0 s."
        )
        assert terminal.wait() == 0


def test_errors(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    result = run("download", "phi-4-mini")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == (
        "Error: The Hub cannot be reached at http://127.0.0.1:1.\n"
        "Hint: Check the network, then run it again; what has come stays.\n"
    )


def test_without_a_model_it_lists_what_there_is() -> None:
    result = run("download")
    assert result.exit_code == 0
    assert (result.stdout, result.stderr) == (run("list", "--available").stdout, GET_ONE)


# A folder as MODEL


def test_a_folder_is_checked(server: Hub, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", PHI_4)
    repo = {path.name: path.read_bytes() for path in source.iterdir()}
    server.repos["someone/tune"] = {"tokenizer.json": b"{}", **repo}
    assert run("download", "someone/tune", "--local-dir", "mine").exit_code == 0
    result = run("download", "./mine")
    assert result.exit_code == 0
    count = len(server.repos["someone/tune"])
    assert result.stdout.splitlines()[0].startswith("mine: ")
    assert result.stdout.endswith(
        f" of weights, every header whole\n{count} files have the contents that the Hub "
        "published.\n"
    )
    assert result.stderr == ""
    about = json.loads(run("download", "./mine", "--json").stdout)
    assert (about["files_right"], about["files_without_hash"]) == (count, [])


def test_a_folder_without_hashes(tmp_path: Path) -> None:
    result = run("download", write_model(tmp_path / "source", PHI_4))
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    assert result.stderr == "No hashes came with it, so its contents cannot be compared.\n"


def test_a_damaged_folder(server: Hub, tmp_path: Path) -> None:
    assert run("download", "phi-4-mini", "--local-dir", "mine").exit_code == 0
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"x" * 20_000)
    result = run("download", "./mine")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: mine is damaged: model.safetensors.\n"
        "Hint: Download it again; what is right stays as it is.\n"
    )


# Bars


def test_bars_count_every_byte_of_every_file(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list[float]] = {}

    class Bar:
        def __init__(self, total: float, label: str) -> None:
            self.counts = drawn.setdefault(label, [total, 0])

        def __enter__(self) -> SimpleNamespace:
            return SimpleNamespace(update=self.update)

        def __exit__(self, *exception: object) -> None:
            """Stay as drawn."""

        def update(self, nbytes: float) -> None:
            self.counts[1] += nbytes

    monkeypatch.setattr(Output, "progress", lambda self, total, label, unit: Bar(total, label))
    server.faults["model.safetensors"] = [Fault(wrong=True)]
    assert run("download", "phi-4-mini").exit_code == 0
    assert drawn == {
        "Total": [SIZE, SIZE],
        "config.json (1/3)": [22, 22],
        "tokenizer.json (2/3)": [2, 2],
        "model.safetensors (3/3)": [20_000, 20_000],
    }


# A model that chat or generate needs


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that were loaded, without a model."""
    loaded: list[Path] = []

    def load(folder: Path, *settings: object) -> SimpleNamespace:
        loaded.append(folder)
        return SimpleNamespace(remarks=())

    monkeypatch.setattr(api, "Phi", load)
    return loaded


ABSENT = "phi-4-mini is not on this machine.\n"


def test_where_nobody_can_be_asked_the_error_names_the_command(
    server: Hub, loads: list[Path]
) -> None:
    result = run("generate", "--model", "phi-4-mini", "--prompt", "Hi")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {ABSENT}Hint: Get it with: phimlx download phi-4-mini\n"
    assert server.authorizations == {}


def test_a_small_model_comes_without_a_question(
    server: Hub, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    load_or_download("phi-4-mini", Output())
    assert loads == [snapshot(tmp_path, QUANTIZED)]


@pytest.mark.parametrize("answer", ["y\n", "\n", "n\n"])
def test_a_large_model_is_asked_for(
    server: Hub,
    loads: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    monkeypatch.setattr(bars, "ASK_ABOVE", 20_000)
    result = run("chat", "--model", "phi-4-mini", input=answer)
    assert f"{ABSENT}Download {QUANTIZED}, 20.0 kB, now? [Y/n]: " in result.stderr
    if answer == "n\n":
        assert result.stderr.endswith(
            f"Error: {ABSENT}Hint: Get it with: phimlx download phi-4-mini\n"
        )
        assert (result.exit_code, server.requested, loads) == (1, [], [])
    else:
        assert len(loads) == 1


def test_a_model_that_a_saved_chat_names_is_asked_for(
    server: Hub, tmp_path: Path, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    path = tmp_path / "chat.json"
    Conversation("phi-4-mini").save(path)
    result = run("chat", "--load", str(path), input="n\n")
    assert f"{ABSENT}Download {QUANTIZED}, 20.0 kB, now? [Y/n]: " in result.stderr
    assert (result.exit_code, server.requested, loads) == (1, [], [])


@pytest.mark.parametrize(
    "config", [b'{"model_type": "bert"}', b'{"model_type": "llama", "hidden_size": 64}']
)
def test_a_model_that_is_no_phi_is_not_offered(
    config: bytes, server: Hub, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    server.repos["you/other"] = {**FILES, "config.json": config}
    result = run("chat", "--model", "you/other", input="y\n")
    kind = json.loads(config)["model_type"]
    assert result.exit_code == 1
    assert result.stderr.endswith(
        f"Error: you/other is no Phi model (its model_type is '{kind}').\n"
        "Hint: See what there is with: phimlx list --available\n"
    )
    assert (server.requested, loads) == (["config.json"], [])


def test_where_a_small_model_would_do_it_is_named(server: Hub) -> None:
    result = run("generate", "--image", __file__, "--prompt", "Hi")
    assert result.stderr.splitlines()[-1] == (
        "Hint: Get it with: phimlx download phi-4-multimodal, or try the small one that comes "
        "along right now: --model nano-multimodal"
    )


def test_offline_nothing_is_asked(
    server: Hub, loads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Output, "can_ask", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelAbsentError):
        load_or_download("phi-4-mini", Output())
    assert find_snapshot(QUANTIZED) is None
