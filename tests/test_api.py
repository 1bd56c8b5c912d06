"""`phimlx.load`, `Phi.generate` and `Phi.stream`, on the bundled model and on one without text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import phimlx
from phimlx.errors import (
    ConfigError,
    GenerationError,
    ModelNotFoundError,
    PhimlxError,
    PromptError,
    TokenizerError,
)
from phimlx.hub.resolve import NANO

TEXTLESS = Path(__file__).parent / "goldens" / "models" / "mini-step-32"
SUM = "What is 3 + 4?"


@pytest.fixture(scope="module")
def phi() -> phimlx.Phi:
    return phimlx.load("nano", dtype="float32")


@pytest.fixture(scope="module")
def textless() -> phimlx.Phi:
    return phimlx.load(TEXTLESS, dtype="float32")


def test_a_question_gets_its_answer(phi: phimlx.Phi) -> None:
    reply = phi.generate(SUM)
    assert reply.text == "7"
    assert reply.finish_reason == "stop"
    assert reply.reasoning is None
    assert reply.tool_calls == []
    assert phi.tokenizer is not None
    assert phi.tokenizer.decode(reply.tokens) == "7<|end|>"
    assert reply.stats.generated_tokens == 2
    assert reply.stats.prompt_tokens == len(phi.encode(SUM))


def test_text_messages_and_ids_are_the_same_prompt(phi: phimlx.Phi) -> None:
    ids = phi.encode([{"role": "user", "content": SUM}])
    rendered = f"<|user|>{SUM}<|end|><|assistant|>"
    assert phi.encode(SUM) == ids == phi.encode(rendered, raw=True)
    answers = [phi.generate(SUM), phi.generate(ids), phi.generate(rendered, raw=True)]
    assert {answer.text for answer in answers} == {"7"}


def test_stream_and_generate_agree(phi: phimlx.Phi) -> None:
    stream = phi.stream(SUM)
    pieces = list(stream)
    assert [piece.token for piece in pieces if piece.token is not None] == stream.reply.tokens
    assert "".join(piece.text for piece in pieces) == stream.reply.text == "7"


def test_length_ends_a_reply(phi: phimlx.Phi) -> None:
    reply = phi.generate(SUM, max_tokens=1)
    assert (reply.finish_reason, len(reply.tokens)) == ("length", 1)


def test_stop_strings_cross_tokens(phi: phimlx.Phi) -> None:
    question = "What is the capital of France?"
    assert phi.generate(question).text == "Paris"
    for stop, text in (("ari", "P"), ("s", "Pari"), ("Paris", ""), ("x", "Paris")):
        reply = phi.generate(question, stop=stop)
        assert (reply.text, reply.finish_reason) == (text, "stop")


def test_closing_early_keeps_what_was_said(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    stream = phi.stream("What is the capital of France?", cache=cache)
    first = next(stream)
    stream.close()
    assert stream.reply.finish_reason == "cancelled"
    assert stream.reply.tokens == [first.token]
    assert phi.generate("What is the capital of France?", cache=cache).text == "Paris"


def test_turns_reuse_the_cache(phi: phimlx.Phi) -> None:
    cache = phi.new_cache()
    messages = [{"role": "user", "content": SUM}]
    reply = phi.generate(messages, cache=cache)
    messages += [
        {"role": "assistant", "content": reply.text},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    following = phi.generate(messages, cache=cache)
    assert following.stats.cached_tokens == reply.stats.prompt_tokens + len(reply.tokens)
    assert following.tokens == phi.generate(messages).tokens


def test_a_tool_call_is_returned(phi: phimlx.Phi) -> None:
    row = next(
        row
        for line in (NANO / "heldout.jsonl").read_text().splitlines()
        if (row := json.loads(line))["kind"] == "tool" and "<|tool_call|>" in row["answer"]
    )
    reply = phi.generate(row["messages"], tools=row["tools"])
    assert reply.finish_reason == "tool_calls"
    assert reply.text == ""
    expected = json.loads(row["answer"].removeprefix("<|tool_call|>").split("<|/tool_call|>")[0])
    assert [vars(call) for call in reply.tool_calls] == expected


def test_a_seed_repeats_a_reply(phi: phimlx.Phi) -> None:
    first = phi.generate("Hello there.", temperature=30, max_tokens=20)
    again = phi.generate("Hello there.", temperature=30, max_tokens=20, seed=first.seed)
    assert again.tokens == first.tokens
    others = {
        tuple(phi.generate("Hello there.", temperature=30, max_tokens=20, seed=seed).tokens)
        for seed in range(5)
    }
    assert len(others) > 1


def test_the_folder_says_how_to_sample(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder)
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    sampling = phimlx.load(folder).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.8, 50, 0.95)
    (folder / "generation_config.json").write_text('{"temperature": -1}')
    phi = phimlx.load(folder)
    assert phi.sampling.temperature == 0
    assert phi.remarks == (
        "generation_config.json: temperature is -1, not 0 or more; it is left out.",
    )


def test_a_first_release_chat_ends_too(tmp_path: Path) -> None:
    """A config that names only <|endoftext|> still ends at the end of a turn."""
    folder = tmp_path / "model"
    shutil.copytree(NANO, folder)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    assert phimlx.load(NANO).tokenizer is not None
    end = phimlx.load(NANO).tokenizer.control_tokens["<|endoftext|>"]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    assert phimlx.load(folder, dtype="float32").generate(SUM).text == "7"


def test_ids_alone_work_without_a_tokenizer(textless: phimlx.Phi) -> None:
    reply = textless.generate([5, 6, 7], max_tokens=4, temperature=0)
    logits = textless.model(mx.array([[5, 6, 7, *reply.tokens]]))
    assert reply.tokens == logits[0, 2:-1].argmax(axis=-1).tolist()
    with pytest.raises(TokenizerError) as error:
        _ = reply.text
    assert str(error.value) == (
        "The model folder holds no tokenizer.json, so the reply has tokens but no text."
    )
    for options in ({"prompt": "Hello"}, {"prompt": [5], "stop": "x"}):
        with pytest.raises(TokenizerError) as error:
            textless.stream(**options)
        assert str(error.value) == (
            f"{TEXTLESS} holds no tokenizer.json, so it takes and gives token ids only."
        )


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "message"),
    [
        ("", {}, PromptError, "The prompt is empty."),
        ([], {}, PromptError, "The prompt is empty."),
        (
            [5, 99999],
            {},
            PromptError,
            "The prompt holds 99999, which is no token of a vocabulary of 256.",
        ),
        ([-1], {}, PromptError, "The prompt holds -1, which is no token of a vocabulary of 256."),
        (
            [True],
            {},
            PromptError,
            "The prompt holds True, which is no token of a vocabulary of 256.",
        ),
        ([5], {"max_tokens": 0}, GenerationError, "max_tokens is 0; it must be 1 or more."),
        ([5], {"max_tokens": "9"}, GenerationError, "max_tokens is '9'; it must be 1 or more."),
        (
            [5] * 1000,
            {"max_tokens": 100},
            GenerationError,
            "The prompt has 1,000 tokens and the reply may have 100: 1,100 together, but "
            "mini-step-32 holds 1,024.",
        ),
        (
            [5] * 1024,
            {},
            GenerationError,
            "The prompt has 1,024 tokens, but mini-step-32 holds 1,024 for prompt and reply "
            "together.",
        ),
        ([5], {"seed": -1}, GenerationError, "seed is -1; it must be a whole number, 0 or more."),
        ([5], {"top_p": 2}, GenerationError, "top_p is 2; it must be above 0 and at most 1."),
    ],
)
def test_requests_that_cannot_be_served(
    textless: phimlx.Phi,
    prompt: object,
    options: dict[str, object],
    kind: type[PhimlxError],
    message: str,
) -> None:
    with pytest.raises(kind) as error:
        textless.stream(prompt, **options)
    assert str(error.value) == message


def test_a_full_context_ends_by_length(textless: phimlx.Phi) -> None:
    reply = textless.generate([5] * 1020, temperature=0)
    assert (len(reply.tokens), reply.finish_reason) == (4, "length")


def test_sources_that_are_not_there() -> None:
    with pytest.raises(ModelNotFoundError):
        phimlx.load("./no-such-folder")
    with pytest.raises(ConfigError) as error:
        phimlx.load("nano", dtype="float8")
    assert str(error.value) == ("dtype is 'float8'; it must be one of float32, float16, bfloat16.")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_answers_too(dtype: str) -> None:
    assert phimlx.load("nano", dtype=dtype).generate(SUM).text == "7"


def test_importing_phimlx_is_light() -> None:
    code = "import phimlx, sys; print(sorted(m for m in sys.modules if '.' not in m))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"mlx", "numpy", "tokenizers", "jinja2", "rich", "huggingface_hub", "transformers"}
    assert not heavy & set(eval(run.stdout))


def test_generation_needs_neither_transformers_nor_mlx_lm() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['transformers', 'mlx_lm', 'torch']));"
        "import phimlx; print(phimlx.load('nano').generate('What is 3 + 4?').text)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "7\n"
