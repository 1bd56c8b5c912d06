"""What the history keeps, finds, gives back and forgets."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.errors import HistoryError, SessionError
from phimlx.history import database
from phimlx.history.export import markdown, session_object
from phimlx.history.records import Head
from phimlx.history.store import History
from tests.terminal.test_conversation import messages

HEAD = Head("nano")
USER = {"role": "user", "content": "What is MLX?"}
ANSWER = {"role": "assistant", "content": "An array framework.", "reasoning": "Hm."}
MORE = {"role": "user", "content": "And Phi?"}


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "kept" / "history.db")


def test_a_conversation_is_created_appended_to_and_read(history: History) -> None:
    head = Head("nano", "folder", "Be brief.", {"stop": ["a"], "seed": 1}, [{"name": "search"}])
    id = history.create(head)
    assert history.conversations() == []  # nothing has been said
    history.append(id, USER)
    history.append(id, ANSWER, stats={"generated_tokens": 4})
    kept = history.read(id)
    assert kept.head == head
    assert kept.messages == [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    assert [(entry.model, entry.stats) for entry in kept.entries] == [
        (None, None),
        ("nano", {"generated_tokens": 4}),
    ]
    assert kept.about.created <= kept.entries[0].created <= kept.about.updated
    assert history.last() == id


def test_titles(history: History) -> None:
    id = history.create(HEAD)
    history.append(id, {"role": "user", "content": "What\n is  " + "so " * 40})
    title = history.read(id).about.title
    assert title == "What is so so so so so so so so so so so so so so so so so …"
    history.rename(id, "Mine")
    assert history.read(id).about.title == "Mine"
    history.rename(id, None)
    assert history.read(id).about.title == title


def test_undo_takes_back_the_last_question_and_its_answer(history: History) -> None:
    id = history.create(HEAD)
    history.append(id, USER, ANSWER, MORE, ANSWER)
    assert history.undo(id) == "And Phi?"
    assert history.read(id).messages == [USER, ANSWER]
    assert history.undo(id) == "What is MLX?"
    with pytest.raises(HistoryError, match=f"^Nothing was said in conversation {id}\\.$"):
        history.undo(id)


def test_put_writes_what_has_changed(history: History) -> None:
    place = history.put(None, HEAD, [USER])
    place = history.put(place, HEAD, [USER, ANSWER], {"seed": 3})
    before = history.read(place.id).entries
    place = history.put(place, Head("other", system="Hi."), [USER, ANSWER, MORE])
    kept = history.read(place.id)
    assert kept.entries[:2] == before
    assert (kept.head.model, kept.messages[1:]) == ("other", [USER, ANSWER, MORE])
    place = history.put(place, HEAD, [USER])
    assert history.read(place.id).messages == [USER]
    assert len(history.conversations()) == 1


def test_two_writers_of_one_conversation_both_keep_theirs(history: History) -> None:
    place = history.put(None, HEAD, [USER, ANSWER], {"seed": 3})
    with History(history.path) as other:
        first = history.put(place, HEAD, [USER, ANSWER, MORE])
        second = other.put(place, HEAD, [USER, {**ANSWER, "content": "Else."}])
        assert (first.id, second.id != place.id) == (place.id, True)
        assert other.read(second.id).messages == [USER, {**ANSWER, "content": "Else."}]
        assert other.put(second, HEAD, [USER]).id == second.id
    assert history.read(place.id).messages == [USER, ANSWER, MORE]
    assert history.read(place.id).entries[1].stats == {"seed": 3}


def test_what_is_deleted_is_not_brought_back_by_a_chat_that_is_open(history: History) -> None:
    place = history.put(None, HEAD, [USER, ANSWER])
    history.delete(place.id)
    with pytest.raises(HistoryError, match=f"^There is no conversation {place.id}\\.$"):
        history.put(place, HEAD, [USER, ANSWER, MORE])
    assert history.conversations() == []
    assert history.put(None, HEAD, [USER]).id > place.id  # its number is not given again


def test_nothing_of_what_is_deleted_is_left_on_the_disk(history: History) -> None:
    secret = "Xylophonquark"
    id = history.put(None, HEAD, [{"role": "user", "content": secret}, ANSWER]).id
    kept = history.put(None, HEAD, [USER]).id
    files = sorted(history.path.parent.iterdir())
    assert any(secret.encode() in file.read_bytes() for file in files)
    history.delete(id)
    history.close()
    for file in history.path.parent.iterdir():
        data = file.read_bytes().lower()
        assert b"xylo" not in data
        assert b"ophonquark" not in data
    with History(history.path) as again:
        assert [each.id for each in again.conversations()] == [kept]
        assert again.delete_all() == 1


def test_deleting_one_that_is_not_there_deletes_none(history: History) -> None:
    id = history.put(None, HEAD, [USER]).id
    with pytest.raises(HistoryError, match=r"^There is no conversation 99\.$"):
        history.delete(id, 99)
    assert history.last() == id


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("framework", ["An array framework."]),
        ("FRAME array", ["An array framework."]),
        ("wörl", ["Hello WÖRLD 你好世界"]),
        ("好", ["Hello WÖRLD 你好世界"]),
        ("你好世界", ["Hello WÖRLD 你好世界"]),
        ("a", ["What is MLX?", "An array framework."]),
        ('"array" OR', []),
        ("framework*", []),
        ("nowhere", []),
        ("\0frame\udcff", ["An array framework."]),
    ],
)
def test_search_finds_parts_of_words_with_and_without_an_index(
    words: str, found: list[str], indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "has_fts5", lambda database: indexed)
    history = History(tmp_path / "history.db")
    history.put(None, HEAD, [{"role": "user", "content": "Hello WÖRLD 你好世界"}])
    history.put(None, HEAD, [USER, ANSWER])
    assert [match.excerpt for match in history.search(words)] == found


def test_an_index_is_made_again_where_another_python_wrote_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.db"
    with History(path) as history:
        gone = history.put(None, HEAD, [{"role": "user", "content": "first words"}]).id
    with monkeypatch.context() as patch:
        patch.setattr(database, "has_fts5", lambda database: False)
        with History(path) as history:
            history.put(None, HEAD, [{"role": "user", "content": "second words"}])
            history.delete(gone)
            assert [match.excerpt for match in history.search("words")] == ["second words"]
    with History(path) as history:
        assert [match.excerpt for match in history.search("words")] == ["second words"]
        assert history.search("first") == []
    assert b"first" not in path.read_bytes()


def test_an_excerpt_shows_what_is_around(history: History) -> None:
    history.put(None, HEAD, [{"role": "user", "content": "x " * 100 + "needle\n" + "y " * 100}])
    assert history.search("needle")[0].excerpt == f"… {'x ' * 18}needle {'y ' * 17}y …"


def test_nothing_to_look_for(history: History) -> None:
    with pytest.raises(HistoryError, match=r"^What is looked for\?$"):
        history.search(" \0 ")


def test_its_owner_alone_may_read_it(history: History) -> None:
    history.put(None, HEAD, [USER])
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in history.path.parent.iterdir()}
    assert modes == dict.fromkeys(("history.db", "history.db-wal", "history.db-shm"), 0o600)
    assert stat.S_IMODE(history.path.parent.stat().st_mode) == 0o700
    history.close()
    history.path.chmod(0o644)
    History(history.path).close()
    assert stat.S_IMODE(history.path.stat().st_mode) == 0o600


@given(messages, st.text(st.characters()))
def test_messages_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, Any]], text: str
) -> None:
    with History(tmp_path_factory.mktemp("history") / "history.db") as history:
        head = Head("nano", system=text, settings={"stop": [text]})
        kept = history.read(history.put(None, head, messages).id)
    assert kept.messages == [{"role": "system", "content": text}, *messages]
    assert kept.head == head


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "system", "content": ""}, "is a system prompt that does not come first"),
        ({"role": "user"}, "has no text as its content"),
        (3, "is not an object"),
    ],
)
def test_what_is_no_message_is_not_kept(message: Any, reason: str, history: History) -> None:
    with pytest.raises(SessionError, match=f"^message 1 {reason}"):
        history.put(None, HEAD, [message])
    id = history.create(HEAD)
    with pytest.raises(SessionError, match=f"^message 1 {reason}"):
        history.append(id, message)
    assert history.conversations() == []


def test_threads_share_one_history(history: History) -> None:
    ids = [history.create(HEAD) for _ in range(4)]

    def talk(id: int) -> None:
        for _ in range(10):
            history.append(id, USER)

    with ThreadPoolExecutor() as pool:
        list(pool.map(talk, ids))
    assert [len(history.read(id).messages) for id in ids] == [10] * 4


@pytest.mark.parametrize("id", [0, -1, 7, 2**63 - 1, 2**63, 10**30])
def test_there_is_no_such_conversation(id: int, history: History) -> None:
    for act in (history.read, history.undo, history.delete):
        with pytest.raises(HistoryError) as caught:
            act(id)
        assert str(caught.value) == f"There is no conversation {id}."
        assert caught.value.hint == "List them: phimlx history list"


def test_no_conversation_is_the_last(history: History) -> None:
    with pytest.raises(HistoryError, match=r"^There is no conversation yet\.$"):
        history.last()


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE things (id)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(HistoryError) as caught:
        History(path)
    assert str(caught.value) == f"{path} is the database of another program."
    assert caught.value.hint == "Move it elsewhere; the next chat begins a new one."
    assert path.read_bytes() == before


def test_a_later_version_is_left_alone(history: History) -> None:
    history.close()
    with sqlite3.connect(history.path) as later:
        later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(HistoryError) as caught:
        History(history.path)
    known = len(database.MIGRATIONS)
    assert str(caught.value) == (
        f"{history.path} is of version 99; this phimlx knows those up to {known}."
    )
    assert caught.value.hint == "Update phimlx."


def test_migrations_run_once_each_and_keep_what_is_there(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = history.put(None, HEAD, [USER]).id
    history.close()
    later = (*database.MIGRATIONS, "ALTER TABLE conversations ADD COLUMN pinned INTEGER;")
    monkeypatch.setattr(database, "MIGRATIONS", later)
    for _ in range(2):
        with History(history.path) as newer:
            assert newer.read(id).messages == [USER]


@pytest.mark.parametrize("damage", [b"", b"SQLite format 3\0" + b"\xff" * 4000, b"words " * 900])
def test_a_damaged_file_is_told(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "history.db"
    path.write_bytes(damage)
    if not damage:  # as a process leaves it that was killed at once
        with History(path) as history:
            assert history.put(None, HEAD, [USER]).id == 1
        return
    with pytest.raises(HistoryError) as caught:
        History(path)
    assert str(caught.value) == f"The history in {path} is damaged."
    assert caught.value.hint == "Move it elsewhere; the next chat begins a new one."


@pytest.mark.parametrize("body", ["{", '{"role": "robot"}', "[" * 100_000])
def test_a_damaged_message_is_told(body: str, history: History) -> None:
    id = history.put(None, HEAD, [USER]).id
    with sqlite3.connect(history.path) as raw:
        raw.execute("UPDATE messages SET body = ?", (body,))
    raw.close()
    with pytest.raises(HistoryError, match=f"^Conversation {id} is damaged: "):
        history.read(id)


def test_a_folder_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "history.db"
    with pytest.raises(HistoryError) as caught:
        History(path)
    assert str(caught.value) == f"{path} cannot be written: {tmp_path / 'file'} is not a folder."


def test_a_process_that_comes_and_goes_ends_no_lock_of_this_one(history: History) -> None:
    read = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM messages')"
    history.append(history.create(HEAD), USER)
    with History(history.path) as second:  # as a chat page has one for each request
        subprocess.run([sys.executable, "-c", read, str(history.path)], check=True)
        second.append(second.create(HEAD), USER)
    with History(history.path) as third:
        assert len(third.conversations()) == 2


def test_another_process_that_writes_too_long_is_told(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.0)
    with History(history.path) as other:
        with database.transaction(history._database), pytest.raises(HistoryError) as caught:
            other.create(HEAD)
        assert str(caught.value) == (
            f"The history in {history.path} is being written by another process."
        )
        other.create(HEAD)


def test_export(history: History) -> None:
    call = {"name": "search", "arguments": {"q": "MLX"}}
    said = [USER, {**ANSWER, "tool_calls": [call]}, {"role": "tool", "content": "found"}]
    place = history.put(None, Head("nano", system="Be brief."), said, {"seed": 1})
    kept = history.read(place.id)
    made = json.loads(json.dumps(session_object(kept)))
    assert made["messages"] == kept.messages
    assert made["history"]["title"] == "What is MLX?"
    lines = markdown(kept).splitlines()
    assert lines[0] == "# What is MLX?"
    assert lines[4:] == [
        *("## System prompt", "", "Be brief.", "", "## You", "", "What is MLX?", ""),
        *("## nano", "", "> Hm.", "", "An array framework.", ""),
        *('`search {"q": "MLX"}`', "", "## Result", "", "found"),
    ]
