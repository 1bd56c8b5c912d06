"""Several adapters beside one base: each request gets the reply that its adapter alone gives."""

from __future__ import annotations

import gc
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import phimlx
from convert import Quantization, convert
from phimlx.adapters.adapter import Adapter
from phimlx.adapters.peft import write_peft
from phimlx.api import Phi
from phimlx.checkpoint.head import EMBEDDING, HEAD
from phimlx.errors import CacheError, CheckpointError, ConfigError, GenerationError
from phimlx.generation import prefill, scheduler
from phimlx.generation.engine import Engine
from phimlx.generation.options import GenerationOptions
from phimlx.generation.reply import Reply
from phimlx.generation.request import Request
from phimlx.models.lora import DEFAULT, LoRA
from phimlx.models.token_rows import TokenRows
from tests.adapters.test_tokenizer import with_token
from tests.generation.small import make_model, words
from tests.generation.test_engine_media import picture, sound

STEP = 32
NAMES = ("lora", "dora", "bias", "one.layer")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


def adapter_for(folder: Path, name: str, seed: int = 0) -> Adapter:
    """One for a model in a folder, of the kind that its name says."""
    model = phimlx.load(folder).model
    layers: dict[str, LoRA] = {}
    rank = 2 + NAMES.index(name)
    for number in range(1 if name == "one.layer" else len(model.layers)):
        for projection in model.architecture.projections:
            width, height = model.config.projection_shapes[projection]
            key = mx.random.key(1000 * seed + 100 * NAMES.index(name) + len(layers))
            a, b, m, bias = (
                mx.random.normal(shape, key=each)
                for shape, each in zip(
                    ((width, rank), (rank, height), (height,), (height,)),
                    mx.random.split(key, 4),
                    strict=True,
                )
            )
            layers[f"model.layers.{number}.{projection}"] = LoRA(
                0.2 * a,
                0.2 * b,
                1.5,
                magnitude=1 + 0.2 * mx.abs(m) if name == "dora" else None,
                bias=0.3 * bias if name == "bias" else None,
            )
    return Adapter(layers)


def write_adapters(model: Path, folder: Path) -> Path:
    for name in NAMES:
        write_peft(folder / name, adapter_for(model, name))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose LongRoPE step is at 32 tokens."""
    folder = tmp_path_factory.mktemp("small") / "model"
    return make_model(folder, original_max_position_embeddings=STEP)


@pytest.fixture(scope="module")
def quantized(small: Path) -> Path:
    folder = small.parent / "quantized"
    convert(small, folder, Quantization(32, 4))
    return folder


@pytest.fixture(scope="module")
def adapters(small: Path) -> Path:
    return write_adapters(small, small.parent / "adapters")


def load(folder: Path, adapters: Path, names: tuple[str, ...] = NAMES) -> Phi:
    phi = phimlx.load(folder, dtype="float32")
    for name in names:
        assert phi.load_adapter(adapters / name, name) == ()
    return phi


def alone(folder: Path, adapters: Path, name: str | None) -> Phi:
    return phimlx.load(folder, None if name is None else adapters / name, "float32")


@pytest.mark.parametrize(
    ("base", "bits", "seed"),
    [
        ("small", None, 1),
        pytest.param("small", None, 0, marks=pytest.mark.slow),
        pytest.param("small", 8, 2, marks=pytest.mark.slow),
        pytest.param("quantized", None, 3, marks=pytest.mark.slow),
    ],
)
def test_each_row_of_a_batch_is_that_of_its_adapter_alone(
    base: str,
    bits: int | None,
    seed: int,
    adapters: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows come and go between steps, on either side of the LongRoPE step and across it."""
    for module in (prefill, scheduler):
        monkeypatch.setattr(module, "prefill_tokens", lambda: 16)
    monkeypatch.setattr(prefill, "SHARES", 1)
    folder = request.getfixturevalue(base)
    rng = random.Random(seed)
    phi = load(folder, adapters)
    singles = {name: alone(folder, adapters, name) for name in (None, *NAMES)}
    asked: list[tuple[int, str | None, list[int], dict[str, Any], Request]] = []
    for number in range(12):
        name = (None, *NAMES)[number % 5]
        prompt = words(rng.choice([1, 3, 14, 28, 31, 32, 33, 50]), number)
        options = {
            "max_tokens": rng.choice([2, 7, 12, 20]),
            "temperature": rng.choice([0.0, 1.0]),
            "seed": number,
            "kv_bits": bits,
        }
        made = phi.request(prompt, GenerationOptions(adapter=name, **options))
        asked.append((rng.randrange(24), name, prompt, options, made))
    mixed = 0
    for step in range(400):
        for when, *_, made in asked:
            if when == step:
                phi.engine.add(made)
        phi.engine.step()
        rows = phi.engine._scheduler._rows
        mixed += rows is not None and len({each.adapter for each in rows.requests}) > 2
    assert mixed > 5
    changed = 0
    for _, name, prompt, options, made in asked:
        assert made.finished
        reply = singles[name].generate(prompt, prompt_lookup=False, **options)
        assert made.reply.tokens == reply.tokens
        changed += reply.tokens != singles[None].generate(prompt, **options).tokens
    assert changed > 6


