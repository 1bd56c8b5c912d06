"""The store of long prompts: what is found again, what never is, what goes, what is but said."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import phimlx
from phimlx.checkpoint import array_file
from phimlx.errors import CacheError, SettingsError
from phimlx.generation import prefix_file, prefix_store
from phimlx.generation.prefix_file import Source
from phimlx.generation.prefix_store import (
    LIMIT,
    MIN_TOKENS,
    PrefixStore,
    list_entries,
    prefixes_limit,
    remove_unfinished,
)
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.reply import Reply
from phimlx.models.base import CausalLM
from phimlx.models.phi4mm.model import Phi4MMForCausalLM
from tests.generation.small import STEP, make_model, words
from tests.generation.test_engine_media import (
    folder,
    greedy,
    model,
    picture,
    plain,
)
from tests.generation.test_prefix_file import changed_adapter

__all__ = ["folder", "model"]  # fixtures

OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("small") / "model")


class Process:
    """What one process does: a model that is loaded anew, and the store in a folder."""

    def __init__(self, model: Path, folder: Path, **settings: Any) -> None:
        load = {"dtype": "float32", **settings.pop("load", {})}
        self.phi = phimlx.load(model, **load)
        self.notes: list[str] = []
        self.folder = folder
        store = self.phi.prefix_store(
            self.notes.append, folder=folder, **{"min_tokens": 1, **settings}
        )
        assert store is not None
        self.store = store

    def ask(self, prompt: list[int], bits: int | None = None) -> Reply:
        """Ask as `phimlx generate` does; the reply is that without the store."""
        cache = self.phi.new_cache(bits, self.store)
        reply = self.phi.generate(prompt, cache=cache, **OPTIONS)
        self.store.save(cache)
        assert reply.tokens == self.phi.generate(prompt, kv_bits=bits, **OPTIONS).tokens
        return reply

    def cached(self, prompt: list[int], bits: int | None = None) -> int:
        return self.ask(prompt, bits).stats.cached_tokens


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


TEXT = words(300)
SECOND = [*TEXT, *words(6, 5)]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_second_question_computes_only_its_own_tokens(
    small: Path, tmp_path: Path, bits: int | None
) -> None:
    store = tmp_path / "prefixes"
    assert Process(small, store).cached([*TEXT, 7], bits) == 0
    assert Process(small, store).cached(SECOND, bits) == len(TEXT)
    assert len(names(store)) == 1
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    assert stat.S_IMODE((store / names(store)[0]).stat().st_mode) == 0o600


def test_prompts_up_to_1024_tokens_are_not_kept_unasked(small: Path, tmp_path: Path) -> None:
    process = Process(small, tmp_path, min_tokens=MIN_TOKENS + 1)
    process.ask(words(MIN_TOKENS - 20))
    assert names(tmp_path) == []
    process.ask(words(MIN_TOKENS + 1))
    assert len(names(tmp_path)) == 1
    assert process.cached([*words(MIN_TOKENS + 1), 5]) == MIN_TOKENS + 1


@pytest.mark.parametrize(
    ("held", "asked", "cached"),
    [
        (300, 350, 300),
        (STEP - 30, STEP, STEP - 30),
        (STEP - 30, STEP + 1, 0),
        (STEP + 50, STEP - 30, 0),
        (STEP + 50, STEP + 90, STEP + 50),
        (STEP - 4, STEP - 3, 0),  # whose reply went over the step
        (STEP - 4, STEP + 40, STEP - 4),
    ],
)
def test_both_sides_of_the_step(
    small: Path, tmp_path: Path, held: int, asked: int, cached: int
) -> None:
    Process(small, tmp_path).ask(words(held))
    assert Process(small, tmp_path).cached(words(asked)) == cached


def test_both_sides_are_kept_side_by_side(small: Path, tmp_path: Path) -> None:
    process = Process(small, tmp_path)
    for length in (300, STEP + 50, 310, STEP + 60):
        process.ask(words(length))
    assert len(names(tmp_path)) == 2
    assert [process.cached(words(n)) for n in (312, STEP + 62)] == [300, STEP + 50]


def another_model(small: Path, tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"model": make_model(tmp / "m", seed=1)}


def another_config(small: Path, tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"model": make_model(tmp / "m", rms_norm_eps=1e-6)}


def another_adapter(small: Path, tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    changed_adapter(small, tmp, patch)
    return {"load": {"adapter": tmp / "adapter"}}


def another_dtype(small: Path, tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"load": {"dtype": "bfloat16"}}


def another_version(small: Path, tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(phimlx, "__version__", "9.0")
    return {}


def another_backend(small: Path, tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(prefix_file, "backend", lambda: "metal")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        another_model,
        another_config,
        another_adapter,
        another_dtype,
        another_version,
        another_backend,
    ],
)
def test_each_part_of_the_key(
    change: Callable[..., dict[str, Any]],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tmp_path / "prefixes"
    Process(small, store).ask(TEXT)
    other: dict[str, Any] = {"model": small, **change(small, tmp_path, monkeypatch)}
    process = Process(folder=store, **other)
    cache = process.phi.new_cache(None, process.store)
    assert process.phi.generate(SECOND, cache=cache, **OPTIONS).stats.cached_tokens == 0
    assert process.notes == []
    process.store.save(cache)
    assert len(names(store)) == 2


def test_other_bits_and_other_tokens(small: Path, tmp_path: Path) -> None:
    process = Process(small, tmp_path)
    process.ask(TEXT)
    assert process.cached(SECOND, 8) == 0
    assert process.cached([9, *TEXT[1:]]) == 0
    assert process.cached([*TEXT[:200], 9, *TEXT[201:]]) == 0
    assert process.cached([*TEXT[:280], 9, *TEXT[281:]]) == 280


def test_rope_scaling_is_part_of_the_key(tmp_path: Path) -> None:
    usual = {"rope_scaling": None, "original_max_position_embeddings": None}
    folder = make_model(tmp_path / "plain", **usual)
    Process(folder, tmp_path / "prefixes").ask(TEXT)
    for kind in ("linear", "yarn"):
        scaling = {"rope_scaling": {"rope_type": kind, "factor": 2.0}}
        assert Process(folder, tmp_path / "prefixes", load=scaling).cached(SECOND) == 0


def tiny_store(model: CausalLM, folder: Path, notes: list[str]) -> PrefixStore:
    source = Source("digest", None, "tiny", "folder")
    return PrefixStore(model, lambda loaded: source, notes.append, folder, min_tokens=1)


def test_media_count_by_their_contents(model: Phi4MMForCausalLM, tmp_path: Path) -> None:
    notes: list[str] = []
    (pixels, one), (_, other) = picture("a"), picture("c")
    for start in (3, 270):  # within the first tokens, and behind them
        prompt = [*words(start), *pixels, *words(4)]
        cache = PromptCache(model, None, tiny_store(model, tmp_path, notes))
        greedy(model, prompt, one, 2, cache)
        tiny_store(model, tmp_path, notes).save(cache)
        again = PromptCache(model, None, tiny_store(model, tmp_path, notes))
        follow = [*prompt, *words(4, 9)]
        assert greedy(model, follow, one, 3, again) == plain(model, follow, one, 3)
        assert again.items == cache.items
        read = tiny_store(model, tmp_path, notes).find(follow, again.items, "vision", None, None, 0)
        assert read is not None
        assert read.kv.length == len(prompt) + 1
        mixed = PromptCache(model, None, tiny_store(model, tmp_path, notes))
        assert greedy(model, follow, other, 3, mixed) == plain(model, follow, other, 3)
    assert notes == []


def test_the_longest_beginning_is_read(small: Path, tmp_path: Path) -> None:
    prompts = [[*TEXT[:260], *words(count, count)] for count in (300, 700, 310)]
    process = Process(small, tmp_path)
    for prompt in prompts:
        process.ask(prompt)
    assert len(names(tmp_path)) == 3
    for prompt in prompts:
        assert Process(small, tmp_path).cached([*prompt[:500], 9]) == 500


def test_a_chat_that_grows_is_one_file(small: Path, tmp_path: Path) -> None:
    process = Process(small, tmp_path)
    cache = process.phi.new_cache(None, process.store)
    prompt = words(600)
    for turn in range(3):
        reply = process.phi.generate(prompt, cache=cache, **OPTIONS)
        process.store.save(cache)
        assert len(names(tmp_path)) == 1
        prompt = [*prompt, *reply.tokens, *words(1100 if turn else 20, turn)]
    assert list_entries(tmp_path)[0].tokens > 1600
    assert Process(small, tmp_path).cached(prompt) > 1600


def test_what_was_used_longest_ago_goes(small: Path, tmp_path: Path) -> None:
    process = Process(small, tmp_path)
    prompts = [words(300, start) for start in (3, 4, 5)]
    for place, prompt in enumerate(prompts):
        process.ask(prompt)
        os.utime(list_entries(tmp_path)[0].path, (1000 + place,) * 2)
    assert process.cached([*prompts[0], 7]) == 300  # used now
    size = max(entry.nbytes for entry in list_entries(tmp_path))
    process.store.limit = 3 * size + size // 2
    process.ask(words(300, 6))
    assert sum(entry.nbytes for entry in list_entries(tmp_path)) <= process.store.limit
    kept = [Process(small, tmp_path).cached([*prompt, 7]) for prompt in prompts]
    assert kept == [300, 0, 300]


def test_a_prompt_beyond_the_limit(small: Path, tmp_path: Path) -> None:
    process = Process(small, tmp_path, limit=50_000)
    for _ in range(2):
        process.ask(TEXT)
    assert process.notes == [
        "This prompt is not kept: it takes 158 kB, and all may take 50.0 kB (PHIMLX_CACHE_LIMIT)."
    ]
    assert names(tmp_path) == []


def test_the_limit_is_a_setting(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    assert prefixes_limit() == LIMIT == 10**10
    for given, expected in (("2.5", 2_500_000_000), ("0", 0), ("-1", 0)):
        monkeypatch.setenv("PHIMLX_CACHE_LIMIT", given)
        assert prefixes_limit() == expected
    assert phimlx.load(small).prefix_store() is None
    for given in ("much", "", "nan", "inf"):
        monkeypatch.setenv("PHIMLX_CACHE_LIMIT", given)
        with pytest.raises(SettingsError, match="it must be a number of GB, or 0 for no cache"):
            prefixes_limit()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no file"),
    "bit": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"X" * 9),
    "other key": lambda path: path.write_bytes(path.read_bytes().replace(b"float32", b"float16")),
    "weights": lambda path: mx.save_safetensors(str(path), {"a": mx.zeros(3)}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_ignored_with_a_note(small: Path, tmp_path: Path, name: str) -> None:
    Process(small, tmp_path).ask(TEXT)
    path = list_entries(tmp_path)[0].path
    DAMAGE[name](path)
    process = Process(small, tmp_path)
    assert process.cached(SECOND) == 0
    assert len(process.notes) == 1
    assert process.notes[0].startswith(f"A kept prompt is ignored, and deleted: {path} ")
    assert process.cached(SECOND) == len(SECOND) - 1


def test_files_that_are_not_ours_stay(small: Path, tmp_path: Path) -> None:
    others = {"notes.txt", "a-b-1-c.safetensors", ".hidden"}
    for name in others:
        (tmp_path / name).write_text("x")
    (tmp_path / "0-folder.safetensors").mkdir()
    process = Process(small, tmp_path, limit=200_000)
    process.ask(TEXT)
    process.ask(words(300, 9))
    assert process.cached(SECOND[:10]) == 0
    assert set(names(tmp_path)) > others
    assert len(list_entries(tmp_path)) == 1
    assert process.notes == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_a_note(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(file: Any, data: memoryview) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(array_file, "_write_all", fail)
    process = Process(small, tmp_path)
    process.ask(TEXT)
    assert len(process.notes) == 1
    assert process.notes[0].startswith("This prompt is not kept: ")
    assert names(tmp_path) == []


def test_a_folder_that_is_none_is_a_note(small: Path, tmp_path: Path) -> None:
    (tmp_path / "prefixes").write_text("a file")
    process = Process(small, tmp_path / "prefixes")
    assert process.cached(TEXT) == 0
    assert process.notes == ["This prompt is not kept: file exists."]


def test_a_model_that_has_changed_is_a_note(tmp_path: Path) -> None:
    store = tmp_path / "prefixes"
    model = make_model(tmp_path / "m")
    process = Process(model, store)
    Process(model, store).ask(TEXT)
    make_model(tmp_path / "m", seed=2)
    cache = process.phi.new_cache(None, process.store)
    assert process.phi.generate(SECOND, cache=cache, **OPTIONS).stats.cached_tokens == 0
    process.store.save(cache)
    why = "The model's files have changed since it was loaded."
    assert process.notes == [
        f"Kept prompts are not looked at: {why}",
        f"This prompt is not kept: {why}",
    ]
    assert len(names(store)) == 1


def test_files_that_another_process_removes(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking and opening, and between opening and reading."""
    process = Process(small, tmp_path)
    process.ask(TEXT)
    stale = list_entries(tmp_path)
    data = stale[0].path.read_bytes()
    stale[0].remove()
    with monkeypatch.context() as patch:
        patch.setattr(prefix_store, "list_entries", lambda folder: stale)
        assert process.cached(SECOND) == 0
    assert process.notes == []
    for path in tmp_path.iterdir():
        path.unlink()
    stale[0].path.write_bytes(data)
    load = prefix_file.PrefixFile.load

    def removed(self: prefix_file.PrefixFile, *given: Any) -> PromptCache:
        stale[0].remove()
        return load(self, *given)

    monkeypatch.setattr(prefix_file.PrefixFile, "load", removed)
    assert process.cached(SECOND) == len(TEXT)
    assert process.notes == []


