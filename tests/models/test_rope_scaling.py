"""Rotary embeddings that a person scales to reach further: frequencies, logits, limits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import phimlx
from convert import convert
from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.cli.group import cli
from phimlx.errors import ConfigError, ConversionError
from phimlx.evaluation import parity
from phimlx.models.config import hub_dialect, read_rope, with_rope_scaling
from phimlx.models.rope import Rope
from phimlx.models.rope_scaling import read_argument
from tests.convert.tiny import MINI, PHI_4, write_model

GOLDENS = Path(__file__).parents[1] / "goldens"
CASES = json.loads((GOLDENS / "rope.json").read_text())
YARN = {"rope_type": "yarn", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def name_of(case: dict[str, Any]) -> str:
    scaling = case["config"]["rope_scaling"]
    return f"{case['config']['head_dim']}-{'-'.join(map(str, scaling.values()))}-{case['length']}"


def rope_of(scaling: dict[str, Any], **changed: Any) -> Rope:
    return build_model({**PHI_4, **changed, "rope_scaling": scaling}).config.rope


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_frequencies_are_transformers(case: dict[str, Any]) -> None:
    """But for a few in the last place, where torch's vectorized power misses the nearest number."""
    config = case["config"]
    rope = read_rope(config, config["head_dim"], config["max_position_embeddings"])
    expected = np.array([float.fromhex(each) for each in case["inverse_frequencies"]], np.float32)
    found = np.array(rope.inverse_frequencies(rope.table(case["length"])))
    assert found.dtype == np.float32
    distance = np.abs(found.view(np.int32) - expected.view(np.int32))
    # A base that is no whole number is rounded as torch rounds it; powers of it miss more often.
    assert distance.max() <= (2 if case["length"] > config["max_position_embeddings"] else 0)
    assert (distance > 0).mean() < 0.05
    assert rope.attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)


@pytest.mark.parametrize("name", ["llama-yarn", "llama-linear", "llama-dynamic"])
def test_every_case_equals_the_reference(name: str) -> None:
    """Below and above the length that it was trained with, in pieces, batches and step by step."""
    folder = GOLDENS / "models" / name
    results = list(parity.run(folder, folder / "reference.safetensors"))
    assert len(results) >= 12
    assert [result for result in results if not result.passed] == []
    assert all(result.top1 == 1 for result in results)


@pytest.mark.parametrize("name", ["llama-yarn", "llama-linear", "llama-dynamic"])
def test_the_cases_can_fail(name: str, tmp_path: Path) -> None:
    folder = GOLDENS / "models" / name
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": None}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    arrays, about = mx.load(str(folder / "reference.safetensors"), return_metadata=True)
    assert isinstance(arrays, dict)
    cases = [c for c in json.loads(about["cases"]) if c["name"] in ("63 tokens", "200 tokens")]
    results = {result.case: result for result in parity.repeat(tmp_path, cases, arrays)}
    assert not results["200 tokens"].passed
    assert results["63 tokens"].passed == (name == "llama-dynamic")


def test_how_far_it_reaches() -> None:
    def reach(scaling: dict[str, Any] | None, **changed: Any) -> int:
        config = {**PHI_4, **changed, "rope_scaling": scaling}
        return build_model(config).config.max_position_embeddings

    assert reach(None) == 256
    assert reach(YARN) == reach({"type": "linear", "factor": 4}) == 1024
    assert reach(DYNAMIC) == 512
    assert reach({"type": "linear", "factor": 1.5}) == 384
    # Where the config tells the new length beside the old one.
    assert reach(YARN, max_position_embeddings=1024) == 1024
    assert reach({**YARN, "factor": None}, max_position_embeddings=2048) == 2048
    # Dynamic scaling knows one length alone, as in transformers.
    assert reach(DYNAMIC, max_position_embeddings=1024) == 2048


def test_either_dialect_of_a_config() -> None:
    for scaling in (YARN, {"type": "linear", "factor": 2.0}, DYNAMIC):
        rope = rope_of(scaling)
        kind = scaling.get("rope_type", scaling.get("type"))
        table = {**scaling, "rope_type": kind, "rope_theta": 250000.0}
        modern = {k: v for k, v in PHI_4.items() if k not in ("rope_theta", "rope_scaling")}
        config = {**modern, "rope_parameters": table}
        assert build_model(config).config.rope == rope
        written = hub_dialect(config)
        assert written["rope_theta"] == 250000.0
        assert build_model(written).config.rope == rope
        assert build_model(hub_dialect(written)).config.rope == rope