def test_drafts_are_verified_with_the_adapter(small: Path, adapters: Path) -> None:
    phi = load(small, adapters, ("dora",))
    phi.engine.pass_cost = lambda tokens: 1.0
    prompt = [5, 6, 7, 8] * 6
    reply = phi.generate(prompt, adapter="dora", temperature=0, max_tokens=20)
    assert reply.stats.drafted_tokens
    single = alone(small, adapters, "dora")
    expected = single.generate(prompt, temperature=0, max_tokens=20, prompt_lookup=False)
    assert reply.tokens == expected.tokens


def test_logits_of_a_row_are_those_of_its_adapter_alone(small: Path, adapters: Path) -> None:
    """Within 1e-4 of the largest, in one pass over rows of different adapters."""
    phi = load(small, adapters)
    for length in (20, STEP + 8):
        ids = mx.array([words(length, row) for row in range(6)])
        names = (None, *NAMES, None)
        keys = [phi.request([3], GenerationOptions(adapter=name)).adapter for name in names]
        cache = phi.model.make_cache(length)
        cache.expect([length] * 6, (), keys)
        found = phi.model(ids, cache)
        for row, name in enumerate(names):
            expected = alone(small, adapters, name).model(ids[row : row + 1])
            assert mx.abs(found[row] - expected[0]).max() < 1e-4 * mx.abs(expected).max()


def test_the_adapter_given_to_load_is_the_default(small: Path, adapters: Path) -> None:
    """And others, or none, are what they are beside nothing."""
    phi = phimlx.load(small, adapters / "dora", "float32")
    phi.load_adapter(adapters / "lora", "other")
    assert phi.adapters == ("default", "other")
    prompt = words(40)
    for name, expected in ((None, None), (DEFAULT, "dora"), ("other", "lora")):
        reply = phi.generate(prompt, adapter=name, **GREEDY)
        assert reply.tokens == alone(small, adapters, expected).generate(prompt, **GREEDY).tokens
    assert phi.generate(prompt, **GREEDY).tokens == (
        phi.generate(prompt, adapter=DEFAULT, **GREEDY).tokens
    )
    (reply,) = phi.generate_all([prompt], max_tokens=8, adapter="other")
    assert reply.tokens == phi.generate(prompt, adapter="other", **GREEDY).tokens


def test_a_prompt_cache_serves_one_adapter_at_a_time(small: Path, adapters: Path) -> None:
    phi = load(small, adapters)
    singles = {name: alone(small, adapters, name) for name in (None, *NAMES)}
    cache = phi.new_cache()
    prompt = words(20)
    before: str | None = None
    for name in (None, "lora", "lora", "dora", "bias", None, None, "one.layer", "lora"):
        reply = phi.generate(prompt, adapter=name, cache=cache, **GREEDY)
        assert reply.tokens == singles[name].generate(prompt, **GREEDY).tokens
        assert bool(reply.stats.cached_tokens) == (name == before and len(prompt) > 20)
        prompt, before = [*prompt, *reply.tokens[:2], 9], name


class Store:
    """A process with the store of long prompts in a folder."""

    def __init__(self, phi: Phi, folder: Path) -> None:
        self.phi, self.notes = phi, list[str]()
        store = phi.prefix_store(self.notes.append, folder=folder, min_tokens=1)
        assert store is not None
        self.store = store

    def ask(self, prompt: list[int], adapter: str | None = DEFAULT) -> Reply:
        cache = self.phi.new_cache(None, self.store)
        reply = self.phi.generate(prompt, cache=cache, adapter=adapter, **GREEDY)
        self.store.save(cache)
        assert reply.tokens == self.phi.generate(prompt, adapter=adapter, **GREEDY).tokens
        assert self.notes == []
        return reply


