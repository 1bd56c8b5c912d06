"""Questions out of rows, checks of answers, and rows out of what passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import GrammarError, TrainingError
from phimlx.hub.resolve import NANO
from phimlx.training.data.faults import DataError
from phimlx.training.data.loss_mask import RowEncoder
from phimlx.training.data.row_types import read_content
from phimlx.training.data.rows import Row
from phimlx.training.distill.answers import Asking
from phimlx.training.distill.checkers import (
    JUDGE,
    Novelty,
    check_judge,
    is_approved,
    is_expected,
    is_whole,
    judge_prompt,
    matching,
    under_schema,
)
from phimlx.training.distill.questions import Question, read_questions

ASKED = Question("t, line 1", [{"role": "user", "content": "What is 2 + 2?"}], None, "4")


def reply(text: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "finish_reason": "stop", "tool_calls": [], **more}


@pytest.mark.parametrize(
    ("values", "count", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, 1, "b"),
        ({"prompt": "a"}, 1, None),
        ({"prompt": "a", "completion": ""}, 1, None),
        ({"prompt": "a", "completion": None, "system": "s"}, 2, None),
        ({"instruction": "a", "output": "b"}, 1, "b"),
        ({"instruction": "a", "input": "c"}, 1, None),
        ({"messages": [{"role": "user", "content": "a"}]}, 1, None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         1, "b"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                            {"from": "human", "value": "c"}]}, 3, None),
    ],
)  # fmt: skip
def test_the_last_answer_is_what_is_asked_for(
    values: dict[str, Any], count: int, expected: str | None
) -> None:
    (question,) = read_questions([Row("t, line 1", values)], {}, thinks=False)
    assert (len(question.messages), question.expected) == (count, expected)
    assert question.messages[-1]["role"] == "user"


def test_a_mapped_column_is_a_question() -> None:
    rows = [Row("t, line 1", {"q": "a"}), Row("t, line 2", {"q": "a", "a": "b"})]
    found = read_questions(rows, {"prompt": "q", "completion": "a"}, thinks=False)
    assert [each.expected for each in found] == [None, "b"]


def test_rows_that_ask_nothing_are_named() -> None:
    rows = [Row("t, line 1", {"text": "a"}), Row("t, line 2", {"other": 1})]
    with pytest.raises(DataError, match=r"2 faults:\n  t, line 1: This is a text") as error:
        read_questions(rows, {}, thinks=False)
    assert error.value.count == 2


def test_only_the_teachers_answer_is_learned() -> None:
    values = {"messages": [{"role": "user", "content": "a"},
                           {"role": "assistant", "content": "b"},
                           {"role": "user", "content": "c"}]}  # fmt: skip
    (question,) = read_questions([Row("t, line 1", values)], {}, thinks=False)
    content, unused = read_content(question.answered(reply("d")), {})
    assert not unused
    assert content.unlearned == {1}
    assert content.messages[-1].content == "d"


def test_answers_are_compared_by_their_words() -> None:
    for text, right in (("4", True), ("The 4.", True), ("5", False), ("", False), ("44", False)):
        assert (is_expected(ASKED, reply(text)) is None) == right
    signs = Question("t", ASKED.messages, None, "+")
    assert is_expected(signs, reply("-")) is not None
    assert is_expected(signs, reply(" + ")) is None
    assert "no answer" in str(is_expected(Question("t", ASKED.messages), reply("4")))


def test_what_was_cut_or_says_nothing_is_rejected() -> None:
    assert is_whole(ASKED, reply("4")) is None
    assert is_whole(ASKED, reply("", tool_calls=[{"name": "f", "arguments": {}}])) is None
    assert is_whole(ASKED, reply("4", finish_reason="length")) is not None
    assert is_whole(ASKED, reply(" \n")) is not None


def test_answers_are_held_to_a_schema() -> None:
    check = under_schema({"type": "object", "properties": {"n": {"type": "integer"}},
                          "required": ["n"]})  # fmt: skip
    verdicts = {'{"n": 1}': True, '{\n "m": 0,\n "n": 2\n}': True, '{"n": "1"}': False,
                "n": False, "[" * 100_000: False}  # fmt: skip
    for text, right in verdicts.items():
        assert (check(ASKED, reply(text)) is None) == right, text[:20]
    with pytest.raises(TrainingError, match="no JSON Schema"):
        under_schema({"type": "nothing"})
    with pytest.raises(TrainingError, match="cannot be applied"):
        under_schema({"$ref": "https://example.com/x.json"})(ASKED, reply("1"))


def test_answers_are_held_to_an_expression() -> None:
    encoder = RowEncoder.load(NANO)
    stop = set(encoder.stop_tokens)
    check = matching(r"-?[0-9]+|none", encoder.tokenizer, 1536, stop)
    for text, right in {"12": True, "none": True, "-7": True, "12.": False, "": False,
                        "non": False, "Löffel": False}.items():  # fmt: skip
        assert (check(ASKED, reply(text)) is None) == right, text
    slow = matching("(a+)+b", encoder.tokenizer, 1536, stop)  # which others take years for
    assert slow(ASKED, reply("a" * 5000)) is not None
    with pytest.raises(GrammarError):
        matching("(", encoder.tokenizer, 1536, stop)


def test_a_judges_prompt_shows_each_part_as_it_stands() -> None:
    filled = judge_prompt(
        "{question}|{answer}|{expected}|{x}", ASKED, reply("{question} {expected}")
    )
    assert filled == "What is 2 + 2?|{question} {expected}|4|{x}"
    assert check_judge(JUDGE) == JUDGE
    with pytest.raises(TrainingError, match="does not show the answer"):
        check_judge("Is {question} right?")
    words = {"yes": True, " Yes.": True, "no": False, "yesterday": False, "": False}
    assert {word: is_approved({"text": word}) for word in words} == words


def test_the_same_answer_is_learned_once() -> None:
    novelty = Novelty()
    other = Question("t", [{"role": "user", "content": "Other?"}])
    said = [novelty(each, reply(text)) is None for each, text in
            ((ASKED, "A b"), (ASKED, " a  B\n"), (other, "A b"), (ASKED, "A c"))]  # fmt: skip
    assert said == [True, False, True, True]


def asking(folder: Path, **settings: Any) -> Asking:
    return Asking(folder, "f" * 64, {"train": [ASKED, ASKED]}, 2, {"max_tokens": 3, **settings})


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_made_of_what_passes_and_the_rest_is_told(tmp_path: Path) -> None:
    asked = asking(tmp_path)
    asked.begin()
    write(asked.answers("train"), [reply("4"), reply("5"), reply("4 "), {"error": "too long"}])
    kept = asked.filter([is_whole, is_expected], dedup=True)
    assert kept.rows == {"train": 1}
    assert kept.rejected == {
        "another answer than the row's": 1, "the same as another": 1, "could not be asked": 1
    }  # fmt: skip
    (row,) = map(json.loads, (tmp_path / "train.jsonl").read_text().splitlines())
    assert [each["content"] for each in row["messages"]] == ["What is 2 + 2?", "4"]
    rejected = (tmp_path / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(each)["place"] for each in rejected] == ["t, line 1"] * 3
    assert asked.filter([is_whole], dedup=False).rows == {"train": 3}
    write(asked.answers("train"), [reply("5")] * 4)
    with pytest.raises(TrainingError, match="None of the teacher's 4 answers passed: 4 another"):
        asked.filter([is_expected], dedup=False)


def test_answers_of_another_asking_are_not_taken(tmp_path: Path) -> None:
    asking(tmp_path).begin()
    asking(tmp_path).begin()
    with pytest.raises(TrainingError, match="holds answers of another teacher"):
        asking(tmp_path, temperature=1.0).begin()


@pytest.mark.parametrize("data", ["", '{"text": "4"}\n' * 3, "[]\n" * 4, "{\n" * 4, "{}\n" * 4])
def test_damaged_answers_are_told(tmp_path: Path, data: str) -> None:
    asked = asking(tmp_path)
    asked.begin()
    asked.answers("train").write_text(data)
    with pytest.raises(TrainingError, match="is damaged"):
        asked.filter([], dedup=False)


def test_questions_are_hashed_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, count = Question.as_json, 0

    def counted(self: Question) -> bytes:
        nonlocal count
        count += 1
        return read.fget(self)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(Question, "as_json", property(counted))
    questions = [replace(ASKED, place=f"t, line {number}") for number in range(1, 21)]
    asking = Asking(tmp_path, "teacher", {"train": questions}, 2, {})
    keys = {line.key for line in asking._lines(questions)}
    assert len(keys) == 40
    assert count == 20 + 40  # each in the hash of all, and in each of its lines
