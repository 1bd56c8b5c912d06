"""Caches in files: the same replies, and what is read from no file that is not the model's own."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import phimlx
from phimlx.checkpoint import array_file
from phimlx.checkpoint.array_file import open_array_file, write_array_file
from phimlx.errors import CacheError, GenerationError
from phimlx.generation import prefix_file
from phimlx.generation.prefix_file import Source, read_prefix, write_prefix
from phimlx.generation.prompt_cache import PromptCache
from phimlx.models.phi4mm.model import Phi4MMForCausalLM
from tests.generation.small import STEP, make_model, words
from tests.generation.test_engine_media import (
    folder,
    greedy,
    model,
    picture,
    plain,
    sound,
    together,
)

__all__ = ["folder", "model"]  # fixtures

OPTIONS: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module")
def phi(small: Path) -> phimlx.Phi:
    return phimlx.load(small, dtype="float32")


@pytest.fixture
def saved(phi: phimlx.Phi, tmp_path: Path) -> Path:
    cache = phi.new_cache()
    phi.generate(words(40), cache=cache, **OPTIONS)
    phi.save_cache(cache, tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_was_held(
    small: Path, tmp_path: Path, bits: int | None, dtype: str
) -> None:
    first, second = (phimlx.load(small, dtype=dtype) for _ in range(2))
    cache = first.new_cache(bits)
    reply = first.generate(words(60), cache=cache, **OPTIONS)
    first.save_cache(cache, tmp_path / "cache.safetensors")
    read = second.load_cache(tmp_path / "cache.safetensors")
    assert (read.tokens, read.kv_bits) == (cache.tokens, bits)
    for ours, theirs in zip(read.kv.state, cache.kv.state, strict=True):
        columns = cache.kv.length
        assert ours.dtype == theirs.dtype
        assert mx.array_equal(ours[:, :, :columns], theirs[:, :, :columns])
    follow = [*words(60), *reply.tokens, *words(5, 9)]
    held, again = (
        which.generate(follow, cache=kept, **OPTIONS)
        for which, kept in ((first, cache), (second, read))
    )
    assert again.tokens == held.tokens
    assert again.stats.cached_tokens == held.stats.cached_tokens >= 70
    if dtype == "float32":
        assert again.tokens == first.generate(follow, kv_bits=bits, **OPTIONS).tokens


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize(
    ("held", "asked", "reused"),
    [
        (300, 350, True),
        (STEP - 20, STEP, True),
        (STEP - 20, STEP + 1, False),
        (STEP + 50, STEP - 20, False),
        (STEP + 50, STEP + 90, True),
    ],
)
def test_rope_factors_on_both_sides_of_the_step(
    phi: phimlx.Phi, tmp_path: Path, held: int, asked: int, reused: bool, bits: int | None
) -> None:
    cache = phi.new_cache(bits)
    options = {"temperature": 0, "max_tokens": 4}
    phi.generate(words(held), cache=cache, **options)
    phi.save_cache(cache, tmp_path / "cache.safetensors")
    read = phi.load_cache(tmp_path / "cache.safetensors")
    reply = phi.generate(words(asked), cache=read, **OPTIONS)  # at STEP it goes over the step
    assert reply.tokens == phi.generate(words(asked), kv_bits=bits, **OPTIONS).tokens
    shared = min(held, asked - 1)
    assert reply.stats.cached_tokens == (shared if reused else 0)


def test_media_and_their_features(model: Phi4MMForCausalLM, tmp_path: Path) -> None:
    """Where a picture follows a sound, the sound is projected anew: its features are there."""
    (pixels, shown), (samples, heard) = picture("a"), sound("b")
    source = Source("digest", None, "tiny", "folder")
    for first in (heard, shown):
        begin = [*words(3), *(samples if first is heard else pixels), *words(4)]
        cache = PromptCache(model)
        said = greedy(model, begin, first, 4, cache)
        write_prefix(tmp_path / "cache.safetensors", cache, source)
        read = read_prefix(tmp_path / "cache.safetensors", model, source)
        assert (read.tokens, read.items) == (cache.tokens, cache.items)
        assert read.kv.adapters == cache.kv.adapters
        follow = [*begin, *said, *words(2, 8)]
        assert greedy(model, follow, first, 4, read) == plain(model, follow, first, 4)
        read = read_prefix(tmp_path / "cache.safetensors", model, source)
        both = together(heard, shown) if first is heard else together(shown, heard)
        more = [*follow, *(pixels if first is heard else samples), *words(3)]
        assert greedy(model, more, both, 4, read) == plain(model, more, both, 4)


def test_other_media_at_the_same_placeholders(model: Phi4MMForCausalLM, tmp_path: Path) -> None:
    source = Source("digest", None, "tiny", "folder")
    (pixels, one), (_, other) = picture("a"), picture("c")
    prompt = [*words(3), *pixels, *words(4)]
    cache = PromptCache(model)
    greedy(model, prompt, one, 2, cache)
    write_prefix(tmp_path / "cache.safetensors", cache, source)
    read = read_prefix(tmp_path / "cache.safetensors", model, source)
    assert greedy(model, prompt, other, 4, read) == plain(model, prompt, other, 4)


def test_the_owner_alone_may_read_it(saved: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


def test_an_empty_cache_and_another_models(phi: phimlx.Phi, small: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="The cache is empty: nothing has been generated"):
        phi.save_cache(phi.new_cache(), tmp_path / "cache.safetensors")
    with pytest.raises(GenerationError, match="belongs to another model"):
        phi.save_cache(phimlx.load(small).new_cache(), tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_frequencies_that_follow_the_length(tmp_path: Path) -> None:
    usual = {"rope_scaling": None, "original_max_position_embeddings": None}
    plain = make_model(tmp_path / "plain", max_position_embeddings=64, **usual)
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    phi = phimlx.load(plain, dtype="float32", rope_scaling=dynamic)
    for length in (20, 90):
        cache = phi.new_cache()
        phi.generate(words(length), cache=cache, **OPTIONS)
        if length == 20:
            phi.save_cache(cache, tmp_path / "cache.safetensors")
            read = phi.load_cache(tmp_path / "cache.safetensors")
            again = phi.generate(words(50), cache=read, **OPTIONS)
            assert again.tokens == phi.generate(words(50), **OPTIONS).tokens
            assert again.stats.cached_tokens == 20
        else:
            with pytest.raises(CacheError, match="cannot be used again"):
                phi.save_cache(cache, tmp_path / "cache.safetensors")


def changed_model(small: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> phimlx.Phi:
    return phimlx.load(make_model(tmp_path / "m", seed=1), dtype="float32")


def changed_config(small: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> phimlx.Phi:
    return phimlx.load(make_model(tmp_path / "m", rms_norm_eps=1e-6), dtype="float32")


def changed_adapter(small: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> phimlx.Phi:
    names = [f"model.layers.0.self_attn.qkv_proj.lora_{each}" for each in "ab"]
    arrays = {names[0]: mx.random.normal((64, 2)), names[1]: mx.random.normal((2, 128))}
    (tmp_path / "adapter").mkdir()
    mx.save_safetensors(str(tmp_path / "adapter" / "adapters.safetensors"), arrays)
    about = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.qkv_proj"],
        },
    }  # fmt: skip
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    return phimlx.load(small, adapter=tmp_path / "adapter", dtype="float32")


def changed_dtype(small: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> phimlx.Phi:
    return phimlx.load(small, dtype="bfloat16")


def changed_version(small: Path, tmp_path: Path, patch: pytest.MonkeyPatch) -> phimlx.Phi:
    patch.setattr(phimlx, "__version__", "9.0")
    return phimlx.load(small, dtype="float32")


CHANGES: dict[str, tuple[Callable[..., phimlx.Phi], str]] = {
    "model": (changed_model, "{path} was made with another model."),
    "config": (changed_config, "{path} was made with another model."),
    "adapter": (changed_adapter, "{path} was made with another adapter, or without one."),
    "dtype": (
        changed_dtype,
        "{path} was computed in float32, and the model computes in bfloat16.",
    ),
    "version": (changed_version, "{path} was made by phimlx 0.1.0 with mlx"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_anything_else_is_refused(
    change: str, saved: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = CHANGES[change]
    with pytest.raises(CacheError) as caught:
        make(small, tmp_path, monkeypatch).load_cache(saved)
    assert str(caught.value).startswith(message.format(path=saved))
    assert caught.value.hint == "Make it again with: phi.save_cache(cache, path)"


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", rope_scaling=None, original_max_position_embeddings=None)
    phi = phimlx.load(plain, dtype="float32")
    cache = phi.new_cache()
    phi.generate(words(40), cache=cache, **OPTIONS)
    phi.save_cache(cache, tmp_path / "cache.safetensors")
    scaled = phimlx.load(
        plain, dtype="float32", rope_scaling={"rope_type": "linear", "factor": 2.0}
    )
    with pytest.raises(CacheError, match="was made with other rope factors"):
        scaled.load_cache(tmp_path / "cache.safetensors")


def test_a_model_whose_files_have_changed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    phi = phimlx.load(folder, dtype="float32")
    cache = phi.new_cache()
    phi.generate(words(10), cache=cache, **OPTIONS)
    make_model(folder, seed=2)
    with pytest.raises(CacheError, match="files have changed since it was loaded"):
        phi.save_cache(cache, tmp_path / "cache.safetensors")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), head=st.booleans())
def test_no_flipped_bit_goes_unnoticed(
    phi: phimlx.Phi, saved: Path, place: float, bit: int, head: bool
) -> None:
    data = bytearray(saved.read_bytes())
    size = int.from_bytes(data[:8], "little") + 8 if head else len(data)
    data[int(place * size)] ^= 1 << bit
    damaged = saved.with_name("damaged.safetensors")
    damaged.write_bytes(data)
    before = phi.load_cache(saved)
    try:
        read = phi.load_cache(damaged)
    except CacheError:
        return
    assert read.tokens == before.tokens
    pairs = zip(read.kv.state, before.kv.state, strict=True)
    assert all(mx.array_equal(one, other) for one, other in pairs)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_short(phi: phimlx.Phi, saved: Path, place: float) -> None:
    data = saved.read_bytes()
    cut = saved.with_name("cut.safetensors")
    cut.write_bytes(data[: int(place * len(data))])
    with pytest.raises(CacheError):
        phi.load_cache(cut)


Change = Callable[[dict[str, mx.array], dict[str, str]], object]


def with_key(**parts: Any) -> Change:
    def change(arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
        metadata["key"] = json.dumps({**json.loads(metadata["key"]), **parts})

    return change


def with_metadata(**entries: str) -> Change:
    return lambda arrays, metadata: metadata.update(entries)


def with_array(name: str, make: Callable[[mx.array], mx.array]) -> Change:
    return lambda arrays, metadata: arrays.update({name: make(arrays[name])})


KEYS = "layers.0.0"
HOSTILE: dict[str, tuple[Change, str]] = {
    "format": (with_metadata(format="other"), "is no file of a prompt cache."),
    "version": (
        with_metadata(version="2"),
        "is of version '2' of prompt caches; this is 1.",
    ),
    "long version": (with_metadata(version="9" * 999), "is of version '999"),
    "key": (with_metadata(key="{}"), "is damaged: what it says of itself is no sense."),
    "deep key": (with_metadata(key="[" * 99999), "is damaged: what it says"),
    "key of lists": (with_key(model=[1]), "is damaged: what it says"),
    "table": (with_key(table=7), "was made with other rope factors."),
    "table's type": (with_key(table=True), "is damaged: what it says"),
    "bits": (with_key(kv_bits=3), "holds keys and values at bits that there are not."),
    "other bits": (with_key(kv_bits=8), "is damaged: its arrays are not those of the model."),
    "row adapter": (with_key(row_adapter="other"), "is damaged: what it says"),
    "count": (with_metadata(tokens="41"), "is damaged: its tokens are not there."),
    "count's digits": (with_metadata(tokens="9" * 9999), "is damaged: what it says"),
    "media": (with_metadata(media="7"), "is damaged: what it says"),
    "media of text": (
        with_metadata(media='[[0, "00", 1, 3, 0, false]]'),
        "is damaged: its media are not at their places.",
    ),
    "item's kind": (with_metadata(media='[[2, "00", 1, 3, 0, false]]'), "is damaged: what it"),
    "item's digest": (with_metadata(media='[[0, "xy", 1, 3, 0, false]]'), "is damaged: what it"),
    "no tokens": (lambda a, m: a.pop("tokens"), "is damaged: its tokens are not there."),
    "tokens beyond": (
        with_array("tokens", lambda a: a + 10**6),
        "is damaged: it has tokens that the model does not have.",
    ),
    "tokens below": (with_array("tokens", lambda a: a - 10**6), "is damaged: it has tokens"),
    "token type": (
        with_array("tokens", lambda a: a.astype(mx.float32)),
        "is damaged: its tokens are not there.",
    ),
    "no keys": (lambda a, m: a.pop(KEYS), "is damaged: its arrays are not those of the model."),
    "keys' dtype": (with_array(KEYS, lambda a: a.astype(mx.float16)), "is damaged: its arrays"),
    "keys' width": (with_array(KEYS, lambda a: a[..., :8]), "is damaged: its arrays"),
    "keys' columns": (with_array(KEYS, lambda a: a[:, :, :8]), "is damaged: its arrays"),
    "keys' heads": (with_array(KEYS, lambda a: mx.concatenate([a, a], 1)), "is damaged: its array"),
    "rows": (with_array(KEYS, lambda a: mx.concatenate([a, a], 0)), "is damaged: its arrays"),
    "another array": (lambda a, m: a.update(more=mx.zeros(3)), "is damaged: its arrays"),
    "features": (
        lambda a, m: a.update({"features.images": mx.zeros((2, 64))}),
        "is damaged: its arrays",
    ),
}


def rewritten(path: Path, change: Change) -> Path:
    """The file with other contents, whose checksum is right."""
    with open_array_file(path) as file:
        arrays, metadata = dict(file.read()), dict(file.metadata)
    change(arrays, metadata)
    forms = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    made = path.with_name("changed.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(array_file.NAMES, mx.float16, "F16")
        write_array_file(made, forms, iter(arrays.items()), metadata)
    return made


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_a_file_says_is_trusted(phi: phimlx.Phi, saved: Path, name: str) -> None:
    change, message = HOSTILE[name]
    made = rewritten(saved, change)
    with pytest.raises(CacheError) as caught:
        phi.load_cache(made)
    assert str(caught.value).startswith(f"{made} {message}")
    assert len(str(caught.value)) < len(str(made)) + 120
    assert phi.load_cache(rewritten(saved, lambda arrays, metadata: None)).tokens


def pipe(path: Path) -> None:
    os.mkfifo(path)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "There is no file {path}."),
    "folder": (lambda path: path.mkdir(), "{path} cannot be read: is a directory."),
    "pipe": (pipe, "{path} is not a regular file."),
    "empty": (lambda path: path.touch(), "{path} is damaged or no file of a cache."),
    "text": (lambda path: path.write_text("{}" * 40), "{path} is damaged or no file of a cache."),
    "zeros": (lambda path: path.write_bytes(bytes(999)), "{path} is damaged or no file of a cache"),
    "huge": (
        lambda path: path.write_bytes(b"\xff" * 64),
        "{path} is damaged or no file of a cache.",
    ),
    "weights": (
        lambda path: mx.save_safetensors(str(path), {"a": mx.zeros(3)}),
        "{path} is no file of a prompt cache.",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_none(phi: phimlx.Phi, tmp_path: Path, name: str) -> None:
    path = tmp_path / "cache.safetensors"
    make, message = FOREIGN[name]
    make(path)
    with pytest.raises(CacheError) as caught:
        phi.load_cache(path)
    assert str(caught.value).startswith(message.format(path=path).rstrip("."))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(
    phi: phimlx.Phi, saved: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before, calls = saved.read_bytes(), iter(range(9))
    write: Any = array_file._write_all

    def fail(file: Any, data: memoryview) -> None:
        if next(calls) == 3:
            raise failure
        write(file, data)

    cache = phi.new_cache()
    phi.generate(words(30), cache=cache, **OPTIONS)
    monkeypatch.setattr(array_file, "_write_all", fail)
    with pytest.raises((CacheError, KeyboardInterrupt)) as caught:
        phi.save_cache(cache, saved)
    if isinstance(failure, OSError):
        assert str(caught.value) == f"The disk is full: {saved} could not be written."
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_whole_cache_is_never_copied(phi: phimlx.Phi, tmp_path: Path) -> None:
    cache = phi.new_cache()
    phi.generate(words(3000), cache=cache, **OPTIONS)
    held = cache.nbytes
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    phi.save_cache(cache, tmp_path / "cache.safetensors")
    assert mx.get_peak_memory() - before < held * 0.6  # a layer's keys or values are a quarter


def test_names_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_file, "backend", lambda: "metal")
    assert prefix_file.made_with().endswith(" on metal")
    key = prefix_file.PrefixKey("m", None, "float32", None, "r", 0, None, "w")
    assert replace(key, table=1).digest != key.digest


def test_a_folder_whose_name_is_no_text(phi: phimlx.Phi, tmp_path: Path) -> None:
    source = Source("digest", None, "m\udcff", "/m\udcff")
    cache = phi.new_cache()
    phi.generate(words(10), cache=cache, **OPTIONS)
    write_prefix(tmp_path / "cache.safetensors", cache, source)
    assert read_prefix(tmp_path / "cache.safetensors", phi.model, source).tokens == cache.tokens


def test_numbers_of_a_written_file(saved: Path) -> None:
    """safetensors itself reads what was written."""
    from safetensors.numpy import load_file

    arrays = load_file(saved)
    assert set(arrays) == {"tokens", *(f"layers.{i}.{j}" for i in range(2) for j in range(2))}
    assert arrays["tokens"].dtype == np.int32
