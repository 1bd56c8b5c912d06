"""Two processes that share a model answer as one does, and one's death ends the run in order."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import psutil
import pytest
from mlx.utils import tree_flatten

import phimlx
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, map_model
from phimlx.errors import ConfigError
from phimlx.models.tensor_parallel import check_shardable
from tests.adapters.test_variants import write_adapters
from tests.everything import everything
from tests.generation.small import CONFIG, make_model
from tests.multimodal import multimodal_folder
from tests.reasoning_vision import reasoning_vision_folder
from tests.sharing.answers import ADAPTERS, answered, memory_of
from tests.training.folder import write_tiny
from tests.training.test_distributed import LAUNCH, ROOT, two_free_ports

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def launched(module: str, *arguments: object) -> list[str]:
    """The command that runs a module in two processes."""
    port = str(two_free_ports())
    launch = [str(LAUNCH), "-n", "2", "--backend", "ring", "--starting-port", port, "--cwd"]
    return [*launch, str(ROOT), "--", sys.executable, "-m", module, *map(str, arguments)]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launched(module, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def make_quantized(folder: Path, **changes: Any) -> Path:
    """A model at 4 bits whose groups two machines can share."""
    make_model(folder, **{"hidden_size": 128, "intermediate_size": 128, **HEADS, **changes})
    form = {"group_size": 32, "bits": 4, "mode": "affine"}
    model = map_model(Checkpoint(folder))
    nn.quantize(model, **form)
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": form}))
    return folder


def make_phi(folder: Path, **changes: Any) -> Path:
    """Phi-2's layout: biases, and projections that are not fused."""
    config = {key: value for key, value in CONFIG.items() if key != "rope_scaling"}
    config |= {
        **HEADS,
        "hidden_size": 128,
        "model_type": "phi",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **changes,
    }
    for key in ("rms_norm_eps", "original_max_position_embeddings", "head_dim"):
        config.pop(key)
    config["partial_rotary_factor"] = 0.5
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(5)
    weights: Any = tree_flatten(build_model(config).parameters())
    arrays = {name: mx.random.normal(array.shape) * 0.1 for name, array in weights}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "mlx"})
    return folder


MAKERS: dict[str, Callable[[Path, Path], object]] = {
    "fused": lambda folder, data: make_model(folder, num_key_value_heads=2),
    "quantized": lambda folder, data: make_quantized(folder),
    "phi": lambda folder, data: make_phi(folder),
    "multimodal": lambda folder, data: multimodal_folder(data, folder),
    "vision": lambda folder, data: reasoning_vision_folder(data, folder, least=16),
}
"""By name, what writes a model into a folder, given the tests' data."""


def load(folder: Path, adapter: Path | None = None) -> phimlx.Phi:
    return phimlx.load(folder, adapter, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("text=fused", "adapted=fused", "shown=multimodal"),
        pytest.param(
            ("text=quantized", "text=phi", "adapted=quantized", "shown=vision"), marks=everything
        ),
    ],
    ids=("usual", "all"),
)
def test_answers_and_memory_are_those_of_shares(
    tmp_path: Path, data: Path, names: tuple[str, ...]
) -> None:
    wide = make_model(tmp_path / "wide", **WIDE, **HEADS)
    asked: dict[str, tuple[str, Path]] = {}
    for kind, _, name in (each.partition("=") for each in names):
        folder = tmp_path / name / "model"
        if not folder.exists():
            folder.mkdir(parents=True)
            MAKERS[name](folder, data)
        if kind == "adapted":
            write_adapters(folder, folder.parent / ADAPTERS)
        asked[f"{kind}={folder}"] = kind, folder
    done = run("tests.sharing.answers", tmp_path / "out", wide, *asked)
    assert (tmp_path / "out.0.json").exists(), done.stderr
    first, second = (json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in (0, 1))
    for given, (kind, folder) in asked.items():
        wanted, found = answered(kind, load, folder), first[given]
        assert wanted.keys() == found.keys()
        assert kind != "text" or wanted["drafted"][0] > 0
        assert kind != "shown" or any(tokens[0] for tokens in wanted["turn 1"])
        for name, value in wanted.items():
            if name.endswith("logits"):
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5, err_msg=name)
            else:
                assert found[name] == value, (given, name)
    whole = memory_of(wide, None)
    assert whole["peak"] >= whole["weights"]
    layer = 4 * 256 * (256 + 128 + 3 * 1024)  # bytes of its projections
    for taken in (first["memory"], second["memory"]):
        assert taken["weights"] == whole["weights"] - 4 * layer // 2
        assert taken["held"] <= taken["weights"] + (1 << 16)
        assert taken["peak"] <= taken["weights"] + 1.5 * layer + (1 << 16)
        assert taken["peak"] < 0.8 * whole["weights"]


