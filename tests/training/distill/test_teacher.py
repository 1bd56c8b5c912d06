"""A teacher's probabilities on disk, and steps towards them, against plain computations."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from phimlx.errors import TrainingError
from phimlx.training.data.batches import Batches, Example
from phimlx.training.distill import logits_file
from phimlx.training.distill.divergence import KINDS, Divergence
from phimlx.training.distill.logits_file import LogitsPlan, LogitsWriter, TeacherLogits
from phimlx.training.distill.step import DistillationStep
from phimlx.training.distill.teacher import compute, groups
from phimlx.training.settings import TrainSettings
from phimlx.training.trainable import attach
from tests.training.models import tiny
from tests.training.test_step import Recorder, examples

K = 7


def plan_of(data: list[Example], k: int = K, temperature: float = 1.0) -> LogitsPlan:
    return LogitsPlan.of("f" * 64, 300, k, temperature, data)


def written(path: Path, data: list[Example], temperature: float = 1.0) -> TeacherLogits:
    with LogitsWriter.open(path, plan_of(data, temperature=temperature)) as writer:
        assert compute(tiny(seed=1), writer, lambda count: None)
    return TeacherLogits(path)


def full_logs(example: Example, temperature: float = 1.0) -> np.ndarray:
    """Log-probabilities of all tokens at the positions that are learned, in float64."""
    logits = np.array(tiny(seed=1)(mx.array(example.tokens[None, :-1]))[0], np.float64)
    scaled = logits[example.supervised[1:]] / temperature
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_file_holds_the_likeliest_and_the_rest(tmp_path: Path, temperature: float) -> None:
    data = [*examples(), examples()[0]]  # one of them twice
    found = written(tmp_path / "t.safetensors", data, temperature)
    assert len(load_file(found.path)["examples"]) == len(data) - 1
    for example in data:
        exact = full_logs(example, temperature)
        tokens, logs = found.read(np.arange(len(exact)) + found.place(example))
        best = np.sort(exact, -1)[:, ::-1][:, :K]
        assert np.abs(logs[:, :K] - best).max() < 3e-3  # float16 of numbers up to 8
        assert np.abs(np.take_along_axis(exact, tokens, -1) - best).max() < 1e-4
        assert np.abs(np.exp(logs).sum(-1) - 1).max() < 1e-6
        rest = 1 - np.exp(best).sum(-1)
        assert np.abs(np.exp(logs[:, K]) - rest).max() < 1e-3
    assert found.about["temperature"] == repr(temperature)


def test_k_of_the_whole_vocabulary_leaves_one_token_for_the_rest() -> None:
    assert plan_of(examples(), 5000).k == 299


def test_what_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    data = examples([40 + i % 9 for i in range(300)])  # several passes
    assert len(list(groups(plan_of(data).examples))) == 4
    whole = written(tmp_path / "whole.safetensors", data).path
    path = tmp_path / "parts.safetensors"
    for passes in (1, 2):
        stop = partial(next, iter([False] * passes + [True]))
        with LogitsWriter.open(path, plan_of(data)) as writer:
            assert not compute(tiny(seed=1), writer, lambda n: None, stop)
    seen: list[int] = []
    with LogitsWriter.open(path, plan_of(data)) as writer:
        assert 0 < writer.done < len(data)
        assert compute(tiny(seed=1), writer, seen.append)
    assert seen[0] > 0
    assert sum(seen) == plan_of(data).positions
    assert path.read_bytes() == whole.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, whole.name]


def test_another_plan_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    with LogitsWriter.open(path, plan_of(examples())) as writer:
        writer.done = 3
        writer.save()
    with LogitsWriter.open(path, plan_of(examples())) as writer:
        assert writer.done == 3
        with pytest.raises(TrainingError, match="Another run is writing"):
            LogitsWriter.open(path, plan_of(examples())).__enter__()
    for other in (plan_of(examples(), K + 1), plan_of(examples()[1:])):
        with LogitsWriter.open(path, other) as writer:
            assert writer.done == 0


def test_what_is_damaged_or_hostile_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    written(path, examples())
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:length])

    def refused(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(TrainingError) as error:
            TeacherLogits(path)
        return str(error.value)

    random = np.random.default_rng(0)
    for place in random.integers(length, len(whole), 20).tolist():
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        assert "contents are not what was written" in refused(bytes(flipped))
    for size in (0, 5, length, len(whole) - 1):
        assert "not a whole safetensors file" in refused(whole[:size])

    def with_metadata(**changes: str) -> bytes:
        about = {**header["__metadata__"], **changes}
        text = json.dumps({**header, "__metadata__": about}).encode()
        return len(text).to_bytes(8, "little") + text + whole[length:]

    assert "no teacher's probabilities" in refused(with_metadata(format="another"))
    assert "header is incomplete" in refused(with_metadata(k="many"))
    assert "other shapes" in refused(with_metadata(k="6"))
    path.write_bytes(with_metadata(vocab_size="9"))  # whole, but of tokens beyond
    with pytest.raises(TrainingError, match="tokens or probabilities that are none"):
        TeacherLogits(path).read(np.arange(50))


def test_limits_of_size_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, path = plan_of(examples()), tmp_path / "t.safetensors"
    plan.check_size(path, plan.nbytes)
    with pytest.raises(TrainingError, match=r"would take .* the limit is"):
        plan.check_size(path, plan.nbytes - 1)
    monkeypatch.setattr(logits_file, "free_space", lambda folder: 10)
    with pytest.raises(TrainingError, match="its disk has 10 bytes"):
        plan.check_size(path, 1 << 40)


def plain_loss(
    model: nn.Module, data: list[Example], teacher: TeacherLogits, loss: Divergence
) -> tuple[float, dict[str, mx.array]]:
    """The mean over tokens, each example alone, all logits, by automatic differentiation."""
    total = sum(int(each.supervised[1:].sum()) for each in data)

    def mean() -> mx.array:
        summed = mx.array(0.0)
        for each in data:
            wanted = np.flatnonzero(each.supervised[1:])
            logits = model(mx.array(each.tokens[None, :-1]))[0][mx.array(wanted)]
            tokens, logs = map(mx.array, teacher.read(wanted * 0 + np.arange(len(wanted))
                                                      + teacher.place(each)))  # fmt: skip
            q = mx.softmax(logits / loss.temperature, axis=-1)
            chosen = mx.take_along_axis(q, tokens, axis=-1)
            mask = (mx.arange(300)[None, None] != tokens[:, :, None]).all(axis=1)
            q = mx.concatenate([chosen, (q * mask).sum(-1, keepdims=True)], -1)
            p = mx.exp(logs)
            m = loss.beta * p + (1 - loss.beta) * q
            apart = {
                "forward-kl": p * mx.log(p / q),
                "reverse-kl": q * mx.log(q / p),
                "jsd": loss.beta * p * mx.log(p / m) + (1 - loss.beta) * q * mx.log(q / m),
            }[loss.kind].sum(-1)
            entropy = nn.losses.cross_entropy(logits, mx.array(each.tokens[1:][wanted]))
            both = loss.sft * entropy + (1 - loss.sft) * loss.temperature**2 * apart
            summed = summed + both.sum()
        return summed / total

    before = model.trainable_parameters()
    value, gradients = nn.value_and_grad(model, mean)()
    model.update(before)
    return float(value), dict(tree_flatten(gradients))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "way", ["lora", "full, tied", "full, untied, packed, accumulated", "temperature and sft"]
)
def test_steps_equal_each_example_alone(tmp_path: Path, kind: str, way: str) -> None:
    data = examples((5, 31, 33, 12, 20))
    loss = Divergence(kind, 0.3, 1.0, 0.0)
    if way == "temperature and sft":
        loss = Divergence(kind, 0.5, 2.0, 0.4)
    teacher = written(tmp_path / "t.safetensors", data, loss.temperature)
    model, recorder = tiny("untied" not in way), Recorder()
    if "full" not in way:
        attach(model, TrainSettings(rank=4))
        parameters = dict(tree_flatten(model.trainable_parameters()))
        moved = [(name, array + 0.02) for name, array in parameters.items()]
        model.load_weights(moved, strict=False)
    expected, gradients = plain_loss(model, data, teacher, loss)
    step = DistillationStep(model, recorder, divergence=loss, teacher=teacher)
    shape = {"row_length": 40} if "packed" in way else {}
    size = 2 if "accumulated" in way else 8
    batches = list(Batches(data, size, seed=3, **shape).epoch(0))
    result = step(1, batches)
    assert result.loss == pytest.approx(expected, rel=1e-5)
    weight = (1 - loss.sft) * loss.temperature**2
    parts = weight * result.metrics["divergence"] + loss.sft * result.metrics["cross-entropy"]
    assert parts == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        scale = float(mx.abs(gradient).max())
        assert float(mx.abs(recorder.seen[name] - gradient).max()) <= 2e-5 * scale, name
    assert step.evaluate(batches).loss == pytest.approx(expected, rel=1e-5)
    alone = [step.evaluate([batch.alone(0)]).loss for batch in batches[:1]]
    first = next(each for each in data if each.source == batches[0].sources[0])
    assert alone[0] == pytest.approx(plain_loss(model, [first], teacher, loss)[0], rel=1e-5)


def test_examples_that_the_file_lacks_are_told_apart(tmp_path: Path) -> None:
    data = examples()
    teacher = written(tmp_path / "t.safetensors", data[:-1])
    assert [each in teacher for each in data] == [True] * (len(data) - 1) + [False]
    assert len(list(Batches(data, 3).epoch(0))) == 3