def test_phi_3_s_first_name_of_longrope_is_not_yarn() -> None:
    scaling = {**MINI["rope_scaling"], "type": "yarn"}
    assert build_model({**MINI, "rope_scaling": scaling}).config == build_model(MINI).config


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "yarn", "factor": 0.5}, "factor is 0.5, not a number from 1 to 4096."),
        ({"type": "linear", "factor": 1e9}, "factor is 1000000000.0, not a number from 1 to 4096."),
        ({"type": "linear"}, "factor is None, not a number above 0."),
        ({"type": "dynamic", "factor": "4"}, "factor is '4', not a number above 0."),
        ({"type": "dynamic", "factor": float("nan")}, "factor is nan, not a number above 0."),
        ({**YARN, "truncate": "no"}, "truncate is 'no', not true or false."),
        ({**YARN, "beta_fast": -1}, "beta_fast is -1, not a number above 0."),
        ({**YARN, "beta_slow": [1]}, "beta_slow is [1], not a number above 0."),
        ({**YARN, "attention_factor": 0}, "attention_factor is 0, not a number above 0."),
        (
            {**YARN, "mscale": 1e308, "mscale_all_dim": 1},
            "mscale is 1e+308, not a number from 1e-37 to 1e+38.",
        ),
        (
            {**YARN, "original_max_position_embeddings": 0},
            "original_max_position_embeddings is 256, but "
            "rope_scaling.original_max_position_embeddings is 0.",
        ),
        ({**YARN, "alpha": 3}, "rope_scaling.alpha is not a setting that Phi-4 models use."),
        (
            {"type": "llama3", "factor": 8},
            "rope_scaling.type is 'llama3', but Phi models have 'default' or 'longrope' or "
            "'linear' or 'dynamic' or 'yarn'.",
        ),
    ],
)
def test_values_out_of_bounds(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_model({**PHI_4, "rope_scaling": scaling})
    assert str(caught.value) == f"config.json: {message}"


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**400), 10**400), st.floats(), st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["linear", "dynamic", "yarn"]),
    factor=st.one_of(ANYTHING, st.floats(1, 64)),
    others=st.dictionaries(
        st.sampled_from(
            ["beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"]
        ),
        st.one_of(ANYTHING, st.floats(1e-3, 100)),
    ),
    theta=st.one_of(ANYTHING, st.floats(1, 1e6)),
    original=st.one_of(ANYTHING, st.integers(1, 4096)),
)
def test_hostile_values_are_an_error_or_numbers(
    kind: str, factor: Any, others: dict[str, Any], theta: Any, original: Any
) -> None:
    config = {key: value for key, value in PHI_4.items() if key != "rope_scaling"}
    config |= {"rope_theta": theta, "original_max_position_embeddings": original}
    try:
        table = {"type": kind, "factor": factor, **others}
        rope = read_rope({**config, "rope_scaling": table}, 16, 256)
    except ConfigError:
        return
    for length in (1, 4097):
        found = np.array(rope.inverse_frequencies(rope.table(length)))
        assert np.isfinite(found).all()


# Dynamic scaling and what a cache holds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**PHI_4, "max_position_embeddings": 64, "original_max_position_embeddings": 64}
    return write_model(tmp_path_factory.mktemp("dynamic"), {**config, "rope_scaling": DYNAMIC})


def test_a_prompt_in_pieces_is_computed_as_one(folder: Path) -> None:
    model = load_model(Checkpoint(folder))
    ids = mx.array(np.random.default_rng(0).integers(4, 48, (1, 100)))
    whole = model(ids)
    for pieces in ([40, 100], [63, 65, 100], [64, 70, 98, 100], [98, 100]):
        cache, begin = model.make_cache(), 0
        for end in pieces:
            logits = model(ids[:, begin:end], cache)
            begin = end
        assert mx.allclose(logits[:, -1], whole[:, -1], atol=1e-4, rtol=0)


def test_a_reply_goes_on_with_the_keys_that_are_there(folder: Path) -> None:
    """As in transformers; see `test_every_case_equals_the_reference` for its numbers."""
    model = load_model(Checkpoint(folder))
    ids = mx.array(np.random.default_rng(0).integers(4, 48, (1, 70)))
    cache = model.make_cache()
    model(ids[:, :60], cache)
    keys = [mx.array(each[..., :60, :]) for each in cache.store.arrays]
    for position in range(60, 70):
        model(ids[:, position : position + 1], cache)
    held = [each[..., :60, :] for each in cache.store.arrays]
    assert all(mx.array_equal(*pair) for pair in zip(keys, held, strict=True))


def test_a_prompt_is_not_answered_from_another_length_s_keys(folder: Path) -> None:
    def reply(prompts: list[list[int]]) -> list[int]:
        phi = phimlx.load(folder)
        cache = phi.new_cache()
        for prompt in prompts:
            found = phi.generate(prompt, max_tokens=10, cache=cache)
        return found.tokens

    ids = [int(each) for each in np.random.default_rng(0).integers(4, 48, 90)]
    fresh = reply([ids])
    assert fresh == reply([ids[:60], ids])
    assert fresh == reply([ids[:70], ids])
    assert fresh == reply([ids, ids])


def test_replies_in_batches_and_from_drafts_are_those_of_each_alone(folder: Path) -> None:
    phi = phimlx.load(folder)
    row = [int(each) for each in np.random.default_rng(1).integers(4, 48, 12)]
    prompts = [(row * 8)[:length] for length in (40, 60, 63, 80)]
    alone = [phi.generate(prompt, max_tokens=30, temperature=0).tokens for prompt in prompts]
    batch = phi.generate_all(prompts, max_tokens=30, batch_size=4)
    assert [reply.tokens for reply in batch] == alone
    for prompt, expected in zip(prompts, alone, strict=True):
        drafted = phi.generate(prompt, max_tokens=30, temperature=0, prompt_lookup=True)
        assert drafted.tokens == expected


