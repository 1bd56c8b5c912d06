"""Models converted straight from a Hub: each weight file comes, is converted, and goes."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from convert import ConversionResult, Quantization
from convert import convert as convert_model
from convert import plan as plan_module
from convert.export import gguf
from convert.streaming import stream_model
from phimlx.checkpoint import head
from phimlx.cli.group import cli
from phimlx.errors import CheckpointError, ConfigError, ConversionError, DownloadError
from phimlx.hub import transfer
from phimlx.hub.client import Remote
from tests.checkpoint.test_tensors import split
from tests.convert.export.test_gguf import TOKENIZER
from tests.convert.tiny import MINI, PHI_4, parameters, plan, same_bits, weights_of, write_model
from tests.hub.loopback_hub import Fault, Hub, serve

REPO = "someone/tune"
FOUR = Quantization(32, 4)
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@dataclass
class World:
    """A Hub with a model of three weight files, and the same model on this machine."""

    hub: Hub
    source: Path
    out: Path
    counted: list[int] = field(default_factory=list)

    def convert(self) -> ConversionResult:
        remote = Remote(wait=lambda seconds: None)
        with stream_model(REPO, self.out, remote) as model:
            model.report = self.counted.append
            return plan(model.folder, self.out, FOUR, files=model).run()

    @property
    def left(self) -> set[str]:
        """What there is beside the source."""
        return {path.name for path in self.out.parent.iterdir()} - {"source", "expected"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    weights = parameters(PHI_4, mx.bfloat16)
    source = write_model(tmp_path / "source", PHI_4, weights, shards=3)
    (source / "tokenizer.json").write_text("{}")
    with serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        running.repos[REPO] = {file.name: file.read_bytes() for file in source.iterdir()}
        yield World(running, source, tmp_path / "out")


def test_what_comes_is_what_would_have_come_from_the_disk(world: World) -> None:
    expected = world.out.with_name("expected")
    convert_model(world.source, expected, FOUR)
    result = world.convert()
    assert world.left == {"out"}
    assert same_bits(weights_of(world.out), weights_of(expected))
    assert (world.out / "config.json").read_bytes() == (expected / "config.json").read_bytes()
    assert (world.out / "tokenizer.json").read_text() == "{}"
    assert result.bytes_before == 2 * result.parameters
    assert sum(world.counted) == sum(len(world.hub.repos[REPO][name]) for name in SHARDS)


@pytest.mark.parametrize("block", [500, 16 << 20])
@pytest.mark.parametrize("row", [None, 0, 47])
def test_a_tied_head_of_other_values_comes_too(
    world: World, row: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "BLOCK_BYTES", block)
    weights = parameters(MINI, mx.bfloat16)
    weights["lm_head.weight"] = mx.array(weights["model.embed_tokens.weight"])
    if row is not None:
        weights["lm_head.weight"][row, 5] = 3
    write_model(world.source, MINI, weights, shards=3)
    world.hub.repos[REPO] = {file.name: file.read_bytes() for file in world.source.iterdir()}
    expected = world.out.with_name("expected")
    convert_model(world.source, expected, FOUR)
    world.convert()
    assert same_bits(weights_of(world.out), weights_of(expected))
    config = json.loads((world.out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (row is None)
    assert ("lm_head.weight" in weights_of(world.out)) is (row is not None)


def test_one_weight_file_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    coming = world.out.with_name(".out.source") / "coming"
    seen: list[set[str]] = []
    fetch = transfer.fetch

    def watched(*arguments: object) -> None:
        fetch(*arguments)
        if coming.is_dir():
            seen.append({file.name for file in coming.glob("*.safetensors")})

    monkeypatch.setattr(transfer, "fetch", watched)
    world.convert()
    assert seen == [{name} for name in SHARDS]


@pytest.mark.parametrize("model_type", ["phi3", "llama"])
def test_a_tensor_whose_pieces_lie_in_several_files(world: World, model_type: str) -> None:
    expected = world.out.with_name("expected")
    convert_model(world.source, expected, FOUR)
    config = {**PHI_4, "model_type": model_type}
    write_model(world.source, config, split(parameters(PHI_4, mx.bfloat16)), shards=3)
    world.hub.repos[REPO] = {file.name: file.read_bytes() for file in world.source.iterdir()}
    with stream_model(REPO, world.out, Remote(wait=lambda seconds: None)) as model:
        planned = plan(model.folder, world.out, FOUR, files=model)
        # what is in pieces is read when the last file that it needs has come
        assert model.spare(planned.tensors.file_order) == model.nbytes
        assert model.spare([frozenset({model.folder / name}) for name in SHARDS]) == max(
            file.size for file in model.shards
        )
        planned.run()
    assert same_bits(weights_of(world.out), weights_of(expected))
    assert sorted(name for name in world.hub.requested if name in SHARDS) == sorted(SHARDS * 3)


def test_a_connection_that_breaks_is_taken_up(world: World) -> None:
    # The first two answers of each file are its header.
    world.hub.faults[SHARDS[1]] = [Fault(), Fault(), Fault(cut=10_000), Fault(cut=1)]
    world.convert()
    assert same_bits(
        weights_of(world.out),
        weights_of(convert_model(world.source, world.out.with_name("expected"), FOUR).path),
    )


def test_a_network_that_fails_costs_nothing_that_was_done(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(plan_module, "BATCHES_AHEAD", 1)
    monkeypatch.setattr(plan_module, "parallel_streams", lambda: [mx.default_stream(mx.cpu)])
    world.hub.faults[SHARDS[2]] = [Fault(), Fault(), *[Fault(status=503)] * 20]
    with pytest.raises(DownloadError):
        world.convert()
    assert world.left == {".out.partial", ".out.source"}
    world.hub.faults.clear()
    world.hub.requested.clear()
    result = world.convert()
    assert result.continued > 0
    assert SHARDS[0] in world.hub.requested  # its header
    served = [name for name in world.hub.requested if name.endswith(".safetensors")]
    assert served.count(SHARDS[0]) == 2  # and no more than that
    assert world.left == {"out"}
    assert same_bits(
        weights_of(world.out),
        weights_of(convert_model(world.source, world.out.with_name("expected"), FOUR).path),
    )


def test_a_network_that_fails_costs_nothing_of_a_gguf_file(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: pip install 'phimlx[gguf]'")
    (world.source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    world.hub.repos[REPO]["tokenizer.json"] = json.dumps(TOKENIZER).encode()
    monkeypatch.setattr(gguf, "JOURNAL_BYTES", 1)
    monkeypatch.setattr(gguf, "BATCHES_AHEAD", 1)

    def export() -> ConversionResult:
        remote = Remote(wait=lambda seconds: None)
        with stream_model(REPO, world.out, remote) as model:
            return plan(model.folder, world.out, layout="gguf", files=model).run()

    world.hub.faults[SHARDS[2]] = [Fault(), Fault(), *[Fault(status=503)] * 20]
    with pytest.raises(DownloadError):
        export()
    assert world.left == {".out.partial", ".out.source"}
    world.hub.faults.clear()
    assert export().continued > 0
    assert world.left == {"out"}
    expected = world.out.with_name("expected")
    plan(world.source, expected, layout="gguf").run()
    assert world.out.read_bytes() == expected.read_bytes()


def test_an_interrupt_does_not_wait_for_the_network(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    world.hub.faults[SHARDS[1]] = [Fault(), Fault(), *[Fault(hold=100)] * 20]
    waits: list[float] = []

    def wait(seconds: float) -> None:  # while the main thread waits for a block
        waits.append(seconds)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with (
        pytest.raises(KeyboardInterrupt),
        stream_model(REPO, world.out, Remote(wait=wait)) as model,
    ):
        plan(model.folder, world.out, FOUR, files=model).run()
    assert 1 <= len(waits) <= 2
    assert world.left == {".out.partial", ".out.source"}
    world.hub.release.set()
    world.hub.faults.clear()
    world.convert()
    assert world.left == {"out"}


def test_wrong_bytes_never_become_a_model(world: World) -> None:
    world.hub.faults[SHARDS[1]] = [Fault(), Fault(), *[Fault(wrong=True)] * 2]
    with pytest.raises(DownloadError) as caught:
        world.convert()
    assert str(caught.value) == (
        f"{SHARDS[1]} of {REPO} came twice with contents that are not what the Hub says they are; "
        "they are deleted."
    )
    assert not world.out.exists()


def test_a_header_that_changes_on_the_way(world: World) -> None:
    header = world.hub.repos[REPO][SHARDS[1]]
    length = 8 + int.from_bytes(header[:8], "little")
    changed = header[8:length].replace(b'"pt"', b'"tp"')
    assert changed != header[8:length]
    with stream_model(REPO, world.out, Remote()) as model:
        file = model.folder / SHARDS[1]
        file.write_bytes(header[:8] + changed + bytes(len(header) - length))
        with pytest.raises(CheckpointError) as caught:
            plan(model.folder, world.out, FOUR, files=model).run()
    assert str(caught.value) == f"{SHARDS[1]} does not begin as the Hub said it does."
    assert world.left == set()


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 200_000_000])
def test_a_header_without_end_is_not_fetched(world: World, length: int) -> None:
    world.hub.repos[REPO][SHARDS[0]] = length.to_bytes(8, "little") + bytes(100)
    with pytest.raises(CheckpointError) as caught:
        world.convert()
    assert str(caught.value) == f"{SHARDS[0]} of {REPO} is not a whole safetensors file."
    assert world.left == set()


def test_another_architecture_is_seen_before_the_weights_come(world: World) -> None:
    world.hub.repos[REPO]["config.json"] = json.dumps({"model_type": "gpt2"}).encode()
    with pytest.raises(ConfigError):
        world.convert()
    assert world.counted == []
    assert world.left == set()


def test_damaged_weights_leave_nothing(world: World) -> None:
    weights = parameters(PHI_4, mx.bfloat16)
    weights["lm_head.weight"][0, 0] = float("nan")
    write_model(world.source, PHI_4, weights, shards=3)
    world.hub.repos[REPO] = {file.name: file.read_bytes() for file in world.source.iterdir()}
    with pytest.raises(ConversionError) as caught:
        world.convert()
    assert str(caught.value) == "lm_head.weight holds NaN or infinity: this model is damaged."
    assert world.left == set()


def test_two_at_once(world: World) -> None:
    with stream_model(REPO, world.out, Remote()):
        with pytest.raises(ConversionError) as caught:
            world.convert()
        assert str(caught.value) == f"{world.out} is being written by another process."
        assert world.left == {".out.source"}
    assert world.left == set()


def test_an_output_that_exists_is_seen_first(world: World) -> None:
    world.out.mkdir()
    with pytest.raises(ConversionError, match="exists already"):
        world.convert()
    assert world.hub.requested == []


# The command


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)], prog_name="phimlx")


def test_the_command(world: World) -> None:
    result = run(REPO, "--out", world.out, "-q", "--q-group-size", "32")
    assert result.exit_code == 0
    nbytes = sum(len(world.hub.repos[REPO][name]) for name in SHARDS)
    assert result.stderr == (
        f"{REPO} is not on this machine: each of its 3 weight files ({nbytes / 1000:.0f} kB) is "
        f"converted as it arrives, and not kept.\nTry it: phimlx chat --model {world.out}\n"
    )
    assert world.left == {"out"}
    shown = run(REPO, "--out", world.out.with_name("expected"), "--json")
    assert json.loads(shown.stdout)["source"] == REPO


def test_the_original_can_be_kept(world: World) -> None:
    result = run(REPO, "--out", world.out, "--keep-original")
    assert result.exit_code == 0
    assert world.left == {"out", "hub"}
    assert same_bits(weights_of(world.out), weights_of(world.source))
    world.hub.requested.clear()
    assert run(REPO, "--out", world.out.with_name("expected"), "-q").exit_code == 0
    assert world.hub.requested == []


def test_offline(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run(REPO, "--out", world.out)
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {REPO} is not on this machine.\n"
        f"Hint: If it is a Phi model, get it with: phimlx download {REPO}\n"
    )
