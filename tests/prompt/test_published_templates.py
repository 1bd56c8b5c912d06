"""Published prompt forms: their texts as cards and repositories show them, and which is whose."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from phimlx.errors import PromptError
from phimlx.prompt.chat_template import ChatTemplate
from phimlx.prompt.published_templates import (
    BY_NAME,
    KNOWN,
    PUBLISHED,
    folder_templates,
    is_known,
    named_template,
    published_template,
)
from phimlx.prompt.sandbox.environment import Template
from phimlx.prompt.sandbox.isolated import IsolatedTemplate
from phimlx.prompt.tokenizer.tokenizer import Tokenizer
from tests.prompt.conftest import MINI_TOKENS, Make, spelled

IM = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
PHI3 = (
    "<unk>",
    "<s>",
    "</s>",
    "<|endoftext|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<|user|>",
)
BASE = ("<|endoftext|>",)


def chat(make_folder: Make, tokens: Sequence[str], **options: Any) -> ChatTemplate:
    """A template for tokens that swallow no white space, so that all of it is seen."""
    folder = make_folder(
        [{"content": token, "lstrip": False, "rstrip": False, "normalized": False}
         for token in tokens],
        {"bos_token": "<s>"},
    )  # fmt: skip
    return ChatTemplate.load(folder, Tokenizer.load(folder), **options)


def said(*turns: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turn."""
    return [
        {"role": ("user", "assistant")[index % 2], "content": turn}
        for index, turn in enumerate(turns)
    ]


# The examples of the cards: microsoft/phi-2, phi-1_5, Phi-3-mini-4k-instruct.
LIGHTHOUSE = "Write a detailed analogy between mathematics and a lighthouse."
FOCUS = (
    "I don't know why, I'm struggling to maintain focus while studying. Any suggestions?",
    "Well, have you tried creating a study schedule and sticking to it?",
    "Yes, I have, but it doesn't seem to help much.",
    "Hmm, maybe you should try studying in a quiet environment, like the library.",
)
PRIMES = 'def print_prime(n):\n   """\n   Print all primes between 1 and n\n   """\n'


@pytest.mark.parametrize(
    ("form", "turns", "text"),
    [
        ("phi-2", [LIGHTHOUSE], f"Instruct: {LIGHTHOUSE}\nOutput:"),
        ("phi-2", ["a", " b", "c"], "Instruct: a\nOutput: b\nInstruct: c\nOutput:"),
        ("phi-2-chat", FOCUS[:1], f"Alice: {FOCUS[0]}\nBob:"),
        ("phi-2-chat", FOCUS[:3],
         f"Alice: {FOCUS[0]}\nBob: {FOCUS[1]}\nAlice: {FOCUS[2]}\nBob:"),
        ("phi-1.5", [LIGHTHOUSE], f"{LIGHTHOUSE}\n\nAnswer:"),
        ("phi-1.5", ["a", "b\n", "c"], "a\n\nAnswer: b\n\nc\n\nAnswer:"),
        ("phi-1.5-chat", FOCUS[:3],
         f"Alice: {FOCUS[0]}\n\nBob: {FOCUS[1]}\n\nAlice: {FOCUS[2]}\n\nBob:"),
        ("completion", [PRIMES], PRIMES),
        ("completion", [PRIMES, "   primes = []\n", "   for"],
         PRIMES + "   primes = []\n   for"),
    ],
)  # fmt: skip
def test_base_models_are_asked_as_their_cards_say(
    make_folder: Make, form: str, turns: list[str], text: str
) -> None:
    template = chat(make_folder, BASE, form=form)
    assert spelled(template, said(*turns)) == text
    assert template.stop == BY_NAME[form].stop
    for stop in template.stop:  # a reply ends where the next turn would begin
        followed = spelled(template, said(*turns, "Reply.", "More?"))
        assert any(stop in followed[len(text) :] for stop in template.stop), stop


@pytest.mark.parametrize("form", ["phi-2", "phi-2-chat", "phi-1.5", "phi-1.5-chat", "completion"])
def test_a_whole_text_of_a_base_model_begins_as_its_prompt(make_folder: Make, form: str) -> None:
    template = chat(make_folder, BASE, form=form)
    prompt = spelled(template, said("a"))
    whole = spelled(template, said("a", " b "), add_generation_prompt=False)
    reply = " b " if form == "completion" else " b"
    assert whole == f"{prompt}{reply}<|endoftext|>"


def test_base_models_have_no_place_for_a_system_message(make_folder: Make) -> None:
    with pytest.raises(PromptError) as error:
        chat(make_folder, BASE, form="phi-2").encode(
            [{"role": "system", "content": "Be kind."}, *said("a")]
        )
    assert str(error.value) == (
        "messages[0] would be left out: the model's chat template has no place for the role "
        "system there."
    )


def test_text_of_a_user_is_no_end_of_text(make_folder: Make) -> None:
    ids = chat(make_folder, BASE, form="completion").encode(said("a<|endoftext|>"))
    assert max(ids) < 258


SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
TURN = "<|user|>\nHi<|end|>\n"


