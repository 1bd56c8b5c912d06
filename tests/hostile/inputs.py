"""Hostile inputs by kind: what stands where, and the command that meets it."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from phimlx.media.audio_file import open_audio
from phimlx.media.image_file import load_image
from phimlx.media.video import read_video
from phimlx.terminal.conversation import Conversation
from tests.convert.test_fuse import SETTINGS, adapter_for
from tests.convert.test_hostile import FILE_NAMES, HEADERS
from tests.convert.tiny import write_safetensors
from tests.everything import EVERYTHING
from tests.hostile.values import NUMBERS, OTHERS, VALUES, put, twice
from tests.training.folder import write_rows, write_tiny

Run = Callable[..., Any]


@dataclass
class Bench:
    """What inputs are made of, and where.

    Attributes:
        home: holds what all share: whole models, adapters, runs.
        place: a folder for one input.
        run: runs a command line.
    """

    home: Path
    place: Path
    run: Run

    @cached_property
    def model(self) -> Path:
        return write_tiny(self.home / "model")

    @cached_property
    def rows(self) -> Path:
        return write_rows(self.home / "rows.jsonl", 6)

    @cached_property
    def adapter(self) -> Path:
        return adapter_for(self.model, self.home / "adapter", SETTINGS["lora"])

    @cached_property
    def peft(self) -> Path:
        out = self.home / "peft"
        self.run("fuse", "--adapter-path", self.adapter, "--export", "peft", "--save-path", out)
        return out

    @cached_property
    def trained(self) -> Path:
        """A run that was stopped after its second step."""
        out = self.home / "trained"
        self.run(
            *("train", "--model", self.model, "--data", self.rows, "--adapter-path", out),
            *("--iters", "2", "--batch-size", "2", "--rank", "2", "--save-every", "1"),
        )
        about = json.loads((out / "run.json").read_text())
        del about["ended"]
        (out / "run.json").write_text(json.dumps(about))
        last = out / "checkpoints" / "step-0000002"
        shutil.rmtree(last)
        return out

    @cached_property
    def session(self) -> dict[str, Any]:
        path = self.home / "session.json"
        Conversation("nano").save(path)
        return {
            **json.loads(path.read_text()),
            "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        }

    def copied(self, folder: Path) -> Path:
        """A copy of a folder that may be spoiled."""
        target = self.place / folder.name
        shutil.copytree(folder, target)
        return target


Row = Callable[[Bench], Any]
ROWS: dict[str, Row] = {}


def add(kind: str, rows: dict[str, Row]) -> None:
    """Add the rows of a kind."""
    ROWS.update({f"{kind}: {name}": row for name, row in rows.items()})


# Acts


def generate(bench: Bench, model: Path, *more: Any) -> None:
    bench.run("generate", "--model", model, "--prompt", "Hi", "--max-tokens", "2", *more)


def resume(bench: Bench, folder: Path) -> None:
    bench.run("train", "--resume", "--adapter-path", folder, "--iters", "2")


def check(bench: Bench, *more: Any) -> None:
    bench.run("train", "--check", "--model", bench.model, *more)


# JSON files


def in_json(
    folder: Callable[[Bench], Path],
    file: str,
    path: tuple[Any, ...],
    value: str,
    act: Callable[[Bench, Path], Any],
) -> Row:
    """A value at a path of a JSON file in a copy of a folder."""

    def row(bench: Bench) -> None:
        copy = bench.copied(folder(bench))
        known = copy / file
        table = json.loads(known.read_text()) if known.exists() else {}
        known.write_text(put(table, path, value))
        act(bench, copy)

    return row


def model_of(bench: Bench) -> Path:
    return bench.model


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}


def in_rope(key: str, value: str) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.model)
        config = json.loads((copy / "config.json").read_text())
        config |= {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64}
        path = (key,) if key.startswith("original") else ("rope_scaling", key)
        (copy / "config.json").write_text(put(config, path, value))
        generate(bench, copy)

    return row


CONFIG_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta"),
    *("partial_rotary_factor", "rms_norm_eps", "sliding_window", "rope_scaling", "model_type"),
    *("hidden_act", "torch_dtype", "tie_word_embeddings", "eos_token_id", "quantization"),
)
ROPE_KEYS = (
    *("type", "short_factor", "long_factor", "factor", "attention_factor"),
    "original_max_position_embeddings",
)
GENERATION_KEYS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample"),
    "eos_token_id",
)
add("config", {
    f"{key} {name}": in_json(model_of, "config.json", (key,), value, generate)
    for key in CONFIG_KEYS for name, value in VALUES.items()
})  # fmt: skip
add("rope", {
    f"{key} {name}": in_rope(key, value) for key in ROPE_KEYS for name, value in VALUES.items()
})  # fmt: skip
add("generation_config", {
    f"{key} {name}": in_json(model_of, "generation_config.json", (key,), value, generate)
    for key in GENERATION_KEYS for name, value in VALUES.items()
})  # fmt: skip
add("generation_config", {
    f"eos_token_id [{name}]": in_json(
        model_of, "generation_config.json", ("eos_token_id",), f"[{value}]", generate
    )
    for name, value in NUMBERS.items()
})  # fmt: skip
TOKENIZER_CONFIG_KEYS = (
    *("chat_template", "added_tokens_decoder", "bos_token", "eos_token", "model_max_length"),
    *("tokenizer_class", "add_bos_token"),
)
add("tokenizer_config", {
    f"{key} {name}": in_json(model_of, "tokenizer_config.json", (key,), value, generate)
    for key in TOKENIZER_CONFIG_KEYS for name, value in OTHERS.items()
})  # fmt: skip
add("tokenizer_config", {
    f"id {number}": in_json(
        model_of, "tokenizer_config.json", ("added_tokens_decoder", number),
        '{"content": "<|new|>", "special": true}', generate,
    )
    for number in ("-1", "1536", "100000", "10000000", str(2**32), str(2**63), "x", "1e3", "")
})  # fmt: skip

# tokenizer.json: ids, and parts that the library panics on


def in_tokenizer(path: tuple[Any, ...], value: str) -> Row:
    return in_json(model_of, "tokenizer.json", path, value, generate)


IDS = ("-1", "1536", "100000", "10000000", str(2**32 - 1), str(2**32), str(2**63), "0.5", '"5"')
PANICS = {
    "charsmap of garbage": ("normalizer", '{"type":"Precompiled","precompiled_charsmap":"AAAA"}'),
    "charsmap that is a bad trie": (
        "normalizer",
        '{"type":"Precompiled","precompiled_charsmap":"EAAAAAEAAAD/////AAAAAAEAAABhYWE="}',
    ),
    "growth by 1000³": (
        "normalizer",
        json.dumps({
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"String": old}, "content": new * 1000}
                for old, new in ("Hb", "bc", "cd")
            ],
        }),
    ),
    "replacing nothing": (
        "normalizer", '{"type":"Replace","pattern":{"String":""},"content":"x"}',
    ),
    "pieces of no length": ("pre_tokenizer", '{"type":"FixedLength","length":0}'),
    "an expression without end": (
        "pre_tokenizer",
        '{"type":"Split","pattern":{"Regex":"(a+)+$"},"behavior":"Isolated","invert":false}',
    ),
    "an expression that is none": (
        "pre_tokenizer",
        '{"type":"Split","pattern":{"Regex":"(((("},"behavior":"Isolated","invert":false}',
    ),
    "another decoder": ("decoder", '{"type":"Strip","content":"a","start":99999,"stop":99999}'),
    "truncation to nothing": (
        "truncation",
        '{"max_length":0,"strategy":"LongestFirst","stride":5,"direction":"Right"}',
    ),
    "padding to 2^40": (
        "padding",
        '{"strategy":{"Fixed":1099511627776},"direction":"Right","pad_to_multiple_of":null,'
        '"pad_id":0,"pad_type_id":0,"pad_token":"x"}',
    ),
}  # fmt: skip
add("tokenizer", {
    **{f"vocabulary id {each}": in_tokenizer(("model", "vocab", "new"), each) for each in IDS},
    **{f"letter with id {each}": in_tokenizer(("model", "vocab", "H"), each) for each in IDS},
    **{f"added id {each}": in_tokenizer(("added_tokens", 0, "id"), each) for each in IDS},
    **{name: in_tokenizer((key,), value) for name, (key, value) in PANICS.items()},
    **{
        f"model.{key} {name}": in_tokenizer(("model", key), value)
        for key in ("type", "vocab", "merges", "unk_token", "continuing_subword_prefix",
                    "end_of_word_suffix", "byte_fallback", "ignore_merges", "dropout")
        for name, value in VALUES.items()
    },
    **{
        f"{key} {name}": in_tokenizer((key,), value)
        for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder",
                    "version", "model")
        for name, value in OTHERS.items()
    },
    "added token of 200 kB": in_tokenizer(
        ("added_tokens", 0, "content"), json.dumps("<|" + "x" * 200_000 + "|>")
    ),
    "50,000 added tokens": in_tokenizer(("added_tokens",), json.dumps([
        {"id": 1536 + i, "content": f"<|{i}|>", "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True} for i in range(50_000)
    ])),
    "100,000 merges of nothing": in_tokenizer(("model", "merges"), json.dumps(["a b"] * 100_000)),
})  # fmt: skip


def converted(bench: Bench, folder: Path) -> None:
    out = bench.place / "out"
    bench.run("convert", folder, "--mlx-path", out)
    if out.exists():
        generate(bench, out)


add("converted tokenizer", {
    f"{what} {each}": in_json(model_of, "tokenizer.json", path, each, converted)
    for what, path in {
        "vocabulary id": ("model", "vocab", "new"), "letter with id": ("model", "vocab", "H"),
        "added id": ("added_tokens", 0, "id"),
    }.items() for each in IDS
})  # fmt: skip

# Chat templates

LONG = "('a' * 1000000)"
TEMPLATES = {
    "percent": "{{ ('%(' * 60000) % 1 }}",
    **{
        name: f"{{% for i in range(1000) %}}{{{{ {LONG}.{name}('ab' * 500000) }}}}{{% endfor %}}"
        for name in ("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip")
    },
    "hexadecimal": "{% set x = ('f' * 100000)|int(base=16) %}{{ (x ** 9 // x) % 7 }}",
    "carriage returns": "{{ ('\\rx' * 60000)|indent(65000, blank=true) }}",
    "next lines": "{{ ('\\x85x' * 60000)|indent(65000) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "unclosed": "{% for a in messages %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "surrogate": "{{ '\\ud800' }}",
    "a megabyte": "x" * 1_000_000,
    "division by zero": "{{ 1 // 0 }}",
    "raise": "{{ raise_exception('x' * 1000000) }}",
}


def in_template(text: str) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.model)
        (copy / "chat_template.jinja").write_text(text, errors="surrogatepass")
        generate(bench, copy)

    return row


add("template", {name: in_template(text) for name, text in TEMPLATES.items()})

# Headers and indexes


def in_header(header: Any, data: bytes, length: int | None) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.model)
        write_safetensors(copy / "model.safetensors", header, data, length)
        generate(bench, copy)

    return row


def in_index(text: str) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.model)
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
        (copy / "model.safetensors.index.json").write_text(text)
        generate(bench, copy)

    return row


def tensor(name: str, **other: Any) -> tuple[dict[str, Any], bytes, None]:
    return (
        {name: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **other}},
        bytes(64),
        None,
    )


SHARD = "model-1.safetensors"
add("header", {
    **{name: in_header(*each) for name, each in HEADERS.items()},
    "half a surrogate": in_header(
        b'{"\\ud800":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}}', bytes(64), None
    ),
    **{
        f"{key} {name}": in_header(put(tensor("a")[0], ("a", key), value).encode(), bytes(64), None)
        for key in ("dtype", "shape", "data_offsets") for name, value in VALUES.items()
    },
    "a million empty tensors": in_header(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)},
        b"", None,
    ),
})  # fmt: skip
add("index", {
    **{f"file {name}": in_index(json.dumps({"weight_map": {"a": each}}))
       for name, each in FILE_NAMES.items()},
    **{f"weight_map {name}": in_index(put({}, ("weight_map",), value))
       for name, value in OTHERS.items()},
    **{f"whole {name}": in_index(value) for name, value in OTHERS.items()},
    "a million names": in_index(json.dumps({"weight_map": {f"t{i}": SHARD for i in range(10**6)}})),
    "a name of a megabyte": in_index(json.dumps({"weight_map": {"t" * 10**6: SHARD}})),
    "a file name of 312": in_index(json.dumps({"weight_map": {"t": "x" * 300 + ".safetensors"}})),
    "half a surrogate": in_index('{"weight_map": {"\\ud800": "\\ud800.safetensors"}}'),
})  # fmt: skip

# Adapters


def with_adapter(bench: Bench, folder: Path) -> None:
    generate(bench, bench.model, "--adapter-path", folder)


def adapter_of(bench: Bench) -> Path:
    return bench.adapter


def peft_of(bench: Bench) -> Path:
    return bench.peft


def exported(bench: Bench, folder: Path) -> None:
    out = bench.place / "out"
    bench.run("fuse", "--adapter-path", folder, "--save-path", out, "--export", "peft")


MLX_KEYS = (
    ("fine_tune_type",), ("num_layers",), ("lora_parameters",), ("lora_parameters", "rank"),
    ("lora_parameters", "scale"), ("lora_parameters", "dropout"), ("lora_parameters", "keys"),
)  # fmt: skip
PEFT_KEYS = (
    ("r",), ("lora_alpha",), ("target_modules",), ("peft_type",), ("rank_pattern", "down_proj"),
    ("alpha_pattern", "down_proj"), ("rank_pattern",), ("use_rslora",), ("use_dora",), ("bias",),
    ("modules_to_save",), ("fan_in_fan_out",), ("base_model_name_or_path",),
)  # fmt: skip
add("adapter", {
    **{
        f"{'.'.join(path)} {name}": in_json(
            adapter_of, "adapter_config.json", path, value, with_adapter
        )
        for path in MLX_KEYS for name, value in VALUES.items()
    },
    **{
        f"PEFT {'.'.join(path)} {name}": in_json(
            peft_of, "adapter_config.json", path, value, with_adapter
        )
        for path in PEFT_KEYS for name, value in VALUES.items()
    },
    **{
        f"exported, {'.'.join(path)} {name}": in_json(
            adapter_of, "adapter_config.json", path, value, exported
        )
        for path in MLX_KEYS for name, value in NUMBERS.items()
    },
})  # fmt: skip


def in_adapter(header: Any, data: bytes, length: int | None) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.adapter)
        write_safetensors(copy / "adapters.safetensors", header, data, length)
        with_adapter(bench, copy)

    return row


Arrays = dict[str, mx.array]
ARRAYS: dict[str, Callable[[Arrays], Arrays]] = {
    "none": lambda old: {},
    "another": lambda old: {**old, "x": mx.zeros((2, 2))},
    "other names": lambda old: {f"x.{k}": v for k, v in old.items()},
    "other shapes": lambda old: {k: mx.zeros((3, 5)) for k in old},
    "other types": lambda old: {k: mx.zeros(v.shape, mx.int32) for k, v in old.items()},
    "numbers that are none": lambda old: {k: mx.full(v.shape, float("nan"))
                                          for k, v in old.items()},
    "one fewer": lambda old: dict(list(old.items())[1:]),
    "names of paths": lambda old: {f"{k}.0.1": v for k, v in old.items()},
    "names of 5 kB": lambda old: {f"{k}.{'x' * 5000}": v for k, v in old.items()},
    "no dimensions": lambda old: {k: mx.array(1.0) for k in old},
    "no rows": lambda old: {k: mx.zeros((0, *v.shape[1:])) for k, v in old.items()},
    "20,000 more": lambda old: {**old, **{f"x{i}": mx.zeros(1) for i in range(20_000)}},
}  # fmt: skip


def rewritten(path: Path, change: Callable[[Arrays], Arrays]) -> None:
    """Put other arrays into a file."""
    before = mx.load(str(path))
    assert isinstance(before, dict)
    mx.eval(before)
    mx.save_safetensors(str(path), change(before), {"format": "mlx"})


def in_weights(folder: Callable[[Bench], Path], file: str, change: Callable[[Path], Any]) -> Row:
    """An adapter with other weights, which is tried and then exported."""

    def row(bench: Bench) -> None:
        copy = bench.copied(folder(bench))
        change(copy / file)
        with_adapter(bench, copy)
        bench.run(*("fuse", "--model", bench.model, "--adapter-path", copy),
                  *("--save-path", bench.place / "out", "--export", "mlx-lm"))  # fmt: skip

    return row


add("adapter weights", {
    **{name: in_adapter(*each) for name, each in HEADERS.items()},
    **{f"PEFT, header {name}": in_weights(peft_of, "adapter_model.safetensors",
        lambda path, each=each: write_safetensors(path, *each))  # type: ignore[misc]
       for name, each in HEADERS.items()},
    **{f"{what}, {name}": in_weights(folder, file,
        lambda path, change=change: rewritten(path, change))  # type: ignore[misc]
       for what, folder, file in (("PEFT", peft_of, "adapter_model.safetensors"),
                                  ("mlx-lm", adapter_of, "adapters.safetensors"))
       for name, change in ARRAYS.items()},
})  # fmt: skip

# Recipes and settings


def in_recipe(text: str) -> Row:
    def row(bench: Bench) -> None:
        file = bench.place / "r.toml"
        file.write_text(text)
        out = bench.place / "out"
        bench.run("convert", bench.model, "--mlx-path", out, "--recipe", file)

    return row


TOML = {
    "too large for a float": "1" + "0" * 400,
    "of 5,000 digits": "1" * 5000,
    "1e-320": "1e-320",
    "infinity": "inf",
    "not a number": "nan",
    "zero": "0",
    "minus one": "-1",
    "a half": "0.5",
    "2^63": str(2**63),
    "true": "true",
    "words": '"x"',
    "a megabyte": '"' + "x" * 1_000_000 + '"',
    "a date": "1979-05-27T07:32:00Z",
    "a bad date": "1979-99-99",
    "a list": "[1, 2]",
    "a table": "{a = 1}",
    "nested deeply": "[" * 5000 + "]" * 5000,
    "tables nested deeply": "{a=" * 3000 + "1" + "}" * 3000,
    "a dotted key of 40 kB": "{" + ".".join(["a"] * 20_000) + " = 1}",
}
RECIPE = 'bits = 4\ngroup_size = 32\n[[layers]]\nmatch = "*.down_proj"\n'
add("recipe", {
    **{f"bits {name}": in_recipe(f"bits = {value}\ngroup_size = 32\n")
       for name, value in TOML.items()},
    **{f"group_size {name}": in_recipe(f"bits = 4\ngroup_size = {value}\n")
       for name, value in TOML.items()},
    **{f"mode {name}": in_recipe(f"bits = 4\nmode = {value}\n") for name, value in TOML.items()},
    **{f"layers {name}": in_recipe(f"bits = 4\nlayers = {value}\n")
       for name, value in TOML.items()},
    **{f"rule's {key} {name}": in_recipe(f'{RECIPE}{key} = {value}\n')
       for key in ("bits", "ends", "group_size", "mode") for name, value in TOML.items()},
    "100,000 rules": in_recipe(
        "bits = 4\ngroup_size = 32\n" + '[[layers]]\nmatch = "*.x"\nbits = 8\n' * 100_000
    ),
    "a key twice": in_recipe("bits = 4\nbits = 8\n"),
    "deep tables": in_recipe("\n".join(f"[{'.'.join(['a'] * i)}]" for i in range(1, 900))),
    "dotted keys of 40 kB": in_recipe(f"{'.'.join(['a'] * 20_000)} = 1\n"),
    "quadratic dots": in_recipe("".join(f"{'.'.join(['a'] * 400)}.b{i} = 1\n" for i in range(500))),
    "no TOML": in_recipe("= = ="),
    "NUL": in_recipe("bits = 4\0"),
})  # fmt: skip


def in_settings(text: str, suffix: str) -> Row:
    def row(bench: Bench) -> None:
        file = bench.place / f"s.{suffix}"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        check(bench, "--config", file, "--data", bench.rows)

    return row


YAML = {
    **{name: value for name, value in TOML.items() if "date" not in name},
    "a date": "2001-12-14t21:59:43.10-05:00",
    "a bad date": "2001-99-99",
    "a bad time": "2001-12-14t99:99:99",
    "sexagesimal": "190:20:30",
    "sexagesimal too large": ":".join(["59"] * 300),
    "a float of base 60": ":".join(["59"] * 300) + ".5",
    "binary": "!!binary aGVsbG8",
    "bad binary": "!!binary x",
    "hexadecimal": "0x" + "f" * 5000,
    "octal": "0" + "7" * 5000,
    "binary digits": "0b" + "1" * 50_000,
    "a timestamp": "!!timestamp x",
    "an int of words": "!!int x",
    "a float of words": "!!float x",
    "a bool of words": "!!bool x",
    "a set": "!!set {a, b}",
    "pairs": "!!pairs [a: b]",
    "an object": "!!python/object/apply:os.system [true]",
    "a name": "!!python/name:os.system",
    "an unknown tag": "!x y",
    "an alias": "*nowhere",
    "itself": "&a [*a]",
    "laughs": "[&a [x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b], "
    "&d [*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e]]",
    "a merge": "{<<: 1}",
    "a list as key": "{[1]: 2}",
    "a table as key": "{{a: 1}: 2}",
    "half a surrogate": '"\\ud800"',
    "NUL": '"\\0"',
    "underscores": "1_0" * 2000,
}
SETTINGS_KEYS = ("iters", "learning_rate", "rank", "scale", "layers", "model", "schedule", "epochs",
                 "dropout", "targets", "data", "seed", "mapping", "report_to")  # fmt: skip
add("settings", {
    **{f"{key} {name} in YAML": in_settings(f"{key}: {value}\n", "yaml")
       for key in SETTINGS_KEYS for name, value in YAML.items()},
    **{f"{key} {name} in TOML": in_settings(f"{key} = {value}\n", "toml")
       for key in SETTINGS_KEYS for name, value in TOML.items()},
    **{f"mlx-lm's {key} {name}": in_settings(f"{key}: {value}\n", "yaml")
       for key in ("lora_parameters", "optimizer_config", "lr_schedule", "num_layers", "batch_size")
       for name, value in YAML.items()},
    "deep YAML": in_settings("a: " + "[" * 100_000, "yaml"),
    "deep blocks": in_settings("\n".join(" " * i + "a:" for i in range(2000)), "yaml"),
    "a key twice": in_settings("iters: 1\niters: 2\n", "yaml"),
    "a list": in_settings("- 1\n", "yaml"),
    "two documents": in_settings("iters: 1\n---\niters: 2\n", "yaml"),
    "no UTF-8": in_settings("iters: \ud800\n", "yaml"),
    "100,000 keys": in_settings("".join(f"k{i}: 1\n" for i in range(100_000)), "yaml"),
})  # fmt: skip

# Data


def in_data(data: Callable[[], bytes], suffix: str) -> Row:
    def row(bench: Bench) -> None:
        file = bench.place / f"d.{suffix}"
        file.write_bytes(data())
        check(bench, "--data", file)

    return row


def line(text: str) -> Callable[[], bytes]:
    good = '{"prompt": "a", "completion": "b"}\n'
    return lambda: (good * 2 + text + "\n" + good).encode("utf-8", "surrogatepass")


def turns(count: int, **more: Any) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": "a", **more} for i in range(count)]
    return json.dumps({"messages": messages})


MESSAGE_KEYS = ("role", "content", "weight", "tool_calls", "reasoning_content", "name")


def in_message(key: str, value: str) -> str:
    told = {"role": "user", "content": "a"}
    return put({"messages": [told, {"role": "assistant", "content": "b"}]},
               ("messages", 1, key), value)  # fmt: skip


def table(columns: int, rows: int = 2) -> bytes:
    names = ["prompt", "completion", *(f"c{i}" for i in range(columns))]
    out = io.StringIO()
    writer = csv.writer(out)
    for row in [names, *([["a"] * len(names)] * rows)]:
        writer.writerow(row)
    return out.getvalue().encode()


def parquet(make: Callable[[Any], Any]) -> Callable[[], bytes]:
    def data() -> bytes:
        pyarrow = importlib.import_module("pyarrow")
        writer = importlib.import_module("pyarrow.parquet")
        out = io.BytesIO()
        writer.write_table(pyarrow.table(make(pyarrow)), out)
        return out.getvalue()

    return data


def spoiled(data: Callable[[], bytes], at: float, change: str) -> Callable[[], bytes]:
    """Cut at a part of the length, or with eight bytes there turned into others."""

    def changed() -> bytes:
        whole = data()
        place = int(len(whole) * at)
        if change == "cut":
            return whole[:place]
        return whole[:place] + b"\xff\x00\xff\x7f\x80\xff\xff\xff" + whole[place + 8 :]

    return changed


def conversations(count: int) -> str:
    """A row of so many turns in ShareGPT's form."""
    said = [{"from": ("human", "gpt")[i % 2], "value": "a"} for i in range(count)]
    return json.dumps({"conversations": said})


