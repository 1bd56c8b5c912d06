"""A file of prompts: each reply is that of its line alone, in order, and nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import phimlx
from phimlx.errors import GenerationError, PromptError
from phimlx.generation.engine import Engine
from phimlx.prompt_file import answer_file, count_lines

LINES: tuple[Any, ...] = (
    "What is 3 + 4?",
    {"prompt": "What is the capital of France?", "id": "fr"},
    {"messages": [{"role": "user", "content": "Spell cat backwards."}], "custom_id": 7},
    [{"role": "user", "content": "Hi"}],
    {"prompt": "Tell me a story.", "temperature": 1.0, "seed": 5, "max_tokens": 12},
    {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {
        "model": "gpt", "messages": [{"role": "user", "content": "What is 2 + 2?"}],
        "max_tokens": 4, "user": "x"}},
    "What is 3 + 4?",
)  # fmt: skip
SETTINGS = {"temperature": 0.0, "seed": 1, "max_tokens": 20}


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


def write(path: Path, lines: tuple[Any, ...] = LINES) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(phi: phimlx.Phi, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that come to the model from now on."""
    seen: list[list[int]] = []
    make = phimlx.Phi.request

    def request(self: phimlx.Phi, *given: Any) -> Any:
        made = make(self, *given)
        seen.append(made.prompt)
        return made

    monkeypatch.setattr(phimlx.Phi, "request", request)
    return seen