@pytest.mark.parametrize(
    ("name", "system", "text"),
    [
        ("Phi-3-mini-4k-instruct", True,
         f"<|system|>\nYou are a helpful assistant.<|end|>\n{TURN}<|assistant|>\n"),
        ("Phi-3.5-mini-instruct", True,
         f"<|system|>\nYou are a helpful assistant.<|end|>\n{TURN}<|assistant|>\n"),
        ("Phi-3-medium-128k-instruct", False, f"{TURN}<|assistant|>\n"),
        ("unheard of", False, f"{TURN}<|assistant|>\n"),
    ],
)  # fmt: skip
def test_phi3_by_name(make_folder: Make, name: str, system: bool, text: str) -> None:
    template = chat(make_folder, PHI3, model_name=name)
    messages = said("Hi")
    if system:
        messages = [SYSTEM, *messages]
    assert spelled(template, messages) == text
    assert spelled(template, [*messages, *said("", "Ho")[1:], *messages[-1:]]) == (
        f"{text}Ho<|end|>\n{TURN}<|assistant|>\n"
    )


def test_phi3_medium_has_no_place_for_a_system_message(make_folder: Make) -> None:
    with pytest.raises(PromptError):
        chat(make_folder, PHI3, model_name="phi-3-medium").encode([SYSTEM, *said("Hi")])


def test_phi3_mini_as_first_published(make_folder: Make) -> None:
    template = chat(make_folder, PHI3, form="phi-3-mini-first")
    assert spelled(template, said("Hi")) == f"<s>{TURN}<|assistant|>\n"


@pytest.mark.parametrize(
    ("tokens", "names", "form"),
    [
        (IM, [], "phi-4"),
        (IM, ["phi-4-4bit"], "phi-4"),
        (IM, ["Phi-4-reasoning-plus"], "phi-4-reasoning"),
        ((*IM, "<think>"), ["phi-4"], "phi-4-reasoning"),
        (MINI_TOKENS[:10], [], "phi-4-mini"),
        (MINI_TOKENS[:10], ["x", "microsoft/Phi-4-mini-flash-reasoning"], "phi-4-mini"),
        (MINI_TOKENS[:10], ["x", "microsoft/Phi-4-mini-reasoning"], "phi-4-mini-reasoning"),
        (PHI3, ["phi-3-mini-128k-instruct"], "phi-3-mini"),
        (PHI3, ["microsoft/Phi-3.5-mini-instruct"], "phi-3.5-mini"),
        (PHI3, ["phi-3_5-mini-4bit"], "phi-3.5-mini"),
        (PHI3, ["Phi-3-medium-4k-instruct"], "phi-3-medium"),
        (BASE, ["microsoft/phi-2"], "phi-2"),
        (BASE, ["phi-2-4bit-mlx"], "phi-2"),
        (BASE, ["tiny-phi2"], "phi-2"),
        (BASE, ["microsoft/phi-1_5"], "phi-1.5"),
        (BASE, ["phi-1.5"], "phi-1.5"),
        (BASE, ["tiny-phi15"], "phi-1.5"),
        (BASE, ["phi-1"], "completion"),
        (BASE, ["microsoft/phi-1"], "completion"),
        (BASE, [], None),
        (BASE, ["gpt2"], None),
        ((), ["phi-2"], None),
    ],
)
def test_the_usual_form_of_a_model(
    tokens: Sequence[str], names: list[str], form: str | None
) -> None:
    found = published_template(tokens, names)
    assert (found.name if found else None) == form


def test_forms_are_asked_for_by_name(make_folder: Make) -> None:
    folder = make_folder(BASE, template="x {{ messages[0].content }}")
    tokenizer = Tokenizer.load(folder)
    assert spelled(ChatTemplate.load(folder, tokenizer), said("a")) == "x a"
    assert named_template("phi-2").source == "card of microsoft/phi-2, QA format"
    with pytest.raises(PromptError) as error:
        ChatTemplate.load(folder, tokenizer, form="phi-9")
    assert str(error.value) == "There is no prompt form named 'phi-9'."
    assert error.value.hint == f"Known forms: {', '.join(BY_NAME)}."


def test_forms_say_where_they_were_published() -> None:
    assert len(BY_NAME) == len(PUBLISHED) == len({form.text for form in PUBLISHED})
    for form in PUBLISHED:
        assert re.search(r"microsoft/[Pp]hi-", form.source)


def test_known_templates_alone_are_rendered_here(data: Path, make_folder: Make) -> None:
    published = [
        template
        for folder in (data / "hf").iterdir()
        for template in folder_templates(folder).values()
    ]
    assert len(published) >= 5
    for text in [*published, *(form.text for form in PUBLISHED)]:
        assert is_known(text)
        assert isinstance(chat_of(make_folder, text), Template)
        assert not is_known(text + " ")
        assert isinstance(chat_of(make_folder, text + " "), IsolatedTemplate)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in KNOWN)


def chat_of(make_folder: Make, text: str) -> object:
    folder = make_folder(template=text)
    return ChatTemplate.load(folder, Tokenizer.load(folder))._template("default")


@pytest.mark.parametrize("form", PUBLISHED, ids=lambda form: form.name)
def test_a_known_template_renders_alike_in_the_worker(make_folder: Make, form: Any) -> None:
    messages = said("a", "b", "c")
    variables = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (True, False):
        given = variables | {"add_generation_prompt": prompt}
        assert Template(form.text).render(given) == IsolatedTemplate(form.text).render(given)