def command(folder: Path, *more: str) -> list[str]:
    settings = ("--max-tokens", "24", "--private", "--no-cache", *more)
    return ["generate", "--model", str(folder), "Say so", *settings]


@pytest.mark.slow
def test_the_first_machine_alone_talks(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    arguments = command(folder, "--temp", "1.5", "--seed", "3", "--json")
    alone = subprocess.run(
        [sys.executable, "-m", "tests.sharing.killed", "never", "0", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    together = run("tests.sharing.killed", "never", "0", *arguments)
    assert together.returncode == 0, together.stderr
    assert json.loads(together.stdout)["text"] == json.loads(alone.stdout)["text"]


@everything
def test_one_message_tells_what_is_wrong(tmp_path: Path) -> None:
    absent = run("tests.sharing.killed", "never", "0", *command(tmp_path / "absent"))
    assert (absent.stdout + absent.stderr).count("Error:") == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [pytest.param(0, marks=everything), 1])
def test_a_lost_machine_ends_the_run(tmp_path: Path, rank: int) -> None:
    folder = write_tiny(tmp_path / "model")
    lost = run("tests.sharing.killed", f"SIGKILL@{rank}", "3", *command(folder))
    said = lost.stdout + lost.stderr
    assert said.count("Error:") == 1
    assert "Error: Another of the 2 machines is lost, so the run ends here" in said


@everything
@pytest.mark.parametrize("when", [0, 3])
def test_an_interrupt_ends_all_of_them(tmp_path: Path, when: int) -> None:
    folder = write_tiny(tmp_path / "model")
    ended = run("tests.sharing.killed", "SIGINT@0", when, *command(folder))
    assert "Node with rank 0 exited with code 130" in ended.stderr
    assert "Error:" not in ended.stdout + ended.stderr


@everything
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_machine_that_is_stopped_ends_the_run(tmp_path: Path, rank: int) -> None:
    folder = write_tiny(tmp_path / "model")
    started = launched("tests.sharing.killed", f"SIGSTOP@{rank}", "3", *command(folder))
    with subprocess.Popen(
        started, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        family = psutil.Process(process.pid)

        def end() -> None:
            for each in [*family.children(recursive=True), family]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()

        deadline = Timer(300, end)
        deadline.start()
        assert process.stdout is not None
        told = any("Another machine has not answered for" in line for line in process.stdout)
        end()  # a process that is stopped stays, and mlx.launch with it
        deadline.cancel()
    assert told


@pytest.mark.parametrize(
    ("heads", "size", "odd", "hint"),
    [
        ((24, 8), 3, "8 key/value heads", "These numbers of machines can: 2, 4, 8."),
        ((40, 10), 4, "10 key/value heads", "These numbers of machines can: 2, 5, 10."),
        ((3, 1), 2, "3 attention heads", "Run it on one machine."),
    ],
)
def test_heads_that_do_not_divide_name_the_counts_that_do(
    heads: tuple[int, int], size: int, odd: str, hint: str
) -> None:
    counts = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    config = {**CONFIG, **counts, "hidden_size": 32 * heads[0], "intermediate_size": 960}
    with pytest.raises(ConfigError) as refused:
        check_shardable(build_model(config), size)
    assert str(refused.value) == f"{size} machines cannot share this model evenly: it has {odd}."
    assert refused.value.hint == hint


def test_a_model_that_is_not_shared_says_so(data: Path) -> None:
    model = build_model(json.loads((data / "tiny" / "tiny-phi4flash" / "config.json").read_text()))
    known = r"Those that can be shared: phi3, phi, phi4mm, phi4-siglip\."
    with pytest.raises(ConfigError, match=known):
        check_shardable(model, 2)