def test_kept_prompts_never_cross_adapters(small: Path, adapters: Path, tmp_path: Path) -> None:
    """An adapter is known by its files: whatever its name, and also where it is the default."""
    text, again = words(300), [*words(300), 9, 8]
    first = Store(load(small, adapters), tmp_path)
    for name in (None, *NAMES[:3]):
        assert first.ask(text, name).stats.cached_tokens == 0
        assert first.ask(again, name).stats.cached_tokens >= 299
    second = Store(load(small, adapters, ("dora",)), tmp_path)
    assert second.ask(again, "dora").stats.cached_tokens >= 299
    third = Store(phimlx.load(small, adapters / "bias", "float32"), tmp_path)
    for name in (DEFAULT, None):
        assert third.ask(again, name).stats.cached_tokens >= 299
    write_peft(tmp_path / "lora", adapter_for(small, "lora", seed=1))
    other = Store(load(small, tmp_path, ("lora",)), tmp_path)
    assert other.ask(again, "lora").stats.cached_tokens == 0


def test_a_cache_in_a_file_is_that_of_its_adapter(
    small: Path, adapters: Path, tmp_path: Path
) -> None:
    phi, path = load(small, adapters), tmp_path / "cache.safetensors"
    cache = phi.new_cache()
    phi.generate(words(60), adapter="dora", cache=cache, **GREEDY)
    phi.save_cache(cache, path)
    for name in (DEFAULT, None, "lora"):
        with pytest.raises(CacheError, match="was made with another adapter, or without one"):
            phi.load_cache(path, name)
    for which, name in ((phi, "dora"), (alone(small, adapters, "dora"), DEFAULT)):
        read = which.load_cache(path, name)
        reply = which.generate([*words(60), 7], adapter=name, cache=read, **GREEDY)
        assert reply.stats.cached_tokens == 60
        assert reply.tokens == which.generate([*words(60), 7], adapter=name, **GREEDY).tokens
    phi.delete_adapter("dora")
    with pytest.raises(CacheError, match=r"^The cache was made with an adapter that has been"):
        phi.save_cache(cache, path)


def test_a_name_that_comes_again_is_another_adapter(
    small: Path, adapters: Path, tmp_path: Path
) -> None:
    phi = load(small, adapters, ("lora",))
    cache = phi.new_cache()
    phi.generate(words(60), adapter="lora", cache=cache, **GREEDY)
    phi.delete_adapter("lora")
    write_peft(tmp_path / "lora", adapter_for(small, "lora", seed=1))
    phi.load_adapter(tmp_path / "lora", "lora")
    reply = phi.generate(words(60), adapter="lora", cache=cache, **GREEDY)
    assert reply.stats.cached_tokens == 0
    assert reply.tokens == alone(small, tmp_path, "lora").generate(words(60), **GREEDY).tokens


def test_an_adapter_is_deleted_when_nothing_uses_it(small: Path, adapters: Path) -> None:
    phi = phimlx.load(small, dtype="float32")
    before: Any = dict(tree_flatten(phi.model.parameters()))
    for name in NAMES:
        phi.load_adapter(adapters / name, name)
    weights: Any = dict(tree_flatten(phi.model.parameters()))
    assert sum(id(array) in set(map(id, before.values())) for array in weights.values()) == len(
        before
    )
    options = GenerationOptions(adapter="lora", **GREEDY)
    one, two = (phi.request(words(9), options) for _ in range(2))
    phi.engine.add(one)
    stream = phi.stream(words(5), adapter="lora", **GREEDY)
    next(iter(stream))
    with pytest.raises(GenerationError) as caught:
        phi.delete_adapter("lora")
    assert str(caught.value) == "The adapter lora is in use by 2 requests."
    assert caught.value.hint == "Wait until they have ended, or cancel them."
    stream.close()
    batch = phi.engine.run_each([phi.request(words(7), options) for _ in range(3)], 1)
    next(batch)
    with pytest.raises(GenerationError, match="in use by 2 requests"):
        phi.delete_adapter("lora")
    batch.close()
    while not one.finished:
        phi.engine.step()
    assert one.reply.tokens == alone(small, adapters, "lora").generate(words(9), **GREEDY).tokens
    phi.delete_adapter("lora")
    with pytest.raises(GenerationError) as caught:
        phi.engine.add(two)
    gone = "The request names an adapter that is not loaded, or has been deleted."
    assert str(caught.value) == gone
    with pytest.raises(GenerationError) as caught:
        list(phi.engine.run(two))
    assert str(caught.value) == gone
    for name in NAMES[1:]:
        phi.delete_adapter(name)
    after: Any = dict(tree_flatten(phi.model.parameters()))
    assert {name: id(array) for name, array in after.items()} == {
        name: id(array) for name, array in before.items()
    }


