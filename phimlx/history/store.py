"""The history: conversations kept, found again and deleted."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from phimlx.errors import HistoryError, SessionError
from phimlx.folders import data_folder
from phimlx.history.database import (
    forget_deleted,
    is_indexed,
    open_database,
    transaction,
    translate_errors,
)
from phimlx.history.messages import Message, check_messages, text_of
from phimlx.history.records import (
    Entry,
    Head,
    Kept,
    Match,
    Place,
    Summary,
    decode,
    encode,
    writable,
)

NAME = "history.db"
TITLE_LENGTH = 60
EXCERPT = 36  # characters on each side of what was found


class History:
    """Conversations in the database of this user; may be open in several processes, and used by
    several threads.

    Messages are those of `phimlx.history.messages`. Each method raises `HistoryError` where the
    database cannot be used, and where there is no such conversation.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Open the database at `path`, else the one of this user."""
        self.path = path or data_folder() / NAME
        self._database = open_database(self.path)
        self._database.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self._database.create_function("lower_case", 1, str.lower, deterministic=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def create(self, head: Head, title: str | None = None) -> int:
        """Begin a conversation without messages; return its number."""
        with self._writing():
            return self._insert(head, title)

    def append(self, id: int, *messages: Message, stats: Mapping[str, Any] | None = None) -> None:
        """Add messages to a conversation; `stats` are those of the last one."""
        check_messages(messages, system=False)
        with self._writing():
            model = self._row(id)["model"]
            self._insert_messages(id, self._count(id), messages, model, stats)
            self._touch(id)

    def undo(self, id: int) -> str:
        """Take back the last thing the user said and all that came of it; return it."""
        with self._writing():
            self._row(id)
            last = self._one(
                "SELECT position, text FROM messages WHERE conversation = ? AND role = 'user'"
                " ORDER BY position DESC LIMIT 1",
                id,
            )
            if last is None:
                raise HistoryError(f"Nothing was said in conversation {id}.")
            self._cut(id, last["position"])
            self._touch(id)
            return str(last["text"])

    def configure(self, id: int, head: Head) -> None:
        """Change what a conversation is: its model, system prompt, settings and tools."""
        with self._writing():
            self._row(id)
            self._set_head(id, head)

    def rename(self, id: int, title: str | None) -> None:
        """Give a conversation a title, or with None the one that its first message makes."""
        with self._writing():
            self._row(id)
            self._run("UPDATE conversations SET title = ? WHERE id = ?", title, id)

    def put(
        self,
        place: Place | None,
        head: Head,
        messages: Sequence[Message],
        stats: Mapping[str, Any] | None = None,
    ) -> Place:
        """Make a conversation what its writer holds, and write no more than has changed.

        A conversation that another writer has changed since is left to it: a new one begins.

        Args:
            place: where it is kept, from the last call or from `read`; None for a new one.
            messages: all of them, without a system prompt.
            stats: what the last one took.
        """
        check_messages(messages, system=False)
        bodies = [encode(message) for message in messages]
        with self._writing():
            id, same = None if place is None else place.id, 0
            if place is not None:
                row = self._row(place.id)
                for position, stored in enumerate(self._bodies(place.id)):
                    if position == len(bodies) or stored != bodies[position]:
                        break
                    same += 1
                if row["revision"] != place.revision:
                    id = None
            if id is None:
                id = self._insert(head)
                if place is not None:
                    self._copy(place.id, id, same)
            else:
                self._set_head(id, head)
                self._cut(id, same)
            self._insert_messages(id, same, messages[same:], head.model, stats)
            return Place(id, self._touch(id))

    def conversations(self, limit: int | None = None) -> list[Summary]:
        """List conversations that have messages, the one that went on last first."""
        with self._reading():
            rows = self._database.execute(
                f"{_SUMMARIES} WHERE count > 0 ORDER BY updated DESC, id DESC LIMIT ?",
                (-1 if limit is None else limit,),
            )
            return [_summary(row) for row in rows]

    def last(self) -> int:
        """Return the number of the conversation that went on last."""
        found = self.conversations(1)
        if not found:
            raise HistoryError("There is no conversation yet.", hint="Begin one: phimlx chat")
        return found[0].id

    def read(self, id: int) -> Kept:
        """Read a conversation."""
        with self._reading():
            row = self._row(id)
            about = _summary(self._one(f"{_SUMMARIES} WHERE id = ?", id))
            found = self._database.execute(
                "SELECT * FROM messages WHERE conversation = ? ORDER BY position", (id,)
            )
            try:
                head = Head(
                    row["model"],
                    row["adapter"],
                    decode(row["system"]),
                    decode(row["settings"]),
                    decode(row["tools"]),
                )
                entries = [
                    Entry(
                        decode(each["body"]),
                        each["model"],
                        decode(each["stats"]),
                        each["created"],
                    )
                    for each in found
                ]
                check_messages([entry.message for entry in entries], system=False)
            except (ValueError, RecursionError, SessionError) as error:
                raise HistoryError(f"Conversation {id} is damaged: {error}") from None
        return Kept(Place(id, row["revision"]), about, head, entries)

    def search(self, text: str, limit: int = 50) -> list[Match]:
        """Find messages in which every word of `text` occurs, in part too; the latest first."""
        words = text.replace("\0", " ").encode("utf-8", "ignore").decode().split()
        if not words:
            raise HistoryError("What is looked for?", hint="Name a word, or part of one.")
        with self._reading():
            indexed = [word for word in words if len(word) >= 3 and is_indexed(self._database)]
            others = [word for word in words if word not in indexed]
            conditions = ["instr(lower_case(messages.text), ?)"] * len(others)
            given: list[object] = [word.lower() for word in others]
            if indexed:
                quoted = " ".join('"' + word.replace('"', '""') + '"' for word in indexed)
                conditions.append(
                    "messages.id IN (SELECT rowid FROM message_index WHERE message_index MATCH ?)"
                )
                given.append(quoted)
            rows = self._database.execute(
                "SELECT messages.position, messages.role, messages.text, about.*"
                f" FROM messages JOIN ({_SUMMARIES}) AS about ON about.id = conversation"
                f" WHERE {' AND '.join(conditions)}"
                " ORDER BY about.updated DESC, about.id DESC, position LIMIT ?",
                (*given, limit),
            )
            return [
                Match(_summary(row), row["position"], row["role"], _excerpt(row["text"], words[0]))
                for row in rows
            ]

    def delete(self, *ids: int) -> None:
        """Delete conversations for good; all of them are there, or none is deleted."""
        with self._writing():
            for id in ids:
                self._row(id)
                self._cut(id, 0)
                self._run("DELETE FROM conversations WHERE id = ?", id)
        with self._lock, translate_errors(self.path):
            forget_deleted(self._database)

    def delete_all(self) -> int:
        """Delete every conversation for good; return how many there were with messages."""
        with self._writing():
            count = self._one("SELECT count(DISTINCT conversation) FROM messages")[0]
            self._run("DELETE FROM messages")
            self._run("DELETE FROM conversations")
        with self._lock, translate_errors(self.path):
            forget_deleted(self._database)
        return int(count)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, translate_errors(self.path), transaction(self._database):
            yield

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """See one state of the database in the block, whatever others write."""
        with self._lock, translate_errors(self.path), transaction(self._database, "DEFERRED"):
            yield

    def _run(self, statement: str, *values: object) -> sqlite3.Cursor:
        return self._database.execute(statement, values)

    def _one(self, statement: str, *values: object) -> Any:
        return self._run(statement, *values).fetchone()

    def _row(self, id: int) -> Any:
        known = 0 < id <= LARGEST_ID
        row = self._one("SELECT * FROM conversations WHERE id = ?", id) if known else None
        if row is None:
            raise HistoryError(
                f"There is no conversation {id}.", hint="List them: phimlx history list"
            )
        return row

    def _insert(self, head: Head, title: str | None = None) -> int:
        now = time.time()
        values = {**head.columns(), "title": title, "created": now, "updated": now}
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        done = self._run(f"INSERT INTO conversations ({names}) VALUES ({marks})", *values.values())
        assert done.lastrowid is not None
        return done.lastrowid

    def _set_head(self, id: int, head: Head) -> None:
        values = head.columns()
        changes = ", ".join(f"{name} = ?" for name in values)
        self._run(f"UPDATE conversations SET {changes} WHERE id = ?", *values.values(), id)

    def _touch(self, id: int) -> int:
        """Note that messages have changed; return the revision."""
        self._run(
            "UPDATE conversations SET revision = revision + 1, updated = ? WHERE id = ?",
            time.time(),
            id,
        )
        return int(self._row(id)["revision"])

    def _count(self, id: int) -> int:
        return int(self._one("SELECT count(*) FROM messages WHERE conversation = ?", id)[0])

    def _bodies(self, id: int) -> list[str]:
        found = self._run("SELECT body FROM messages WHERE conversation = ? ORDER BY position", id)
        return [row["body"] for row in found]

    def _cut(self, id: int, position: int) -> None:
        self._run("DELETE FROM messages WHERE conversation = ? AND position >= ?", id, position)

    def _copy(self, source: int, target: int, count: int) -> None:
        columns = "position, role, body, text, model, stats, created"
        self._run(
            f"INSERT INTO messages (conversation, {columns})"
            f" SELECT ?, {columns} FROM messages WHERE conversation = ? AND position < ?",
            target,
            source,
            count,
        )

    def _insert_messages(
        self,
        id: int,
        position: int,
        messages: Sequence[Message],
        model: str,
        stats: Mapping[str, Any] | None,
    ) -> None:
        for index, message in enumerate(messages):
            answer = message["role"] == "assistant"
            last = index == len(messages) - 1
            self._run(
                "INSERT INTO messages"
                " (conversation, position, role, body, text, model, stats, created)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                id,
                position + index,
                message["role"],
                encode(message),
                writable(text_of(message["content"])),
                writable(model) if answer else None,
                encode(stats) if last and stats is not None else None,
                time.time(),
            )


LARGEST_ID = 2**63 - 1

_SUMMARIES = """
    SELECT * FROM (
        SELECT id, model, created, updated,
            coalesce(title, (
                SELECT substr(text, 1, 200) FROM messages
                WHERE conversation = conversations.id AND role = 'user' AND text <> ''
                ORDER BY position LIMIT 1
            ), '') AS title,
            (SELECT count(*) FROM messages WHERE conversation = conversations.id) AS count
        FROM conversations
    )
"""


def _summary(row: Any) -> Summary:
    title = " ".join(row["title"].split())
    if len(title) > TITLE_LENGTH:
        title = title[: TITLE_LENGTH - 2].rstrip() + " …"
    return Summary(row["id"], title, row["model"], row["count"], row["created"], row["updated"])


def _excerpt(text: str, word: str) -> str:
    """Return what is around the first place of a word, as one line."""
    found = max(text.lower().find(word.lower()), 0)
    start, end = max(0, found - EXCERPT), found + len(word) + EXCERPT
    middle = " ".join(text[start:end].split())
    return ("… " if start else "") + middle + (" …" if end < len(text) else "")
