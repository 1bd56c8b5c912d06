"""Templates that write each message by itself, and their text in parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from phimlx.prompt.published_templates import PUBLISHED, is_known
from phimlx.prompt.sandbox.environment import Template
from phimlx.prompt.sandbox.isolated import IsolatedTemplate

SAID = [
    {"role": role, "content": f"{role} {number}"}
    for number, role in enumerate(("system", "user", "assistant", "user"))
]
LOOP = "{% for m in messages %}{{ m['content'] }}"


def alone(text: str, first: int) -> str:
    return Template(text).render({"messages": SAID[:first], "add_generation_prompt": True})


@pytest.mark.parametrize(
    "text",
    [
        *(form.text for form in PUBLISHED),
        "a" + LOOP + "b{% endfor %}c",
        LOOP + "{{ loop.index0 }}{% if not loop.first %}, {% endif %}{% endfor %}",
        LOOP + "{% for letter in m['role'] %}{{ loop.index }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
        "{% endfor %}{{ raise_exception('no') if tools }}",
    ],
)
def test_parts_of_all_messages_hold_the_text_of_the_first(text: str) -> None:
    template = Template(text)
    parts = template.render_turns({"messages": SAID, "add_generation_prompt": True})
    assert parts is not None
    width = len(SAID) + 1
    assert len(parts) % width == 1
    for first in range(1, width):
        # Of each time through the messages, what is written of the first ones and what follows.
        kept = [part for place, part in enumerate(parts) if place % width <= first]
        assert "".join(kept) == alone(text, first)


@pytest.mark.parametrize(
    "text",
    [
        "no messages at all",
        LOOP + "{% if loop.last %}.{% endif %}{% endfor %}",
        LOOP + "{{ loop['length'] }}{% endfor %}",
        LOOP + "{{ messages | length }}{% endfor %}",
        LOOP + "{{ '.' if add_generation_prompt }}{% endfor %}",
        LOOP + "{% set last = m %}{% endfor %}",
        LOOP + "{% break %}{% endfor %}",
        LOOP + "{% endfor %}{{ messages[0]['role'] }}",
        LOOP + "{% else %}nothing{% endfor %}",
        "{% set messages = messages[1:] %}" + LOOP + "{% endfor %}",
        "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}",
        "{% for m in messages recursive %}{{ m['content'] }}{% endfor %}",
        "{% for messages in messages %}{{ messages['content'] }}{% endfor %}",
        "{% macro each(m) %}{{ m['content'] }}{% endmacro %}"
        "{% for m in messages %}{{ each(m) }}{% endfor %}",
        "{% if messages %}" + LOOP + "{% endfor %}{% endif %}",
    ],
)
def test_a_message_whose_text_may_depend_on_others(text: str) -> None:
    assert Template(text).render_turns({"messages": SAID}) is None


def test_templates_of_unknown_origin_are_split_by_the_worker() -> None:
    text = "a" + LOOP + "b{% endfor %}c"
    assert not is_known(text)
    found = IsolatedTemplate(text).render_turns({"messages": SAID[:2]})
    assert found == ["a", "system 0b", "user 1b", "c"]
    text = LOOP + "{{ loop.last }}{% endfor %}"
    assert IsolatedTemplate(text).render_turns({"messages": SAID}) is None


def test_the_template_of_a_reasoning_model_that_sees(data: Path) -> None:
    text = (data / "hf" / "Phi-4-reasoning-vision-15B" / "chat_template.jinja").read_text()
    parts = Template(text).render_turns({"messages": SAID[1:], "add_generation_prompt": True})
    assert parts is not None
    assert [part.count("<|im_end|>") for part in parts] == [1, 1, 1, 1, 0]