def test_an_adapter_takes_its_own_bytes(small: Path, adapters: Path) -> None:
    """Of the memory for keys and values, which are admitted by forecast; they are free again."""
    layers = adapter_for(small, "lora").layers.values()
    nbytes = sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in layers)
    phi = phimlx.load(small, dtype="float32")
    mx.eval(phi.model.parameters())
    room = phi.engine._scheduler._left
    gc.collect()
    active = mx.get_active_memory()
    phi.load_adapter(adapters / "lora", "lora")
    assert room - phi.engine._scheduler._left == nbytes
    gc.collect()
    assert nbytes <= mx.get_active_memory() - active < 1.1 * nbytes
    phi.delete_adapter("lora")
    gc.collect()
    assert phi.engine._scheduler._left == room
    assert mx.get_active_memory() == active


SHARED: dict[str, Any] = {
    EMBEDDING: {"weights": {f"{EMBEDDING}.weight": mx.ones((500, 64))}},
    HEAD: {"layers": {HEAD: LoRA(mx.ones((64, 2)), mx.ones((2, 500)), 1.0)}},
    f"{EMBEDDING} ": {"rows": {EMBEDDING: TokenRows((7,), mx.ones((1, 64)))}},
    "model.norm.weight": {"weights": {"model.norm.weight": mx.ones(64)}},
}


@pytest.mark.parametrize("what", SHARED)
def test_what_all_requests_share_is_not_chosen_by_request(
    what: str, small: Path, adapters: Path, tmp_path: Path
) -> None:
    usual = adapter_for(small, "lora")
    change = dict(SHARED[what])
    whole = replace(usual, layers={**usual.layers, **change.pop("layers", {})}, **change)
    write_peft(tmp_path, whole)
    phi = load(small, adapters, ("lora",))
    expected = phi.generate(words(9), adapter="lora", **GREEDY).tokens
    with pytest.raises(CheckpointError) as caught:
        phi.load_adapter(tmp_path, "other")
    found = str(caught.value)
    assert found.startswith(f"The adapter changes {what.strip()}")
    assert found.endswith(
        ", which all requests share: only LoRA and DoRA of the layers' projections can be chosen "
        "by request."
    )
    assert phi.adapters == ("lora",)
    assert phi.generate(words(9), adapter="lora", **GREEDY).tokens == expected
    fixed = phimlx.load(small, tmp_path, "float32")
    for wrong in (
        lambda: fixed.generate(words(9), adapter=None, **GREEDY),
        lambda: fixed.load_adapter(adapters / "lora", "lora"),
        lambda: list(Engine(fixed.model).run(replace_adapter(fixed, None))),
    ):
        with pytest.raises(GenerationError) as refused:
            wrong()
        assert str(refused.value) == (
            "The model was loaded with an adapter that changes more than the layers' projections, "
            "so every request uses it."
        )
    assert fixed.adapters == ("default",)


def replace_adapter(phi: Phi, adapter: str | None) -> Request:
    request = phi.request(words(9), GenerationOptions(**GREEDY))
    request.adapter = adapter
    return request


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 65, "é", None, 3])
def test_names_that_cannot_be(name: Any, small: Path, adapters: Path) -> None:
    phi = phimlx.load(small)
    with pytest.raises(ConfigError, match="is no name of an adapter"):
        phi.load_adapter(adapters / "lora", name)
    assert phi.adapters == ()


def test_names_that_are_taken_or_mean_nothing(small: Path, adapters: Path) -> None:
    phi = load(small, adapters, ("lora",))
    for name in ("lora", DEFAULT):
        with pytest.raises(ConfigError, match=f"There is an adapter {name} already"):
            phi.load_adapter(adapters / "dora", name)
    unknown: list[Any] = ["dora", 3, ["lora"], ""]
    for each in unknown:
        with pytest.raises(GenerationError) as caught:
            phi.generate(words(3), adapter=each)
        assert str(caught.value).startswith("There is no adapter ")
        assert caught.value.hint == "Those that are loaded: lora."
    own: list[Any] = [DEFAULT, None]
    for each in own:
        with pytest.raises(GenerationError, match="What the model was loaded with stays with it"):
            phi.delete_adapter(each)
    with pytest.raises(GenerationError, match="There is no adapter 'dora'"):
        phi.delete_adapter("dora")


def names_in(phi: Phi) -> list[str]:
    parameters: Any = tree_flatten(phi.model.parameters())
    return [name for name, _ in parameters]


