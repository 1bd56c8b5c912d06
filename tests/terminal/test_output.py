"""What reaches a terminal and what never does."""

from __future__ import annotations

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.errors import PhimlxError
from phimlx.terminal.output import Output, encode_json, printable, style

any_text = st.text(st.characters())  # lone surrogates and controls included


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both streams terminals that show colours."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m", "a[31mred[0m"),
        ("\x1b]0;title\x07", "]0;title"),
        ("\x9b2J\x85", "2J"),
        ("over\rwritten\b\x7f", "overwritten"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("\u202eevil\u2066x\u2069", "evilx"),
        ("\ud800x", "x"),
        ("עברית \u200f 你好 👩\u200d🔬", "עברית \u200f 你好 👩\u200d🔬"),
    ],
)
def test_control_characters_are_removed(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(any_text, any_text)
def test_a_sequence_split_over_pieces_is_disarmed(first: str, second: str) -> None:
    shown = printable(first) + printable(second)
    assert shown == printable(first + second)
    assert not [
        character
        for character in shown
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    ]


@given(st.recursive(any_text | st.integers() | st.none(), lambda v: st.dictionaries(any_text, v)))
def test_json_loses_nothing_and_holds_nothing_unprintable(value: object) -> None:
    text = encode_json(value)
    assert json.loads(text) == value
    assert printable(text) == text


def test_each_form_goes_to_stdout_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for output in (Output(), Output(json=True)):
        output.write("streamed ")
        output.text("text")
        output.table(["name"], [["row"]])
        output.json({"key": "wörd\x1b"})
        output.note("remark")
        output.aside("not on a pipe")
    out, err = capsys.readouterr()
    assert out == 'streamed text\nname\n────\nrow\n{\n  "key": "wörd\\u001b"\n}\n'
    assert err == "remark\nremark\n"


def test_table_aligns_numbers_right_and_takes_cells_literally(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Output().table(["model", "GB"], [["phi-4[bold]", 29.3], ["nano\x1b[2J", 5], ["none", None]])
    assert capsys.readouterr().out == (
        "model           GB\n──────────────────\nphi-4[bold]   29.3\nnano[2J          5\nnone\n"
    )


def test_a_table_is_not_wrapped_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(["text"], [["word " * 100]])
    assert capsys.readouterr().out.splitlines()[2] == ("word " * 100).rstrip()


@pytest.mark.parametrize("width", range(10, 70, 3))
def test_on_a_terminal_of_any_width_no_name_and_no_word_is_cut(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [
        ("microsoft/Phi-4-mini-instruct", "7.67 GB", 16, "many words of help"),
        ("模型", "", 4, ""),
    ]
    Output().table(["model name", "size", "bits", "good at"], rows)
    shown = capsys.readouterr().out
    for name, *rest in rows:
        assert name in shown
        assert not {*" ".join(map(str, rest)).split()} - {*shown.split()}
    if "─" in shown:
        assert max(map(len, shown.splitlines())) <= width


def test_a_terminal_too_narrow_for_a_table_gets_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "30")
    Output().table(["model", "GB", "state"], [["microsoft/Phi-4-mini-instruct", 7.7, ""]])
    assert capsys.readouterr().out == "microsoft/Phi-4-mini-instruct\n  GB: 7.7\n"


def test_colours_only_on_a_terminal_that_wants_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    Output().note("one")
    Output().aside("two")
    Output().write("three", "cyan")
    monkeypatch.setenv("NO_COLOR", "1")
    Output().note("four")
    Output().write("five", "cyan")
    out, err = capsys.readouterr()
    assert out == "\x1b[36mthree\x1b[0mfive"
    assert err == "\x1b[2mone\x1b[0m\n\x1b[2mtwo\x1b[0mfour\n"


def test_a_dumb_terminal_gets_no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    use_terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    assert style("text", "red", sys.stdout) == "text"


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            PhimlxError("There is no model \x1b[2Jfoo.", "Run phimlx list."),
            "Error: There is no model [2Jfoo.\nHint: Run phimlx list.\n",
        ),
        (PhimlxError("It is full."), "Error: It is full.\n"),
        (
            ValueError("bad axis"),
            "Error: unexpected ValueError: bad axis\n"
            "Hint: Run it again with --debug to see where it happened.\n",
        ),
        (
            RuntimeError(),
            "Error: unexpected RuntimeError\n"
            "Hint: Run it again with --debug to see where it happened.\n",
        ),
    ],
)
def test_an_error_is_one_sentence_and_the_next_step(
    error: Exception, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Output().error(error)
    assert capsys.readouterr() == ("", shown)


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("bad axis")
    except ValueError as error:
        Output(debug=True).error(error)
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("ValueError: bad axis\nError: unexpected ValueError: bad axis\n")
