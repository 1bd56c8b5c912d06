"""Writes tests/goldens/prompts.json: what transformers makes of conversations, as text and ids.

    python scripts/goldens/prompt_goldens.py FOLDER

FOLDER holds `phi-4`, `Phi-4-mini-instruct`, `Phi-4-mini-reasoning` and
`Phi-4-reasoning-vision-15B` as published (for the last two the tokenizers of the others serve).
Needs transformers; knows nothing of phimlx.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

# model: the folder with its template, the folder with its tokenizer.
MODELS = {
    "phi-4": ("phi-4", "phi-4"),
    "phi-4-mini": ("Phi-4-mini-instruct", "Phi-4-mini-instruct"),
    "phi-4-mini-reasoning": ("Phi-4-mini-reasoning", "Phi-4-mini-instruct"),
    "phi-4-reasoning-vision": ("Phi-4-reasoning-vision-15B", "phi-4"),
}

TOOLS = json.dumps(
    [
        {
            "name": "get_weather_updates",
            "description": "Fetches weather updates for a given city by a weather service.",
            "parameters": {
                "city": {
                    "description": "The name of the city for which to retrieve weather.",
                    "type": "str",
                    "default": "Zürich",
                }
            },
        }
    ],
    ensure_ascii=False,
)


def turns(*contents: str, system: str | None = None, tools: str | None = None) -> list[dict]:
    """Messages by turns of user and assistant, after an optional system message."""
    messages: list[dict] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
        if tools is not None:
            messages[0]["tools"] = tools
    for index, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return messages


CONVERSATIONS = {
    "plain": turns("How should I explain the Internet?"),
    "system": turns("Hi", system="You are a helpful assistant."),
    "turns": turns("What is 2+2?", "4", "And 12345678 * 3?", "37037034.", system="Answer briefly."),
    "leading space": turns(" \n Hi", "\n\n  Hello there \n", "\t\tbye  "),
    "only space": turns("   ", "ok", "\n"),
    "empty": turns("", "", ""),
    "scripts": turns(
        "日本語で挨拶して。Привет! مرحبا שלום नमस्ते สวัสดี", "こんにちは 👩‍👩‍👧‍👦🏳️‍🌈 é é"
    ),
    "code": turns(
        "Fix:\r\n```python\ndef f(x):\n\treturn x  +1 # it's O(n)\n```\r\n",
        "```python\ndef f(x):\n    return x + 1\n```",
    ),
    "brackets": turns("a <b> <|c|> < |end|> <| end |> |> <| <|en d|>", "x<y>z </s> [INST]"),
    "quotes": turns('It\'s "quoted" {{ braces }} {% tag %} \\n <&>', "WE'LL SEE'S 'tis"),
    "unicode space": turns("\u00a0\u3000Hi\u2003", "\u2028line\u200b\u0085"),
    "control characters": turns("a\x00b\x1b[31mred\x07\x1c\x1d x", "\x1f\x7f\ufeffz"),
    "long": turns("Lorem ipsum dolor sit amet, " * 9, "word" * 20, system="s " * 20),
}

ONLY = {
    "phi-4-mini": {
        "tools": turns(
            "What is the weather in Zürich?",
            system="You are a helpful assistant with some tools.",
            tools=TOOLS,
        ),
        "tools alone": turns("Weather?", system="", tools=TOOLS),
        "tool result": [
            *turns("Weather?", system="Use tools.", tools=TOOLS),
            {"role": "assistant", "content": ""},
            {"role": "tool", "content": '{"city": "Zürich", "sky": "☁"}'},
        ],
    },
    "phi-4-mini-reasoning": {
        "tools": turns("Weather?", system="Think.", tools=TOOLS),
        "late system": [
            {"role": "user", "content": "Solve x+1=2."},
            {"role": "system", "content": "Show each step."},
        ],
    },
}
# The template of these models has no place for a system message.
SYSTEMLESS = {"phi-4-reasoning-vision"}


def load(folder: Path, template_from: str, tokenizer_from: str) -> AutoTokenizer:
    """The tokenizer with the template that the model's own folder has.

    Without a phi3 config.json beside it, transformers would take tokenizer_config.json's
    "GPT2Tokenizer" by its word and split text as GPT-2 did.
    """
    with tempfile.TemporaryDirectory() as joined:
        for name, files in (
            (tokenizer_from, ("config.json", "tokenizer.json", "tokenizer_config.json")),
            (template_from, ("tokenizer_config.json", "chat_template.jinja")),
        ):
            for file in files:
                if (folder / name / file).is_file():
                    shutil.copyfile(folder / name / file, Path(joined, file))
        return AutoTokenizer.from_pretrained(joined)


def main() -> None:
    folder = Path(sys.argv[1])
    cases = []
    for model, (template_from, tokenizer_from) in MODELS.items():
        tokenizer = load(folder, template_from, tokenizer_from)
        for name, messages in (CONVERSATIONS | ONLY.get(model, {})).items():
            if model in SYSTEMLESS and messages[0]["role"] == "system":
                continue
            for generation in (True, False):
                text = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=generation, tokenize=False
                )
                cases.append(
                    {
                        "model": model,
                        "name": name,
                        "messages": messages,
                        "add_generation_prompt": generation,
                        "text": text,
                        "ids": tokenizer.encode(text, add_special_tokens=False),
                    }
                )
    target = Path(__file__).parents[2] / "tests/goldens/prompts.json"
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in cases)
    target.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} cases in {target}")


if __name__ == "__main__":
    main()
