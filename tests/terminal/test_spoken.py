"""What is read aloud of a reply: its words, sentence by sentence, in whatever pieces it comes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phimlx.terminal.spoken import SpokenText, sentences

REPLY = """\
# A *heading*

Here is **some text. It goes** on `here()`, see [the docs](https://example.com/a?b=c). Version 3.14
is out! Is it "good?" Yes.

```python
print("never. said.")

# nor this.
```

1. First of all.
2. Second

| name | age |
|------|----:|
| Ada  | 36  |

> Quoted **words** at https://example.org/long/path?x=1 end.

![a cat](cat.png) and <b>bold</b> words

    indented code.

***
終わりです。はい！
"""
SAID = [
    "A heading",
    "Here is some text.",
    "It goes on here(), see the docs.",
    "Version 3.14 is out!",
    'Is it "good?"',
    "Yes.",
    "First of all.",
    "Second",
    "name, age",
    "Ada, 36",
    "Quoted words at example.org end.",
    "a cat and bold words",
    "終わりです。",
    "はい！",
]


def test_a_whole_reply() -> None:
    assert sentences(REPLY) == SAID


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_a_reply_as_it_comes(size: int) -> None:
    text = SpokenText()
    found = [
        each
        for start in range(0, len(REPLY), size)
        for each in text.add(REPLY[start : start + size])
    ]
    assert found + text.end() == SAID
    assert text.end() == []


def test_a_sentence_is_said_before_the_next_one_ends() -> None:
    text = SpokenText()
    assert text.add("Hello there. How") == ["Hello there."]
    assert text.add(" are you?") == []
    assert text.add("\n\nA") == ["How are you?"]
    assert text.add(" list:\n- one\n- two\n") == ["A list:", "one"]
    assert text.add("\n```\ncode. code. code.\n") == ["two"]
    assert text.add("more. code.\n```\n") == []
    assert text.end() == []


def test_what_a_voice_would_obey_is_text() -> None:
    assert sentences("[[slnc 90000]] Hi [[[[volm 0]]") == ["[slnc 90000]] Hi [volm 0]]"]
    assert sentences("-o /etc/passwd says.") == ["-o /etc/passwd says."]
    assert sentences("*** — … !!! |||") == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab .!*_`#>|-\n~[](1"), max_size=12))
def test_no_reply_breaks_it(parts: list[str]) -> None:
    text = SpokenText()
    said = [each for part in parts for each in text.add(part)] + text.end()
    assert all(any(letter.isalnum() for letter in each) for each in said)
    assert not [each for each in said if "`" in each or "*" in each]
