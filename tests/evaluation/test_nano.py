"""The bundled phi-4-nano folder: its size, its files' agreement with Phi-4-mini's, its questions.

It reads files and runs no model.
"""

import json
import math
import struct
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

NANO = Path(str(files("phimlx"))) / "assets" / "nano"
KINDS = {"arithmetic", "capital", "word", "translation", "multi-turn", "tool"}
PUBLISHED = "hf/Phi-4-mini-instruct"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return read(NANO / "config.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(NANO / "tokenizer.json"))


@pytest.fixture(scope="module")
def header() -> dict[str, Any]:
    """The weights' names, types and shapes."""
    with (NANO / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__")
    return tensors


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with (NANO / "heldout.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def rendered(row: dict[str, Any]) -> str:
    """A row through the folder's own template, tools as Phi-4-mini takes them."""
    messages = [dict(message) for message in row["messages"]]
    for message in messages:
        if calls := message.pop("tool_calls", None):
            message["content"] = f"<|tool_call|>{json.dumps(calls)}<|/tool_call|>"
    if tools := row.get("tools"):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": ""})
        messages[0]["tools"] = json.dumps(tools)
    template = read(NANO / "tokenizer_config.json")["chat_template"]
    return jinja2.Template(template).render(messages=messages, add_generation_prompt=True)


def test_the_folder_holds_a_hub_model_and_nothing_else() -> None:
    assert {path.name for path in NANO.iterdir()} == {
        "LICENSE",
        "README.md",
        "config.json",
        "generation_config.json",
        "heldout.jsonl",
        "model.safetensors",
        "reference.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_it_is_at_most_3_million_parameters_and_6_megabytes(header: dict[str, Any]) -> None:
    parameters = sum(math.prod(tensor["shape"]) for tensor in header.values())
    assert parameters == 2_361_600
    assert sum(path.stat().st_size for path in NANO.iterdir()) <= 6_000_000
    card = (NANO / "README.md").read_text(encoding="utf-8")
    assert f"{parameters:,} parameters" in card
    assert "knows almost nothing" in card


def test_weights_follow_the_config(header: dict[str, Any], config: dict[str, Any]) -> None:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    shared = hidden + 2 * config["num_key_value_heads"] * head_dim
    expected = {
        "model.embed_tokens.weight": [config["vocab_size"], hidden],
        "model.norm.weight": [hidden],
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        expected |= {
            prefix + "input_layernorm.weight": [hidden],
            prefix + "post_attention_layernorm.weight": [hidden],
            prefix + "self_attn.qkv_proj.weight": [shared, hidden],
            prefix + "self_attn.o_proj.weight": [hidden, hidden],
            prefix + "mlp.gate_up_proj.weight": [2 * inner, hidden],
            prefix + "mlp.down_proj.weight": [hidden, inner],
        }
    assert {name: tensor["shape"] for name, tensor in header.items()} == expected
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    for name, shape in expected.items():
        if len(shape) == 2:
            assert shape[1] % 128 == 0, f"{name} does not divide into quantization groups"


def test_config_is_phi_4_mini_in_small(config: dict[str, Any]) -> None:
    assert config["model_type"] == "phi3"
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["partial_rotary_factor"] == 0.75
    assert config["tie_word_embeddings"] is True
    rope = config["rope_scaling"]
    pairs = config["hidden_size"] // config["num_attention_heads"] * 3 // 4 // 2
    assert rope["type"] == "longrope"
    assert rope["short_factor"] == [1.0] * pairs
    assert len(rope["long_factor"]) == pairs
    assert rope["long_factor"] == sorted(rope["long_factor"])
    assert rope["long_factor"][0] == 1.0
    assert rope["long_factor"][-1] == 12.0
    assert config["original_max_position_embeddings"] == 128
    assert config["max_position_embeddings"] == 1024


def test_config_has_the_keys_of_the_published_one(config: dict[str, Any], data: Path) -> None:
    published = read(data / PUBLISHED / "config.json")
    assert set(config) <= set(published)
    for key in ("architectures", "hidden_act", "rms_norm_eps", "rope_theta", "torch_dtype"):
        assert config[key] == published[key]


def test_the_tokenizer_is_the_published_one_in_small(data: Path) -> None:
    ours, published = read(NANO / "tokenizer.json"), read(data / PUBLISHED / "tokenizer.json")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        assert ours[part] == published[part]

    def flags(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**token, "id": 0} for token in tokenizer["added_tokens"]]

    assert flags(ours) == flags(published)


def test_the_tokenizer_config_is_the_published_one_in_small(data: Path) -> None:
    ours = read(NANO / "tokenizer_config.json")
    published = read(data / PUBLISHED / "tokenizer_config.json")
    assert ours.keys() == published.keys()
    assert {key for key in ours if ours[key] != published[key]} == {
        "added_tokens_decoder",
        "model_max_length",
    }
    assert list(ours["added_tokens_decoder"].values()) == list(
        published["added_tokens_decoder"].values()
    )


def test_control_token_ids_agree_everywhere(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    decoder = read(NANO / "tokenizer_config.json")["added_tokens_decoder"]
    for number, token in decoder.items():
        assert tokenizer.token_to_id(token["content"]) == int(number) < config["vocab_size"]
    end, endoftext = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|endoftext|>")
    assert read(NANO / "generation_config.json")["eos_token_id"] == [end, endoftext]
    assert config["eos_token_id"] == config["bos_token_id"] == config["pad_token_id"] == endoftext


@pytest.mark.parametrize(
    "text",
    [
        "What is 23 + 45?",
        " leading space, trailing space ",
        "naïve Äpfel 日本語 🙂‍↔️",
        "tabs\tand\r\nlines\n\n  indented",
        'def f(x):\n    return {"a": [1, 2.5e-3]}',
        "\x00\x7f",
    ],
)
def test_the_tokenizer_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_numbers_are_read_digit_by_digit(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2048", add_special_tokens=False).tokens == ["2", "0", "4", "8"]


def test_role_tokens_strip_whitespace_to_their_right(tokenizer: Tokenizer) -> None:
    assert (
        tokenizer.encode("<|user|> \n Hi<|end|>", add_special_tokens=False).ids
        == tokenizer.encode("<|user|>Hi<|end|>", add_special_tokens=False).ids
    )


def test_held_out_rows_are_well_formed(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) - {"tools"} == {"messages", "answer", "kind", "long"}
        assert row["messages"][-1]["role"] == "user"
        assert {message["role"] for message in row["messages"]} <= {
            "system",
            "user",
            "assistant",
            "tool",
        }
        assert row["answer"] == row["answer"].strip() != ""
        for tool in row.get("tools", ()):
            assert set(tool) == {"name", "description", "parameters"}
            assert set(tool["parameters"]["required"]) == set(tool["parameters"]["properties"])
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == KINDS
    assert min(kinds.values()) >= 50
    # Every question is another one, and no answer is right for many.
    assert len({json.dumps(row) for row in rows}) == len(rows)
    assert Counter(row["answer"] for row in rows).most_common(1)[0][1] <= len(rows) // 20


def test_tool_answers_call_a_tool_that_is_there(rows: list[dict[str, Any]]) -> None:
    called: Counter[str] = Counter()
    for row in rows:
        if not row["answer"].startswith("<|tool_call|>"):
            continue
        body = row["answer"].removeprefix("<|tool_call|>").removesuffix("<|/tool_call|>")
        (call,) = json.loads(body)
        schema = next(tool for tool in row["tools"] if tool["name"] == call["name"])
        assert set(call["arguments"]) == set(schema["parameters"]["properties"])
        called[call["name"]] += 1
    assert len(called) >= 8
    assert any(row["kind"] == "tool" and "<|tool_call|>" not in row["answer"] for row in rows)


@pytest.mark.slow
def test_held_out_prompts_lie_on_both_sides_of_the_step(
    rows: list[dict[str, Any]], tokenizer: Tokenizer, config: dict[str, Any]
) -> None:
    step, longest = config["original_max_position_embeddings"], config["max_position_embeddings"]
    for row in rows:
        length = len(tokenizer.encode(rendered(row), add_special_tokens=False).ids)
        assert length + 64 <= longest
        assert row["long"] == (length > step)
    long = Counter(row["kind"] for row in rows if row["long"])
    assert set(long) == KINDS
    assert min(long.values()) >= 20