# The mask of its loss takes the square of its turns: 10 to 20 s of CPU, by the machine.
LONGEST = (
    {"10,000 conversations": in_data(line(conversations(10_000)), "jsonl")} if EVERYTHING else {}
)
PARQUET = parquet(lambda pa: {"prompt": ["a"] * 3, "completion": ["b"] * 3})
add("jsonl", {
    **{f"{key} {name}": in_data(line(in_message(key, value)), "jsonl")
       for key in MESSAGE_KEYS for name, value in VALUES.items()},
    **{f"{key} {name}": in_data(line(put({"prompt": "a", "completion": "b"}, (key,), value)),
                                "jsonl")
       for key in ("prompt", "messages", "text", "conversations")
       for name, value in OTHERS.items()},
    **{f"row {name}": in_data(line(value), "jsonl") for name, value in VALUES.items()},
    "10,000 messages": in_data(line(turns(10_000)), "jsonl"),
    "4,000 turns": in_data(line(conversations(4_000)), "jsonl"),
    **LONGEST,
    "faults of 1 kB": in_data(
        lambda: b"".join(b'{"%s": %d}\n' % (b"x" * 1000, i) for i in range(100)), "jsonl"),
    "keys of 1 kB": in_data(
        lambda: b"".join(json.dumps({f"{j} {'x' * 1000}": i for j in range(50)}).encode() + b"\n"
                         for i in range(100)), "jsonl"),
    "a role of 100 kB": in_data(line(turns(2, role="x" * 100_000)), "jsonl"),
    "a line of 50 MB": in_data(line(json.dumps({"text": "ab " * 17_000_000})), "jsonl"),
    "a word of 1 MB": in_data(line(json.dumps({"text": "a" * 1_000_000})), "jsonl"),
    "spaces of 1 MB": in_data(line(json.dumps({"text": " " * 1_000_000})), "jsonl"),
    "a key twice": in_data(line('{"prompt": "a", "prompt": "c", "completion": "b"}'), "jsonl"),
    "100,000 lines of nothing": in_data(lambda: b"\n" * 100_000, "jsonl"),
    "no UTF-8": in_data(lambda: b'{"text": "\xff"}\n', "jsonl"),
    "UTF-16": in_data(lambda: '{"text": "a"}\n'.encode("utf-16"), "jsonl"),
})  # fmt: skip
add("json", {f"whole {name}": in_data(value.encode, "json") for name, value in VALUES.items()})
add("csv", {
    "20,000 columns": in_data(lambda: table(20_000), "csv"),
    "100,000 columns": in_data(lambda: table(100_000), "csv"),
    "a field of 4 MB": in_data(lambda: b"prompt,completion\n" + b"a" * 4_000_000 + b",b\n", "csv"),
    "an open quote": in_data(lambda: b'prompt,completion\n"a' + b"x\n" * 500_000, "csv"),
    "NUL": in_data(lambda: b"prompt,completion\na\0,b\n", "csv"),
    "names twice": in_data(lambda: b"prompt,prompt,completion\na,b,c\n", "csv"),
    "no names": in_data(lambda: b",,,\n,,,\n", "csv"),
    "no UTF-8": in_data(lambda: b"prompt,completion\n\xff,b\n", "csv"),
    "a name of a megabyte": in_data(lambda: b"x" * 1_000_000 + b",b\n1,2\n", "csv"),
    "ragged": in_data(lambda: b"prompt,completion\na\na,b,c,d\n", "csv"),
})  # fmt: skip
add("parquet", {
    **{f"{change} at {at}": in_data(spoiled(PARQUET, at, change), "parquet")
       for change in ("cut", "spoiled") for at in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)},
    "300,000 nulls": in_data(parquet(lambda pa: {"text": pa.nulls(300_000)}), "parquet"),
    "durations": in_data(
        parquet(lambda pa: {"text": pa.array([2**62], pa.duration("s"))}), "parquet"),
    "dates beyond all": in_data(
        parquet(lambda pa: {"text": pa.array([2**62], pa.timestamp("us"))}), "parquet"),
    "bytes": in_data(parquet(lambda pa: {"text": pa.array([b"\xff\xfe"])}), "parquet"),
    "no UTF-8": in_data(
        parquet(lambda pa: {"text": pa.Array.from_buffers(pa.string(), 1, [
            None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")])}), "parquet"),
    "one text 20,000 times": in_data(
        parquet(lambda pa: {"text": ["a" * 100] * 20_000}), "parquet"),
    "5,000 columns": in_data(parquet(lambda pa: {f"c{i}": ["a"] for i in range(5000)}), "parquet"),
    "decimals": in_data(
        parquet(lambda pa: {"text": pa.array([10**37], pa.decimal128(38, 0))}), "parquet"),
})  # fmt: skip

# Sessions


def in_session(text: Callable[[Bench], str]) -> Row:
    def row(bench: Bench) -> None:
        file = bench.place / "s.json"
        file.write_text(text(bench))
        Conversation.load(file)

    return row


def session_value(path: tuple[Any, ...], value: str) -> Row:
    return in_session(lambda bench: put(bench.session, path, value))


SESSION_PATHS = (
    ("format",), ("version",), ("model",), ("messages",), ("settings",), ("tools",),
    ("settings", "temperature"), ("settings", "seed"), ("settings", "max_tokens"),
    ("settings", "top_k"), ("messages", 0, "role"), ("messages", 0, "content"), ("messages", 0),
    ("messages", 1, "tool_calls"),
)  # fmt: skip
PART = {"type": "image", "path": "/nowhere.png", "sha256": "0" * 64}
add("session", {
    **{f"{'.'.join(map(str, path))} {name}": session_value(path, value)
       for path in SESSION_PATHS for name, value in VALUES.items()},
    **{f"attachment's {key} {name}": session_value(
        ("messages", 0, "content"), "[" + put(PART, (key,), value) + "]")
       for key in ("type", "path", "sha256", "frames") for name, value in VALUES.items()},
    **{f"whole {name}": in_session(lambda bench, value=value: value)  # type: ignore[misc]
       for name, value in VALUES.items()},
    "10,000 turns": session_value(("messages",), json.dumps(json.loads(turns(10_000))["messages"])),
    "a key twice": in_session(lambda bench: twice(bench.session, "messages", "[]")),
    "10,000 attachments": session_value(("messages", 0, "content"), json.dumps([PART] * 10_000)),
})  # fmt: skip

# Runs to go on with


def run_of(bench: Bench) -> Path:
    return bench.trained


def in_run(file: str, change: Callable[[Path], Any]) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.trained)
        change(copy / file)
        resume(bench, copy)

    return row


def arrays(change: Callable[[Arrays], Arrays]) -> Callable[[Path], None]:
    """Other arrays in a file, whose size the manifest then has."""

    def changed(path: Path) -> None:
        rewritten(path, change)
        sized(path)

    return changed


def sized(path: Path) -> None:
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = path.stat().st_size
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def headed(header: Any, data: bytes, length: int | None) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        write_safetensors(path, header, data, length)
        sized(path)

    return changed


FIRST = "checkpoints/step-0000001"
RUN_PATHS = (
    ("format",), ("phimlx",), ("settings",), ("model",), ("data",), ("data", "train"),
    ("machines",), ("settings", "iters"), ("settings", "rank"), ("settings", "data"),
    ("settings", "learning_rate"), ("settings", "model"), ("ended",),
)  # fmt: skip
STATE_PATHS = (
    ("format",), ("step",), ("files",), ("files", "adapters.safetensors"), ("state",),
    *((("state", key)) for key in ("step", "best_step", "best_loss", "stale", "seconds", "ending",
                                   "window", "another")),
    *((("state", "window", key)) for key in ("steps", "weighted", "weight", "metrics")),
)  # fmt: skip
LOG_KEYS = ("kind", "step", "loss", "seconds")
add("run", {
    **{f"run.json {'.'.join(path)} {name}": in_json(run_of, "run.json", path, value, resume)
       for path in RUN_PATHS for name, value in VALUES.items()},
    **{f"manifest {'.'.join(path)} {name}": in_json(
        run_of, f"{FIRST}/manifest.json", path, value, resume)
       for path in STATE_PATHS for name, value in VALUES.items()},
    **{f"log's {key} {name}": in_run("log.jsonl", lambda path, key=key, value=value:  # type: ignore[misc]
        path.write_text(put({"kind": "train", "step": 1, "loss": 1.0}, (key,), value) + "\n"))
       for key in LOG_KEYS for name, value in VALUES.items()},
    **{f"log of {name}": in_run("log.jsonl", lambda path, value=value:  # type: ignore[misc]
        path.write_text(value + "\n")) for name, value in VALUES.items()},
    **{f"{file}, header {name}": in_run(f"{FIRST}/{file}", headed(*each))
       for file in ("adapters.safetensors", "optimizer.safetensors")
       for name, each in HEADERS.items()},
    **{f"{file}, {name}": in_run(f"{FIRST}/{file}", arrays(change))
       for file in ("adapters.safetensors", "optimizer.safetensors")
       for name, change in ARRAYS.items()},
})  # fmt: skip

# Records of downloads


def recorded(bench: Bench, folder: Path) -> None:
    bench.run("download", folder)
    bench.run("show", folder)


RECORD = {
    "repository": "someone/tune", "revision": "main", "commit": "0" * 40,
    "files": {"config.json": {"size": 3, "hash": "0" * 40}},
}  # fmt: skip


def in_record(text: str) -> Row:
    def row(bench: Bench) -> None:
        copy = bench.copied(bench.model)
        place = copy / ".cache" / "phimlx" / "download.json"
        place.parent.mkdir(parents=True)
        place.write_text(text)
        recorded(bench, copy)

    return row


RECORD_PATHS = (
    ("repository",), ("commit",), ("files",), ("files", "config.json"),
    ("files", "config.json", "size"), ("files", "config.json", "hash"),
)  # fmt: skip
add("download.json", {
    **{f"{'.'.join(path)} {name}": in_record(put(RECORD, path, value))
       for path in RECORD_PATHS for name, value in VALUES.items()},
    **{f"file named {name[:40]!a}": in_record(
        put(RECORD, ("files", name), '{"size": 1, "hash": "00"}'))
       for name in ("../x", "/etc/passwd", "", ".", "a\0b", "x" * 300, "\ud800", "a/" * 3000)},
    **{f"whole {name}": in_record(value) for name, value in VALUES.items()},
})  # fmt: skip

# Pictures, sounds and videos


def in_media(act: Callable[[Any], Any], data: Callable[[], bytes]) -> Row:
    return lambda bench: act(data())


def picture(kind: str, size: tuple[int, int] = (40, 30)) -> Callable[[], bytes]:
    def data() -> bytes:
        from PIL import Image

        out = io.BytesIO()
        Image.effect_noise(size, 50).convert("RGB").save(out, kind)
        return out.getvalue()

    return data


def sound(kind: str) -> Callable[[], bytes]:
    def data() -> bytes:
        from tests.media.sounds import noise, sound_file

        return sound_file(noise(0.5), 16000, kind)

    return data


def made_by_av(kind: str) -> Callable[[], bytes]:
    def data() -> bytes:
        from tests.media.sounds import av_sound, av_video, noise

        sounds = {"m4a": ("ipod", "aac"), "adts": ("adts", "aac"), "mka": ("matroska", "aac")}
        if kind in sounds:
            return av_sound(noise(0.5), 16000, *sounds[kind])
        return av_video(20, kind)

    return data


def look(data: bytes) -> None:
    load_image(data).load()


def listen(data: bytes) -> None:
    with open_audio(data) as stream:
        for _ in stream.blocks:
            pass


def watch(data: bytes) -> None:
    read_video(data, 4)


PLACES = (0, 0.01, 0.05, 0.1, 0.3, 0.6, 0.9, 0.99)
MEDIA = {
    **{kind: (look, picture(kind)) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")},
    **{kind: (listen, sound(kind)) for kind in (
        "WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64", "NIST", "SDS", "VOC",
        "AVR", "MPC2K", "MAT4", "MAT5", "WVE", "PAF", "SVX", "IRCAM", "PVF", "XI", "HTK")},
    **{kind: (listen, made_by_av(kind)) for kind in ("m4a", "adts", "mka")},
    **{kind: (watch, made_by_av(kind)) for kind in ("mp4", "mov", "matroska", "avi", "mpegts")},
}  # fmt: skip
add("media", {
    f"{kind} {change} at {at}": in_media(act, spoiled(data, at, change))
    for kind, (act, data) in MEDIA.items() for change in ("cut", "spoiled") for at in PLACES
})  # fmt: skip

# Things that are no files, in the place of files


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def locked(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


def socketed(path: Path) -> None:
    here = os.getcwd()
    with socket.socket(socket.AF_UNIX) as bound:
        os.chdir(path.parent)
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


THINGS: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a socket": socketed,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "1 TB of nothing": sparse,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "an empty file": Path.touch,
    "a file of NUL": lambda path: path.write_bytes(bytes(10_000)),
    "a file that nobody may read": locked,
}


def instead(
    folder: Callable[[Bench], Path], file: str, act: Callable[[Bench, Path], Any]
) -> Callable[[Callable[[Path], Any]], Row]:
    """Something in the place of a file of a copied folder."""

    def of(make: Callable[[Path], Any]) -> Row:
        def row(bench: Bench) -> None:
            copy = bench.copied(folder(bench))
            (copy / file).unlink(missing_ok=True)
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            make(copy / file)
            act(bench, copy)

        return row

    return of


def alone(name: str, act: Callable[[Bench, Path], Any]) -> Callable[[Callable[[Path], Any]], Row]:
    """Something under a name of its own."""

    def of(make: Callable[[Path], Any]) -> Row:
        def row(bench: Bench) -> None:
            make(bench.place / name)
            act(bench, bench.place / name)

        return row

    return of


def with_index(bench: Bench, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    generate(bench, copy)


IN_PLACE = {
    **{file: instead(model_of, file, generate) for file in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "model.safetensors", "model-2.safetensors")},
    "index": instead(model_of, "model.safetensors.index.json", with_index),
    "download.json": instead(model_of, ".cache/phimlx/download.json", recorded),
    **{file: instead(adapter_of, file, with_adapter)
       for file in ("adapter_config.json", "adapters.safetensors")},
    **{f"PEFT {file}": instead(peft_of, file, with_adapter)
       for file in ("adapter_config.json", "adapter_model.safetensors")},
    **{file: instead(run_of, file, resume) for file in (
        "run.json", "log.jsonl", f"{FIRST}/manifest.json", f"{FIRST}/adapters.safetensors",
        f"{FIRST}/optimizer.safetensors")},
    "recipe": alone("r.toml", lambda bench, path: bench.run(
        "convert", bench.model, "--mlx-path", bench.place / "out", "--recipe", path)),
    "settings.yaml": alone("s.yaml", lambda bench, path: check(
        bench, "--config", path, "--data", bench.rows)),
    "settings.toml": alone("s.toml", lambda bench, path: check(
        bench, "--config", path, "--data", bench.rows)),
    **{f"data.{suffix}": alone(f"d.{suffix}", lambda bench, path: check(bench, "--data", path))
       for suffix in ("jsonl", "json", "csv", "tsv", "parquet")},
    **{f"data to evaluate on, {suffix}": alone(f"d.{suffix}", lambda bench, path: bench.run(
        "evaluate", "--model", bench.model, "--data", path)) for suffix in ("jsonl", "txt")},
    "session": alone("s.json", lambda bench, path: Conversation.load(path)),
    "model": alone("m", lambda bench, path: generate(bench, path)),
    "adapter": alone("a", lambda bench, path: with_adapter(bench, path)),
    "calibration": alone("c.txt", lambda bench, path: bench.run(
        "convert", bench.model, "--mlx-path", bench.place / "out", "-q", "--q-group-size", "32",
        "--q-method", "gptq", "--calibration", path)),
    "picture": alone("p.png", lambda bench, path: load_image(path).load()),
    "sound": alone("s.wav", lambda bench, path: listen(path)),  # type: ignore[arg-type]
    "video": alone("v.mp4", lambda bench, path: watch(path)),  # type: ignore[arg-type]
}  # fmt: skip
add("place", {
    f"{what} as {name}": of(make)
    for name, of in IN_PLACE.items() for what, make in THINGS.items()
})  # fmt: skip


def kinds() -> Iterator[str]:
    """The kinds, each once."""
    yield from dict.fromkeys(name.partition(":")[0] for name in ROWS)
