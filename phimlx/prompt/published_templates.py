"""Chat templates: where a model folder keeps its own, and the published ones for folders without.

Knows nothing of rendering. A folder's own template always wins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phimlx.errors import PromptError, TokenizerError
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

# microsoft/Phi-4-mini-reasoning, chat_template.jinja; serves Phi-4-mini-flash-reasoning as well.
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


@dataclass(frozen=True)
class Published:
    """A published template, for tokenizers that have `tokens`; for reasoning models or others."""

    source: str
    tokens: tuple[str, ...]
    reasoning: bool


PUBLISHED = (
    Published(PHI4, ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), reasoning=False),
    Published(REASONING, ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), reasoning=True),
    Published(MINI, ("<|user|>", "<|assistant|>", "<|end|>"), reasoning=False),
    Published(MINI_REASONING, ("<|user|>", "<|assistant|>", "<|end|>"), reasoning=True),
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


def published_template(tokens: Collection[str], names: Iterable[str]) -> str | None:
    """The published template for a tokenizer with these control tokens, or None.

    A reasoning model is one whose tokenizer has `<think>`, or one of whose `names` says so.
    """
    reasoning = "<think>" in tokens or any("reasoning" in name.lower() for name in names)
    return next(
        (
            published.source
            for published in PUBLISHED
            if published.reasoning is reasoning and set(published.tokens) <= set(tokens)
        ),
        None,
    )
