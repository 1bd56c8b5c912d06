"""Prompts of reasoning-vision as the original makes them, and the modes of models that reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import GenerationError, PromptError
from phimlx.generation.options import PromptOptions
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.reasoning import opening
from phimlx.prompt.tokenizer.tokenizer import Tokenizer

Models = dict[str, tuple[Tokenizer, ChatTemplate]]
VISION = "phi-4-reasoning-vision"
IMAGE = -200
MODES = {"hybrid": "auto", "think": "on", "nothink": "off"}


@pytest.fixture(scope="module")
def sees(models: Models) -> ChatTemplate:
    """The published template over phi-4's tokenizer, to which a picture's tag is a token."""
    tokenizer, template = models[VISION]
    return ChatTemplate(
        template._sources,
        tokenizer.extended({"<image>": IMAGE}),
        template._special,
        {"image": IMAGE},
        "\n",
    )


def as_parts(message: dict[str, str], newline: str) -> dict[str, Any]:
    """A golden's message, whose pictures are tags in its text, with pictures as parts."""
    *pictures, text = message["content"].split("<image>\n")
    parts = [{"type": "image", "image": "a.png"} for _ in pictures]
    said = newline + text if pictures else text
    return {"role": message["role"], "content": [*parts, {"type": "text", "text": said}]}


@pytest.mark.parametrize("newline", ["", "\n"])
def test_prompts_are_the_originals(data: Path, sees: ChatTemplate, newline: str) -> None:
    """Each piece between pictures is encoded by itself, with a line's end behind each picture.

    The original drops system messages without a word, which is refused here.
    """
    compared = 0
    for case in json.loads((data / "golden" / "phi4rv_prompts.json").read_text()):
        said = [m for m in case["messages"] if m["role"] != "system"]
        messages = [as_parts(message, newline) for message in said]
        begun = opening(MODES[case["mode"]], sees, VISION)
        expected = case.get("ids_with_phi-4_tokenizer")
        if expected is not None:
            assert sees.encode(messages, opening=begun) == expected
            compared += 1
        assert case["text"].endswith(begun)
    assert compared == 8


def test_what_a_user_writes_is_no_picture(sees: ChatTemplate) -> None:
    said = "<image>\n<|dummy_84|><think>"
    ids = sees.encode([{"role": "user", "content": said}])
    assert IMAGE not in ids
    tokenizer = sees._tokenizer
    assert tokenizer.control_tokens["<|dummy_84|>"] not in ids[-20:]
    assert tokenizer.decode(ids).endswith(
        f"<|im_start|>user<|im_sep|>{said}<|im_end|><|im_start|>assistant<|im_sep|>"
    )


def test_a_person_reads_tags(sees: ChatTemplate) -> None:
    parts = [{"type": "image", "image": "a.png"}] * 2 + [{"type": "text", "text": "Which?"}]
    text = sees.render([{"role": "user", "content": parts}])
    assert "user<|im_sep|><|image_1|>\n<|image_2|>\nWhich?<|im_end|>" in text


def test_a_system_message_would_be_left_out(sees: ChatTemplate) -> None:
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(PromptError, match=r"messages\[0\] would be left out"):
        sees.encode(messages)


def test_replies_are_found_between_generation_tags(sees: ChatTemplate) -> None:
    """What is learned is what inference has to say, mode included."""
    tokenizer = sees._tokenizer
    for begun in ("", "<|dummy_84|>", "<think>Hm.</think>"):
        messages = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": f"{begun}Hello."},
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": f"{begun}Farewell."},
        ]
        encoded = sees.encode_conversation(messages)
        for index in (1, 3):
            start = encoded.prompt_length(index)
            assert start is not None
            assert encoded.ids[:start] == sees.encode(messages[:index])
            said = tokenizer.decode(encoded.ids[start:])
            assert said.startswith(messages[index]["content"] + "<|im_end|>")
    mode = tokenizer.control_tokens["<|dummy_84|>"]
    messages[1]["content"] = "<|dummy_84|>Yes."
    assert mode in sees.encode(messages[:2])[-20:]


@pytest.mark.parametrize(
    ("model", "mode", "expected"),
    [
        (VISION, "auto", ""),
        (VISION, "on", "<think>"),
        (VISION, "off", "<|dummy_84|>"),
        ("phi-4-reasoning", "auto", ""),
        ("phi-4-reasoning", "on", ""),
        ("phi-4-mini-reasoning", "on", ""),
        ("phi-4", "auto", ""),
    ],
)
def test_what_a_reply_begins_with(models: Models, model: str, mode: str, expected: str) -> None:
    assert opening(mode, models[model][1], model) == expected


@pytest.mark.parametrize(
    ("model", "mode", "message", "hint"),
    [
        *(
            (
                model,
                "off",
                f"{model} reasons before every reply: it was not trained to answer without.",
                "phi-4-reasoning-vision does both; phi-4 and phi-4-mini answer at once.",
            )
            for model in ("phi-4-reasoning", "phi-4-mini-reasoning")
        ),
        *(
            (
                model,
                mode,
                f"{model} does not reason, so reasoning cannot be {mode}.",
                "Leave it out, or use a model that reasons, such as phi-4-reasoning.",
            )
            for model in ("phi-4", "phi-4-mini")
            for mode in ("on", "off")
        ),
    ],
)
def test_modes_that_a_model_has_not(
    models: Models, model: str, mode: str, message: str, hint: str
) -> None:
    with pytest.raises(PromptError) as caught:
        opening(mode, models[model][1], model)
    assert (str(caught.value), caught.value.hint) == (message, hint)


@pytest.mark.parametrize("mode", ["ON", "", None, True, 3])
def test_no_mode(mode: Any) -> None:
    with pytest.raises(GenerationError, match="it must be one of auto, on, off"):
        PromptOptions(reasoning=mode)
