"""What pruning shows: its picture, and the memory that it said before."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load_model as load_in_mlx_lm

from convert import Quantization, convert
from convert.measure.compare import Agreement
from convert.prune.layers import LayerChoice
from convert.prune.memory import forecast
from convert.prune.plan import Pruning, PruningPlan
from convert.prune.report import PruneReport, compare, report_tokens
from convert.prune.widths import WidthChoice
from convert.prune.write import write_pruned
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.cli.group import cli
from phimlx.cli.healing import Healing
from phimlx.errors import PhimlxError
from phimlx.hub.resolve import NANO
from tests.convert.tiny import PHI_4, write_model
from tests.training.folder import COPIED

AGREEMENTS = (
    Agreement(4, 128, False, 512, 11.0, 14.5, 0.3, 0.8),
    Agreement(1, 256, True, 256, 11.0, float("inf"), 99.0, 0.0),  # nothing of it is left
)
LAYERS = LayerChoice("influence", (0.4, 0.1, 0.2, 0.3), (0, 2, 3))
WIDTHS = {"mlp": WidthChoice(((3.0, 1.0, 2.0),) * 3, ((0, 2),) * 3)}


@pytest.mark.parametrize(
    ("pruning", "panels"),
    [(Pruning(LAYERS), 2), (Pruning(None, WIDTHS), 2), (Pruning(LAYERS, WIDTHS), 3)],
)
def test_a_picture(pruning: Pruning, panels: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture, and is an extra")
    report = PruneReport(tmp_path / "$m$", pruning, 800, 600, AGREEMENTS, (90.0, 120.0))
    report.draw(tmp_path / "prune.png")
    content = (tmp_path / "prune.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    size = [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)]
    assert size == [600 * panels, 600]
    assert [file.name for file in tmp_path.iterdir()] == ["prune.png"]
    missing = tmp_path / "none" / "prune.png"
    with pytest.raises(PhimlxError) as caught:
        report.draw(missing)
    assert str(caught.value) == f"{missing} cannot be written: no such file or directory."


@pytest.mark.slow
def test_without_matplotlib_all_else_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("phimlx.cli.prune._speeds", lambda *given: (90.0, 120.0))
    out = tmp_path / "out"
    model = str(write_wide(tmp_path / "model", 96).folder)
    arguments = ["prune", "--model", model, "--layers", "1", "--mlx-path", str(out), "--json"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0
    assert len(json.loads(result.stdout)["kept"]) == 1
    assert (
        "A picture of what was pruned needs matplotlib, which is not installed. Install it with: "
        "pip install 'phimlx[plots]'\n"
    ) in result.stderr
    assert not (out / "prune.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("largest", "method"), [("attention", "influence"), ("mlp", "divergence")])
def test_the_memory_is_what_was_forecast(largest: str, method: str, tmp_path: Path) -> None:
    model = write_wide(tmp_path / "model", 1024 if largest == "mlp" else 96)
    plan = PruningPlan.of(model, 1, {"heads": 1}, method)
    told = forecast(plan)
    pruning, peak = measured(lambda: plan.choose(None))
    assert told["measuring"] == pytest.approx(peak, rel=0.15)
    write_pruned(model, tmp_path / "out", pruning, lambda nbytes: None)
    after, tokens = Checkpoint(tmp_path / "out"), report_tokens(model, None)
    _, peak = measured(lambda: compare(model, after, tokens, lambda percent: None))
    assert told["comparing"] == pytest.approx(peak, rel=0.15)


def write_wide(folder: Path, mlp: int) -> Checkpoint:
    """A model of so many mlp channels that reads windows of 512 tokens, with nano's tokenizer."""
    config = {**PHI_4, "vocab_size": 1536, "max_position_embeddings": 1024}
    config |= {"original_max_position_embeddings": 1024, "intermediate_size": mlp}
    write_model(folder, config)
    for name in COPIED:
        shutil.copyfile(NANO / name, folder / name)
    return Checkpoint(folder)


def measured(work: Any) -> tuple[Any, int]:
    """What comes of work, and the bytes that it took at the peak."""
    gc.collect()
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    return work(), mx.get_peak_memory() - held


@pytest.mark.parametrize(("text", "message"), [
    ("", "The calibration text is empty."),
    ("Too short.", "a report needs 32 at least"),
])  # fmt: skip
def test_a_text_to_measure_on_is_read_first(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text)
    out = tmp_path / "out"
    arguments = ["prune", "--model", str(NANO), "--layers", "3", "--mlx-path", str(out)]
    result = CliRunner().invoke(cli, [*arguments, "--report-text", str(tmp_path / "text.txt")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("rows", [None, '{"prompt": "a"}\n', "no row"])
def test_data_to_heal_on_is_read_first(rows: str | None, tmp_path: Path) -> None:
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    if rows is not None:
        data.write_text(rows)
    arguments = ["prune", "--model", str(NANO), "--layers", "3", "--mlx-path", str(out)]
    result = CliRunner().invoke(cli, [*arguments, "--heal", str(data)])
    assert result.exit_code == 1
    assert "rows.jsonl" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("bits", [None, 4])
def test_a_healed_model_is_in_the_layout_of_the_pruned_one(
    bits: int | None, tmp_path: Path
) -> None:
    source = write_wide(tmp_path / "model", 96).folder
    if bits is not None:
        convert(source, tmp_path / "quantized", Quantization(32, bits))
        source = tmp_path / "quantized"
    before, out, adapter = Checkpoint(source), tmp_path / "out", tmp_path / "out-adapter"
    heads = {"heads": WidthChoice(((1.0, 2.0),) * 2, ((1,),) * 2)}
    write_pruned(before, out, Pruning(None, heads), lambda nbytes: None, split=True)
    adapter.mkdir()
    key = mx.random.key(0)
    name = "model.layers.0.self_attn.o_proj"
    weights = {f"{name}.lora_a": mx.random.normal((32, 2), key=key)}
    weights[f"{name}.lora_b"] = mx.random.normal((2, 64), key=key)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), weights)
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]}
    about = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    Healing(before, out, "rows.jsonl", split=True).fuse()
    healed = Checkpoint(tmp_path / "out-healed")
    told = [json.loads((each / "config.json").read_text()) for each in (out, healed.folder)]
    assert told[0] == told[1]
    tokens = mx.array([[5, 6, 7, 9]])
    logits = load_model(healed)(tokens)
    assert mx.allclose(load_in_mlx_lm(healed.folder)[0](tokens), logits, atol=1e-4)
    assert not mx.allclose(load_model(Checkpoint(out))(tokens), logits, atol=1e-2)
    expected = {"out", "out-adapter", "out-healed", "model", source.name}
    assert {file.name for file in tmp_path.iterdir()} == expected


@pytest.mark.parametrize("there", ["out", "out-adapter", "out-healed"])
def test_a_folder_that_is_there_stays(there: str, tmp_path: Path) -> None:
    (tmp_path / there).mkdir()
    arguments = ["prune", "--model", str(NANO), "--layers", "3"]
    arguments += ["--mlx-path", str(tmp_path / "out"), "--heal", "rows.jsonl"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert f"{tmp_path / there} exists already." in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == [there]
