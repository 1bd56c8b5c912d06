"""Prompt forms as they were published, and where a model folder keeps a template of its own.

A folder's own template wins over a published one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from phimlx.errors import PromptError, TokenizerError, shortened
from phimlx.files import read_json, read_text

# microsoft/phi-4, tokenizer_config.json.
PHI4 = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'system') %}"
    "{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# microsoft/Phi-4-reasoning and -plus, as quoted in public copies of the model card and template: a
# fixed system prompt before the user's and the assistant's turns, no place for another.
REASONING = (
    "<|im_start|>system<|im_sep|>"
    "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant "
    "involves thoroughly exploring questions through a systematic thinking process before "
    "providing the final precise and accurate solutions. This requires engaging in a "
    "comprehensive cycle of analysis, summarizing, exploration, reassessment, reflection, "
    "backtracing, and iteration to develop well-considered thinking process. Please structure "
    "your response into two main sections: Thought and Solution using the specified format: "
    "<think> {Thought section} </think> {Solution section}. In the Thought section, detail your "
    "reasoning process in steps. Each step should include detailed considerations such as "
    "analysing questions, summarizing relevant findings, brainstorming new ideas, verifying the "
    "accuracy of the current steps, refining any errors, and revisiting previous steps. In the "
    "Solution section, based on various attempts, explorations, and reflections from the Thought "
    "section, systematically present the final solution that you deem correct. The Solution "
    "section should be logical, accurate, and concise and detail necessary steps needed to reach "
    "the conclusion. Now, try to solve the following question through the above guidelines:"
    "<|im_end|>"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') %}"
    "{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{'<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# microsoft/Phi-4-mini-instruct and Phi-4-multimodal-instruct, tokenizer_config.json.
MINI = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + "
    "'<|/tool|>' + '<|end|>' }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

# microsoft/Phi-4-mini-reasoning, chat_template.jinja.
MINI_REASONING = (
    "{{ '<|system|>Your name is Phi, an AI math expert developed by Microsoft.' }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    " {{ message['content'] }}"
    "{% if 'tools' in message and message['tools'] is not none %}"
    "{{ '<|tool|>' + message['tools'] + '<|/tool|>' }}{% endif %}"
    "{% endif %}{% endfor %}{{ '<|end|>' }}"
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)

# Phi-3-mini since July 2024: tokenizer_config.json, as microsoft/onnxruntime-extensions quotes it.
PHI3 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}"
    "{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# Phi-3.5-mini: the same, but a system message without content is left out.
PHI35 = PHI3.replace("== 'system' %}", "== 'system' and message['content'] %}")

# Phi-3-medium, same source: no place for a system message.
PHI3_MEDIUM = (
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\\n' + message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}"
    "{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\\n'}}"
    "{% endif %}{% endfor %}"
)

# Phi-3-mini as first published, in April 2024; no place for a system message.
PHI3_FIRST = "{{ bos_token }}" + PHI3_MEDIUM

# The base models have no template: these write the forms of their cards. A space parts what the
# card puts in front of a reply from the reply, since the models write it there themselves.
_DIALOGUE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if not loop.first %}{{ 'APART' }}{% endif %}{{ 'USER' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'REPLY ' + message['content']|trim }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'REPLY' }}{% else %}{{ eos_token }}{% endif %}"
)


def _dialogue(user: str, reply: str, apart: str) -> str:
    """A template for turns that begin with `user` and `reply`."""
    return _DIALOGUE.replace("USER", user).replace("REPLY", reply).replace("APART", apart)


INSTRUCT = _dialogue("Instruct: ", "\\nOutput:", "\\n")
ANSWER = _dialogue("", "\\n\\nAnswer:", "\\n\\n")
CHAT = _dialogue("Alice: ", "\\nBob:", "\\n")
CHAT_APART = _dialogue("Alice: ", "\\n\\nBob:", "\\n\\n")
COMPLETION = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)


@dataclass(frozen=True)
class PublishedTemplate:
    """A prompt form that was published for a model.

    Attributes:
        name: what it is asked for by.
        source: where it was published.
        text: the form as a jinja template.
        tokens: control tokens that a tokenizer must have for it.
        models: pattern found in the names of the models that it is the usual form of; None where
            it is only used when it is asked for.
        stop: strings that end a reply in this form, beside the tokens that do.
    """

    name: str
    source: str
    text: str
    tokens: tuple[str, ...]
    models: str | None
    stop: tuple[str, ...] = ()


_IM = ("<|im_start|>", "<|im_sep|>", "<|im_end|>")
_TAGS = ("<|user|>", "<|assistant|>", "<|end|>")
_LLAMA = ("<s>", *_TAGS)
_BASE = ("<|endoftext|>",)
_SPEAKERS = ("\nAlice:", "\nBob:")
_PHI3_FILES = "tokenizer_config.json of microsoft/Phi-3"

# The first whose tokens and name fit is a model's usual form.
PUBLISHED = (
    PublishedTemplate(
        "phi-3-medium", f"{_PHI3_FILES}-medium-4k-instruct", PHI3_MEDIUM, _LLAMA, "phi-?3-medium"
    ),
    PublishedTemplate(
        "phi-3.5-mini", f"{_PHI3_FILES}.5-mini-instruct", PHI35, _LLAMA, r"phi-?3[._]5"
    ),
    PublishedTemplate("phi-3-mini", f"{_PHI3_FILES}-mini-4k-instruct", PHI3, _LLAMA, ""),
    PublishedTemplate(
        "phi-3-mini-first", f"{_PHI3_FILES}-mini-4k-instruct", PHI3_FIRST, _LLAMA, None
    ),
    PublishedTemplate(
        "phi-4-reasoning",
        "card and tokenizer_config.json of microsoft/Phi-4-reasoning",
        REASONING,
        _IM,
        "reasoning",
    ),
    PublishedTemplate("phi-4", "tokenizer_config.json of microsoft/phi-4", PHI4, _IM, ""),
    PublishedTemplate(
        "phi-4-mini-reasoning",
        "chat_template.jinja of microsoft/Phi-4-mini-reasoning",
        MINI_REASONING,
        _TAGS,
        "(?<!flash.)reasoning",  # the card of Phi-4-mini-flash-reasoning has phi-4-mini's form
    ),
    PublishedTemplate(
        "phi-4-mini",
        "tokenizer_config.json of microsoft/Phi-4-mini-instruct",
        MINI,
        _TAGS,
        "",
    ),
    PublishedTemplate(
        "phi-2",
        "card of microsoft/phi-2, QA format",
        INSTRUCT,
        _BASE,
        r"\bphi-?2\b",
        ("\nInstruct:",),
    ),
    PublishedTemplate(
        "phi-1.5",
        "card of microsoft/phi-1_5, QA format",
        ANSWER,
        _BASE,
        r"\bphi-?1[._]?5\b",
        ("\n\n",),
    ),
    PublishedTemplate(
        "phi-2-chat", "card of microsoft/phi-2, chat format", CHAT, _BASE, None, _SPEAKERS
    ),
    PublishedTemplate(
        "phi-1.5-chat", "card of microsoft/phi-1_5, chat format", CHAT_APART, _BASE, None, _SPEAKERS
    ),
    PublishedTemplate(
        "completion", "card of microsoft/phi-1, code format", COMPLETION, _BASE, r"\bphi-?1\b"
    ),
)
BY_NAME = {form.name: form for form in PUBLISHED}
BY_TEXT = {form.text: form for form in PUBLISHED}

THINK, NO_THINK = "<think>", "<|dummy_84|>"
"""What a reply begins with that reasons, and one that does not."""

# SHA-256 of published templates that are not needed here: their models' folders have them.
KNOWN = {
    # chat_template.jinja of microsoft/Phi-4-reasoning-vision-15B
    "b763247b7f52d0c734cf30d623ee4a4a694bc3619eb89385a154ac50082416f0",
}


def reasoning_modes(text: str) -> dict[str, str]:
    """What a reply begins with, by mode, of a template that tells its model of both; else empty."""
    modes = {"on": THINK, "off": NO_THINK}
    return modes if all(token in text for token in modes.values()) else {}


def is_known(text: str) -> bool:
    """Tell whether a template was published with a model of the family, to the letter."""
    return text in BY_TEXT or sha256(text.encode(errors="replace")).hexdigest() in KNOWN


def named_template(name: str) -> PublishedTemplate:
    """The published form of that name. Raises PromptError where there is none."""
    if name not in BY_NAME:
        raise PromptError(
            f"There is no prompt form named {shortened(name)}.",
            hint=f"Known forms: {', '.join(BY_NAME)}.",
        )
    return BY_NAME[name]


def published_template(tokens: Collection[str], names: Iterable[str]) -> PublishedTemplate | None:
    """The usual form of a model with these control tokens and names, or None.

    A model whose tokenizer has `<think>` is a reasoning model, whatever its name.
    """
    name = " ".join([*names, *(["reasoning"] if "<think>" in tokens else [])]).lower()
    return next(
        (
            form
            for form in PUBLISHED
            if form.models is not None
            and set(form.tokens) <= set(tokens)
            and re.search(form.models, name)
        ),
        None,
    )


def folder_templates(folder: Path) -> dict[str, str]:
    """The folder's own templates by name, "default" first among them; empty where it has none.

    Looks into chat_template.jinja, chat_template.json, tokenizer_config.json, in this order.
    Raises PromptError where a template is there but is not text.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return {"default": read_text(jinja, PromptError, hint="Download the model again.")}
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_settings(folder / name).get("chat_template")
        if found is not None:
            return _by_name(folder / name, found)
    return {}


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder, empty where it is absent; raises TokenizerError."""
    return read_json(path, TokenizerError, hint="Download the model again.", missing_ok=True)


def _by_name(path: Path, found: Any) -> dict[str, str]:
    if isinstance(found, str):
        return {"default": found}
    entries = found if isinstance(found, list) else []
    templates = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("template"), str)
    }
    if "default" not in templates:
        raise PromptError(
            f"{path} has a chat_template that is neither text nor a list with a default.",
            hint="Take the file from the model's publisher again.",
        )
    return templates