# By argument


def test_by_argument_it_is_what_a_config_says(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", PHI_4)
    phi = phimlx.load(folder, rope_scaling=YARN)
    assert phi.model.config.rope == rope_of(YARN)
    assert phi.context_length == 1024
    assert phimlx.load(folder).context_length == 256
    scaled = write_model(tmp_path / "scaled", {**PHI_4, "rope_scaling": DYNAMIC})
    assert phimlx.load(scaled, rope_scaling=YARN).model.config.rope == rope_of(YARN)
    plain = phimlx.load(scaled, rope_scaling={"rope_type": "default"})
    assert plain.model.config.rope == rope_of({"type": "default"})


def test_longrope_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        phimlx.load(write_model(tmp_path, MINI), rope_scaling=YARN)
    assert str(caught.value) == (
        "This model has LongRoPE, which it was trained with: no other scaling goes with it."
    )
    with pytest.raises(ConfigError, match="a model's own"):
        with_rope_scaling(PHI_4, {"type": "longrope", "factor": 4})


@pytest.mark.parametrize(
    ("text", "scaling"),
    [
        ("yarn:4", {"rope_type": "yarn", "factor": 4.0}),
        ("linear:1.5", {"rope_type": "linear", "factor": 1.5}),
        (
            "yarn:4:256",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
        ),
        ('{"type": "dynamic", "factor": 2}', {"type": "dynamic", "factor": 2}),
        ("default", {"rope_type": "default"}),
    ],
)
def test_as_a_person_writes_it(text: str, scaling: dict[str, Any]) -> None:
    assert read_argument(text) == scaling


@pytest.mark.parametrize(
    "text",
    ["", "yarn", "yarn:", "yarn:four", "yarn:4:x", "yarn:4:1:2", "{", '{"a"', "[" * 9],
)
def test_what_a_person_cannot_mean(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        read_argument(text)


def test_a_kind_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="rope_type is 'ntk'"):
        with_rope_scaling(PHI_4, read_argument("ntk:4"))


def test_commands(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "model", {**PHI_4, "vocab_size": 1536}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(phimlx.__file__).parent / "assets" / "nano" / name, folder)
    arguments = ["generate", "--model", folder, "--raw", "--json", "--temp", "0"]
    arguments += ["--prompt", "a b " * 200, "--max-tokens", "3"]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1
    done = CliRunner().invoke(cli, [*arguments, "--rope-scaling", "yarn:8"])
    assert done.exit_code == 0, done.output
    phi = phimlx.load(folder, rope_scaling={"rope_type": "yarn", "factor": 8})
    expected = phi.generate("a b " * 200, raw=True, max_tokens=3, temperature=0)
    assert json.loads(done.stdout)["text"] == expected.text
    wrong = CliRunner().invoke(cli, [*arguments, "--rope-scaling", "yarn:much"])
    assert wrong.exit_code == 2
    assert "'yarn:much' is neither KIND:FACTOR, such as yarn:4, nor JSON." in wrong.stderr


def test_a_conversion_keeps_it_and_llama_cpp_does_not_get_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", {**PHI_4, "rope_scaling": YARN})
    for layout in ({}, {"layout": "hf", "split_projections": True}):
        out = tmp_path / f"out{len(layout)}"
        convert(source, out, **layout)
        assert Checkpoint(out).config["rope_scaling"]["rope_type"] == "yarn"
        assert load_model(Checkpoint(out)).config.rope == rope_of(YARN)
        card = (out / "README.md").read_text()
        assert "yarn scaling of 256 tokens by 4 (`rope_scaling` in config.json)" in card
    with pytest.raises(ConversionError, match="has yarn scaling"):
        convert(source, tmp_path / "out.gguf", layout="gguf")


def test_examples_in_one_row_have_frequencies_of_their_own_lengths() -> None:
    rope = rope_of({"rope_type": "dynamic", "factor": 2}, max_position_embeddings=4)
    positions = mx.array([[0, 1, 2, 0, 1, 2, 3, 4, 0]])
    lengths = np.array([[3, 3, 3, 5, 5, 5, 5, 5, 0]])
    found = rope.by_token(positions, lengths)
    for first, last, length in ((0, 3, 3), (3, 8, 5)):
        alone = rope(mx.arange(length)[None], (rope.table(length),))
        for one, other in zip(found, alone, strict=True):
            assert mx.array_equal(one[:, :, first:last], other)
    longrope = build_model(MINI).config.rope
    found = longrope.by_token(positions, np.where(lengths == 5, 40, lengths))
    for first, last, table in ((0, 3, 0), (3, 8, 1)):
        alone = longrope(mx.arange(last - first)[None], (table,))
        assert mx.array_equal(found[0][:, :, first:last], alone[0])