def test_lines_ask_for_log_probabilities_and_biases(phi: phimlx.Phi, tmp_path: Path) -> None:
    """As OpenAI's batch files do: a bias for tokens whose numbers are keys, which are text."""
    lines = (
        {"prompt": "Hi", "logprobs": True, "top_logprobs": 2, "max_tokens": 3},
        {"prompt": "Hi", "logit_bias": {"65": 100}, "max_tokens": 3},
        {"prompt": "Hi", "prompt_logprobs": 0, "max_tokens": 0},
        {"prompt": "Hi", "logit_bias": {"65": 1000}},
        {"messages": [{"role": "assistant", "content": "So"}], "continue_final_message": True},
    )
    result = answer_file(phi, write(tmp_path / "in", lines), tmp_path / "out", SETTINGS)
    assert not result.unused
    told, biased, scored, refused, _ = rows(tmp_path / "out")
    assert [len(found["top"]) for found in told["logprobs"]] == [2, 2, 2]
    assert phi.tokenizer is not None
    assert biased["text"] == phi.tokenizer.decode([65] * 3)
    assert scored["prompt_logprobs"][0] is None
    assert len(scored["prompt_logprobs"]) == len(phi.encode("Hi"))
    assert refused["error"] == "logit_bias of token '65' is 1000; it must be from -100 to 100."


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_reply_is_that_of_its_line_alone(
    phi: phimlx.Phi, tmp_path: Path, batch_size: int
) -> None:
    source, target = write(tmp_path / "q.jsonl"), tmp_path / "a.jsonl"
    advanced: list[int] = []
    result = answer_file(
        phi, source, target, SETTINGS, batch_size=batch_size, advance=advanced.append
    )
    assert (result.answered, result.failed, dict(result.unused)) == (7, {}, {"user": 1})
    assert sum(advanced) == count_lines(source) == 7
    found = rows(target)
    assert [row["line"] for row in found] == list(range(1, 8))
    assert [row.get("id") for row in found] == [None, "fr", 7, None, None, "b", None]
    prompts: list[tuple[Any, dict[str, Any]]] = [
        (LINES[0], {}),
        (LINES[1]["prompt"], {}),
        (LINES[2]["messages"], {}),
        (LINES[3], {}),
        (LINES[4]["prompt"], {"temperature": 1.0, "seed": 5, "max_tokens": 12}),
        (LINES[5]["body"]["messages"], {"max_tokens": 4}),
        (LINES[6], {}),
    ]
    for row, (prompt, own) in zip(found, prompts, strict=True):
        alone = phi.generate(prompt, **{**SETTINGS, **own}, prompt_lookup=False)
        assert (row["text"], row["finish_reason"]) == (alone.text, alone.finish_reason)
        assert row["seed"] == alone.seed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_what_was_answered_is_not_asked_again(
    phi: phimlx.Phi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far an interrupted run had come, and wherever in a line it was killed."""
    source, target = write(tmp_path / "q.jsonl"), tmp_path / "a.jsonl"
    answer_file(phi, source, target, SETTINGS)
    whole = rows(target)
    journal = tmp_path / "a.jsonl.part"
    interrupt = iter([3])
    run = Engine.run_each

    def stopped(self: Engine, *given: Any) -> Any:
        for number, request in enumerate(run(self, *given)):
            if number == left:
                raise KeyboardInterrupt
            yield request

    left = next(interrupt)
    target.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "run_each", stopped)
        with pytest.raises(KeyboardInterrupt):
            answer_file(phi, source, target, SETTINGS, batch_size=2)
    assert not target.exists()
    kept = journal.read_bytes()
    assert kept.count(b"\n") == left
    second = kept.index(b"\n") + 1
    for cut, answered in ((len(kept), 3), (len(kept) - 1, 2), (second + 9, 1), (second, 1), (1, 0)):
        journal.write_bytes(kept[:cut])
        seen = asked(phi, monkeypatch)
        result = answer_file(phi, source, target, SETTINGS)
        assert (result.kept, len(seen)) == (answered, len(LINES) - answered)
        again = rows(target)
        for one, other in zip(again, whole, strict=True):
            assert {**one, "stats": None} == {**other, "stats": None}
        assert not journal.exists()
        target.unlink()


def test_other_settings_are_other_replies(
    phi: phimlx.Phi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write(tmp_path / "q.jsonl", LINES[:1]), tmp_path / "a.jsonl"
    answer_file(phi, source, target, SETTINGS)
    key = json.dumps({"key": "none", "text": "forged"})
    for settings, about, system in (
        ({**SETTINGS, "seed": 2}, [], None),
        (SETTINGS, ["another model"], None),
        (SETTINGS, [], "Be brief."),
    ):
        target.unlink()
        (tmp_path / "a.jsonl.part").write_text(key + "\n")
        seen = asked(phi, monkeypatch)
        answer_file(phi, source, target, settings, about=about, system=system)
        assert len(seen) == 1
        assert ("Be brief." in phi.tokenizer.decode(seen[0])) == (system is not None)  # type: ignore[union-attr]


BAD = (
    ("{", "is not JSON"),
    ("7", "is no prompt"),
    ("{}", "is no prompt"),
    ('{"prompt": null}', "is no prompt"),
    ('{"prompt": {"a": 1}}', "is no prompt"),
    ('{"prompt": "a", "messages": []}', "both a prompt and messages"),
    ('{"messages": [{"role": "nobody", "content": "x"}]}', "nobody"),
    ('{"prompt": "a", "temperature": -1}', "temperature"),
    ('{"prompt": "a", "temperature": "hot"}', "temperature"),
    ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    ('{"prompt": "a", "max_tokens": 1e9}', "max_tokens"),
    ('{"prompt": "a", "seed": "x"}', "seed"),
    ('{"prompt": "a", "stop": [7]}', "stop"),
    ('{"prompt": "a", "tools": "x"}', "Tools"),
    ('{"prompt": ""}', "empty"),
    ('""', "empty"),
    ("[" * 100_000, "nested"),
    ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "number"),
    ('{"prompt": [999999999]}', "no token"),
)


@pytest.mark.parametrize(("line", "said"), BAD, ids=[line[:30] for line, _ in BAD])
def test_a_bad_line_is_reported_and_the_others_are_answered(
    phi: phimlx.Phi, tmp_path: Path, line: str, said: str
) -> None:
    source, target = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    source.write_text(f'"What is 3 + 4?"\n\n{line}\n"Hi"\n')
    result = answer_file(phi, source, target, {**SETTINGS, "max_tokens": 2})
    assert list(result.failed) == [3]
    assert said in result.failed[3]
    assert len(result.failed[3]) < 300
    found = rows(target)
    assert [row["line"] for row in found] == [1, 3, 4]
    assert found[1] == {"line": 3, "error": result.failed[3]}
    assert found[0]["text"].startswith("7")


def test_files_that_are_none(phi: phimlx.Phi, tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", LINES[:1])
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(PromptError):
            answer_file(phi, wrong, tmp_path / "a.jsonl", SETTINGS)
    with pytest.raises(GenerationError):
        answer_file(phi, source, tmp_path / "none" / "a.jsonl", SETTINGS)
    with pytest.raises(PromptError) as caught:
        answer_file(phi, source, source, SETTINGS)
    assert str(caught.value) == f"{source} exists already."
    assert rows(source) == [LINES[0]]
