"""lm-eval's tasks: our logits reach the harness; what is said where it is not installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import phimlx
from phimlx.api import Phi
from phimlx.errors import TrainingError
from phimlx.evaluation.lm_eval import _scored, run_tasks

QUESTIONS = [
    {"q": "What is 3 + 4?", "choices": ["7", "a cat"], "gold": 0},
    {"q": "What is 2 + 2?", "choices": ["nine days", "4"], "gold": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{q}}}}"
"""
KINDS = {
    "multiple_choice": 'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "generate_until": 'doc_to_target: "{{choices[gold]}}"\n'
    'generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
}


@pytest.fixture(scope="module")
def nano() -> Phi:
    return phimlx.load("nano", dtype="float32")


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks whose data is on this machine."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for kind, rest in KINDS.items():
        text = TASK.format(name=f"own_{kind}", file=file, kind=kind) + rest
        (tmp_path / f"{kind}.yaml").write_text(text)
    return tmp_path


def log_likelihood(phi: Phi, context: list[int], tokens: list[int]) -> float:
    """Of what follows a context, by one pass over the whole."""
    logits = phi.model(mx.array([tokens]))[0].astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return sum(float(logits[i - 1, tokens[i]]) for i in range(len(context), len(tokens)))


def test_likelihoods_over_a_large_vocabulary_are_those_of_float64() -> None:
    class LogitsAsStates(nn.Module):
        def head(self, x: mx.array) -> mx.array:
            return x

    random = np.random.default_rng(3)
    logits = (3 * random.standard_normal((2, 4, 200_064))).astype(np.float32)
    targets = logits.argmax(axis=-1)
    targets[0, 0] = 7
    model: Any = LogitsAsStates()
    scores, likeliest = _scored(model, mx.array(logits), mx.array(targets))
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(expected, targets[..., None], axis=-1)[..., 0]
    assert np.abs(np.array(scores) - expected).max() < 2e-6
    assert np.array(likeliest).sum() == 7


def test_tasks_are_answered_by_our_model(nano: Phi, tasks: Path) -> None:
    names = [f"own_{kind}" for kind in KINDS]
    assert run_tasks(nano, names, include_path=tasks) == {
        "own_multiple_choice": {"acc": 1.0},
        "own_generate_until": {"exact_match": 1.0},
    }


def test_likelihoods_are_those_of_one_pass(nano: Phi, tasks: Path) -> None:
    from phimlx.evaluation.lm_eval import _language_model

    assert nano.tokenizer is not None
    encode = nano.tokenizer.encode

    class Request:
        def __init__(self, *arguments: Any) -> None:
            self.args = arguments

    bridge = _language_model(nano, 2, chat_template=False)
    context, ends = "What is 3 + 4?", (" 7", " nine and more", " 7 and some more of it")
    found = bridge.loglikelihood([Request(context, end) for end in ends])
    for end, (value, is_likeliest) in zip(ends, found, strict=True):
        expected = log_likelihood(nano, encode(context), encode(context + end))
        assert value == pytest.approx(expected, abs=1e-3)
        assert not is_likeliest
    texts = ["What is it?", "The quick brown fox jumps over the lazy dog. " * 12]
    assert len(encode(texts[1])) > 128  # on the other side of nano's LongRoPE step
    rolled = bridge.loglikelihood_rolling([Request(text) for text in texts])
    for text, value in zip(texts, rolled, strict=True):
        ids = encode(text)
        assert value == pytest.approx(log_likelihood(nano, ids[:1], ids), rel=1e-5)


def test_a_task_that_there_is_not(nano: Phi, tasks: Path) -> None:
    with pytest.raises(TrainingError) as caught:
        run_tasks(nano, ["no_such_task"], include_path=tasks)
    assert str(caught.value) == "lm-eval has no task no_such_task."


def test_without_lm_eval(nano: Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TrainingError) as caught:
        run_tasks(nano, ["arc_easy"])
    assert str(caught.value) == "Tasks are lm-eval's, which is not installed."
    assert caught.value.hint == "Install it with: pip install 'phimlx[lm-eval]'"
