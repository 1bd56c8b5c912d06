"""The database's file: opened for its owner alone, brought up to date, searched through an index.

SQLite with a write-ahead log: a process that dies at any moment leaves what was committed, whole,
and others read while one writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from phimlx.errors import HistoryError
from phimlx.files import translate_write_errors

APPLICATION_ID = 0x7068_696D  # "phim", in the file's header
BUSY_SECONDS = 10.0  # that another process may take to write

MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,  -- a number is never given twice
        revision INTEGER NOT NULL DEFAULT 0,   -- counts changes of the messages
        title TEXT,                            -- where a person gave one
        model TEXT NOT NULL,
        adapter TEXT,
        system TEXT,
        settings TEXT NOT NULL,                -- JSON
        tools TEXT,                            -- JSON
        created REAL NOT NULL,
        updated REAL NOT NULL
    );
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY,
        conversation INTEGER NOT NULL REFERENCES conversations ON DELETE CASCADE,
        position INTEGER NOT NULL,
        role TEXT NOT NULL,
        body TEXT NOT NULL,                    -- the message as JSON
        text TEXT NOT NULL,                    -- what is searched
        model TEXT,                            -- that said it
        stats TEXT,                            -- JSON: what saying it took
        created REAL NOT NULL,
        UNIQUE (conversation, position)
    );
    CREATE INDEX conversations_by_update ON conversations (updated);
    """,
)
"""Scripts that each bring the tables from one version to the next; a released one stays as it is.

The number of those that have run is the file's `user_version`.
"""

# The index of texts by what three characters follow each other: it finds parts of words, in
# languages without blanks too. Its triggers are there where it is up to date.
_INDEX = """
    CREATE VIRTUAL TABLE IF NOT EXISTS message_index
        USING fts5(text, content='messages', content_rowid='id', tokenize='trigram');
    CREATE TRIGGER message_added AFTER INSERT ON messages BEGIN
        INSERT INTO message_index (rowid, text) VALUES (new.id, new.text);
    END;
    CREATE TRIGGER message_removed AFTER DELETE ON messages BEGIN
        INSERT INTO message_index (message_index, rowid, text)
            VALUES ('delete', old.id, old.text);
    END;
    INSERT INTO message_index (message_index) VALUES ('rebuild');
"""
_NO_INDEX = "DROP TRIGGER message_added;\nDROP TRIGGER message_removed;"

WRITABLE = "Make the folder and its files writable."


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database, made where it is not there, its tables of this version.

    Statements are committed one by one, apart from those within `transaction`.

    Raises:
        HistoryError: where it cannot be opened or written, is damaged, another program's, or of a
            later version.
    """
    with translate_write_errors(path, HistoryError, WRITABLE):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Its log and the log's index get the same mode from SQLite. A file that is there is not
        # opened here: closing it would end the locks that other connections of this process hold.
        path.touch(0o600)
        path.chmod(0o600)
    with translate_errors(path):
        database = sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            _prepare(database, path)
        except BaseException:
            database.close()
            raise
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    found = _number(database, "user_version")
    if _number(database, "application_id") != APPLICATION_ID and (found or _count_tables(database)):
        raise HistoryError(
            f"{path} is the database of another program.",
            hint="Move it elsewhere; the next chat begins a new one.",
        )
    if found > len(MIGRATIONS):
        raise HistoryError(
            f"{path} is of version {found}; this phimlx knows those up to {len(MIGRATIONS)}.",
            hint="Update phimlx.",
        )
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, too
    if found < len(MIGRATIONS):
        with transaction(database):
            # Another process may have done it meanwhile.
            for version in range(_number(database, "user_version"), len(MIGRATIONS)):
                _run(database, MIGRATIONS[version])
                database.execute(f"PRAGMA user_version = {version + 1}")
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    if is_indexed(database) != has_fts5(database):
        with transaction(database):
            if is_indexed(database) != has_fts5(database):
                _run(database, _NO_INDEX if is_indexed(database) else _INDEX)


def _run(database: sqlite3.Connection, script: str) -> None:
    """Run statements within the transaction that is open, which `executescript` would commit."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            database.execute(statement)
            statement = ""


def _number(database: sqlite3.Connection, pragma: str) -> int:
    return int(database.execute(f"PRAGMA {pragma}").fetchone()[0])


def _count_tables(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def has_fts5(database: sqlite3.Connection) -> bool:
    """Whether this SQLite can index texts: it may be built without, or older than 3.34."""
    if sqlite3.sqlite_version_info < (3, 34):
        return False
    modules = database.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'")
    return modules.fetchone() is not None


def is_indexed(database: sqlite3.Connection) -> bool:
    """Whether the index of texts is there and up to date."""
    found = database.execute("SELECT 1 FROM sqlite_master WHERE name = 'message_added'")
    return found.fetchone() is not None


def forget_deleted(database: sqlite3.Connection) -> None:
    """Leave nothing on the disk of what was deleted: neither in the index nor in the log.

    What another process still reads stays in the log until the last one closes the database.
    """
    if is_indexed(database):
        database.execute("INSERT INTO message_index (message_index) VALUES ('rebuild')")
    with closing(database.execute("PRAGMA wal_checkpoint(TRUNCATE)")) as done:
        done.fetchall()


@contextmanager
def transaction(database: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """Do all of the block or nothing of it; others wait to write, unless it is "DEFERRED"."""
    database.execute(f"BEGIN {kind}")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


@contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Turn what SQLite raises in the block into `HistoryError`: one sentence and the next step."""
    try:
        yield
    except sqlite3.Error as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        why, hint = _REASONS.get(code, (f"cannot be used: {error}", None))
        raise HistoryError(f"The history in {path} {why}.", hint) from error


_ASIDE = "Move it elsewhere; the next chat begins a new one."
_REASONS = {
    sqlite3.SQLITE_BUSY: ("is being written by another process", "Try again in a moment."),
    sqlite3.SQLITE_READONLY: ("cannot be written", WRITABLE),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", WRITABLE),
    sqlite3.SQLITE_FULL: ("could not be written: the disk is full", "Free some space."),
    sqlite3.SQLITE_IOERR: ("cannot be read or written", "Check the disk."),
    sqlite3.SQLITE_CORRUPT: ("is damaged", _ASIDE),
    sqlite3.SQLITE_NOTADB: ("is damaged", _ASIDE),
}
"""How a sentence goes on, and the hint, by SQLite's primary result code."""