def test_one_that_does_not_fit_leaves_nothing(small: Path, adapters: Path, tmp_path: Path) -> None:
    phi = load(small, adapters, ("lora",))
    before = names_in(phi)
    wrong = adapter_for(small, "dora")
    layers = dict(wrong.layers)
    path = list(layers)[-1]
    layers[path] = replace(layers[path], lora_a=mx.ones((5, 3)))
    write_peft(tmp_path, Adapter(layers))
    with pytest.raises(CheckpointError, match="made for another model"):
        phi.load_adapter(tmp_path, "other")
    assert names_in(phi) == before
    assert phi.adapters == ("lora",)


@pytest.mark.slow
def test_each_adapter_has_its_own_tokenizer(tmp_path: Path) -> None:
    """One whose tokenizer adds tokens that the model has rows for is asked in its own words."""
    model = tmp_path / "model"
    shutil.copytree(phimlx.load("nano").path, model)
    width = phimlx.load("nano").model.config.hidden_size
    path = "model.layers.0.self_attn.o_proj"
    write_peft(tmp_path / "a", Adapter({path: LoRA(mx.ones((width, 1)), mx.ones((1, width)), 0.1)}))
    with_token(tmp_path / "a", 1532)
    single = phimlx.load(model, tmp_path / "a", "float32")
    phi = phimlx.load(model, dtype="float32")
    remarks = phi.load_adapter(tmp_path / "a", "a")
    assert remarks == single.remarks
    asked, expected = (
        each.request("Hi", GenerationOptions(adapter=name, **GREEDY))
        for each, name in ((phi, "a"), (single, DEFAULT))
    )
    assert (asked.prompt, asked.stop_tokens) == (expected.prompt, expected.stop_tokens)
    plain = single.request("Hi", GenerationOptions(adapter=None, **GREEDY))
    usual = phi.request("Hi", GenerationOptions(**GREEDY))
    assert (plain.prompt, plain.stop_tokens) == (usual.prompt, usual.stop_tokens)


@pytest.mark.slow
def test_beside_the_adapters_of_a_multimodal_model(data: Path, tmp_path: Path) -> None:
    """Rows of pictures, sounds and text with every adapter, in one batch."""
    folder = data / "tiny" / "tiny-phi4mm-remote"
    write_adapters(folder, tmp_path)
    phi = load(folder, tmp_path, ("lora", "dora"))
    contents = [([], None), picture("a"), sound("b")]
    asked = []
    for name in (None, "lora", "dora"):
        for number, (tokens, media) in enumerate(contents):
            prompt = [*words(3), *tokens, *words(2 + number, number)]
            request = phi.request(prompt[:3], GenerationOptions(adapter=name, **GREEDY))
            request.prompt, request.media = prompt, media
            asked.append((name, request))
    phi.engine.run_all([request for _, request in asked], batch_size=9)
    for name, request in asked:
        single = alone(folder, tmp_path, name)
        other = single.request(request.prompt[:3], GenerationOptions(**GREEDY))
        other.prompt, other.media = request.prompt, request.media
        list(single.engine.run(other))
        assert request.reply.tokens == other.reply.tokens


def test_a_prefix_is_never_taken_of_another_adapter(small: Path, adapters: Path) -> None:
    """Whether the row it is of has left, or is being decoded."""
    phi = load(small, adapters, ("lora", "dora"))
    prompt = words(24, 5)
    expected = {
        name: alone(small, adapters, name).generate(prompt, **GREEDY).tokens
        for name in ("lora", "dora", None)
    }
    cached = {}
    for turn in range(2):
        for name in expected:
            request = phi.request(prompt, GenerationOptions(adapter=name, **GREEDY))
            phi.engine.add(request)
            while phi.engine.busy:
                phi.engine.step()
            assert request.reply.tokens == expected[name], (turn, name)
            cached[turn, name] = request.reply.stats.cached_tokens
    assert {cached[0, name] for name in expected} == {0}
    assert all(cached[1, name] > 0 for name in expected)
    together = [phi.request(prompt, GenerationOptions(adapter=name, **GREEDY)) for name in expected]
    phi.engine.add(*together)
    while phi.engine.busy:
        phi.engine.step()
    assert [request.reply.tokens for request in together] == list(expected.values())


def test_adapters_with_the_models_tokenizer_share_what_grammars_need(tmp_path: Path) -> None:
    phi = phimlx.load("nano")
    write_peft(tmp_path / "one", adapter_for(phi.path, "lora"))
    write_peft(tmp_path / "other", adapter_for(phi.path, "lora", seed=1))
    for name in ("one", "other"):
        phi.load_adapter(tmp_path / name, name)
        phi.request("Hi", GenerationOptions(regex="yes|no", adapter=name))
    readers = {id(phi._variants.find(name).reader) for name in ("one", "other", "default")}
    assert len(readers) == 1
    assert len(phi._variants.find("one").reader._grammars) == 1