def test_a_memory_that_has_as_much_is_used(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(small, tmp_path)
    cache = process.phi.new_cache(None, process.store)
    process.phi.generate(TEXT, cache=cache, **OPTIONS)
    process.store.save(cache)
    monkeypatch.setattr(
        prefix_file.PrefixFile, "load", lambda *given: pytest.fail("a file was read")
    )
    reply = process.phi.generate(SECOND, cache=cache, **OPTIONS)
    assert reply.stats.cached_tokens == len(TEXT)


def test_a_file_that_cannot_be_deleted_is_no_error(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(small, tmp_path)
    process.ask(TEXT)

    def fail(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(Path, "unlink", fail)
    monkeypatch.setattr(
        prefix_file.PrefixFile, "check", lambda *given: (_ for _ in ()).throw(CacheError("Odd."))
    )
    assert process.phi.generate(
        SECOND, cache=process.phi.new_cache(None, process.store), **OPTIONS
    ).tokens
    assert process.notes == ["A kept prompt is ignored, and deleted: Odd."]


CHILD = """
import os, signal, sys
from pathlib import Path
import phimlx
from phimlx.checkpoint import array_file
from tests.generation.small import words

model, folder, starts, dies = sys.argv[1:]
phi = phimlx.load(model, dtype="float32")
store = phi.prefix_store(print, folder=Path(folder), min_tokens=1, limit=700_000)
write, calls = array_file._write_all, iter(range(10**6))
def dying(file, data):
    if dies == "dies" and next(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, data)
array_file._write_all = dying
for start in map(int, starts.split(",")):
    cache = phi.new_cache(None, store)
    reply = phi.generate(words(300, start), cache=cache, temperature=0, max_tokens=2)
    assert reply.tokens == phi.generate(words(300, start), temperature=0, max_tokens=2).tokens
    store.save(cache)
"""


def child(model: Path, folder: Path, starts: str, dies: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(model), str(folder), starts, dies]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def test_a_kill_during_a_write_leaves_no_half_file(small: Path, tmp_path: Path) -> None:
    process = child(small, tmp_path, "3", "dies")
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert list_entries(tmp_path) == []
    assert len(names(tmp_path)) == 1
    (left,) = tmp_path.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    remove_unfinished(tmp_path, 3600)
    assert left.exists()
    os.utime(left, (1, 1))
    assert Process(small, tmp_path).cached(TEXT) == 0
    assert not left.exists()
    assert len(names(tmp_path)) == 1


@pytest.mark.slow
def test_two_processes_at_once(small: Path, tmp_path: Path) -> None:
    """They keep, read and make room among the same files, of which four fit."""
    starts = ",".join(str(3 + each % 6) for each in range(30))
    both = [child(small, tmp_path, starts), child(small, tmp_path, starts[6:] + ",3")]
    for process in both:
        said, _ = process.communicate(timeout=120)
        assert (process.returncode, said) == (0, "")
    entries = list_entries(tmp_path)
    assert 1 <= len(entries) <= 4
    assert len(names(tmp_path)) == len(entries)
    source = phimlx.load(small, dtype="float32")
    for entry in entries:
        assert len(source.load_cache(entry.path).tokens) == entry.tokens
