"""Bounds of the sampling settings, the same for a flag, for /set and for a saved chat."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from phimlx.cli.options import sampling_options
from phimlx.errors import GenerationError, PhimlxError
from phimlx.generation.sampler import Sampling
from phimlx.preferences.sampling import (
    SETTINGS,
    check_settings,
    find_setting,
    given,
    parse_setting,
)

REFUSED = [
    ("max-tokens", "0", "0 is not in the range x>=1."),
    ("max-tokens", "ten", "'ten' is not a valid integer range."),
    ("temp", "-1", "-1.0 is not in the range x>=0."),
    ("temp", "nan", "nan is not a finite number."),
    ("temp", "inf", "inf is not a finite number."),
    ("top-p", "0", "0.0 is not in the range 0<x<=1."),
    ("top-p", "1.5", "1.5 is not in the range 0<x<=1."),
    ("top-k", "-1", "-1 is not in the range x>=0."),
    ("top-k", "1.5", "'1.5' is not a valid integer range."),
    ("min-p", "2", "2.0 is not in the range 0<=x<=1."),
    ("repetition-penalty", "0", "0.0 is not in the range x>0."),
    ("presence-penalty", "3", "3.0 is not in the range -2<=x<=2."),
    ("frequency-penalty", "-3", "-3.0 is not in the range -2<=x<=2."),
    ("seed", "-1", "-1 is not in the range 0<=x<=18446744073709551615."),
    ("stop", "", "empty text stops nothing."),
]


@click.command()
@sampling_options
def echo(**values: Any) -> None:
    click.echo(repr(given(values)))


@pytest.mark.parametrize(("name", "text", "reason"), REFUSED)
def test_set_and_flag_refuse_the_same(name: str, text: str, reason: str) -> None:
    with pytest.raises(PhimlxError) as caught:
        parse_setting(find_setting(name), text)
    assert str(caught.value) == f"{name}: {reason}"
    result = CliRunner().invoke(echo, [f"--{name}={text}"])
    assert result.exit_code == 2
    assert result.stderr.endswith(f": {reason}\n")


@pytest.mark.parametrize("name", ["temp", "top-p", "top-k", "min-p", "repetition-penalty"])
def test_the_engine_refuses_what_a_flag_refuses(name: str) -> None:
    setting = find_setting(name)
    for refused, text, _ in REFUSED:
        if refused == name and text not in ("1.5", "ten"):
            with pytest.raises(GenerationError):
                Sampling(**{setting.keyword: float(text)})


def test_flags_keep_their_names_and_arrive_as_keywords() -> None:
    result = CliRunner().invoke(
        echo,
        [
            "-m",
            "9",
            "--temp",
            "0.5",
            "--top-p",
            ".9",
            "--top-k",
            "3",
            "--seed",
            "1",
            "--stop",
            "a",
            "--stop",
            "b",
        ],
    )
    assert result.stdout == (
        "{'max_tokens': 9, 'temperature': 0.5, 'top_p': 0.9, 'top_k': 3, 'seed': 1, "
        "'stop': ('a', 'b')}\n"
    )
    assert CliRunner().invoke(echo, []).stdout == "{}\n"


@pytest.mark.parametrize("name", ["temp", "temperature", "--temp", "max_tokens", "max-tokens"])
def test_a_setting_is_found_by_flag_or_keyword(name: str) -> None:
    assert find_setting(name) in SETTINGS


def test_an_unknown_setting_names_those_there_are() -> None:
    with pytest.raises(PhimlxError) as caught:
        find_setting("heat")
    assert str(caught.value) == "There is no setting 'heat'."
    assert caught.value.hint == (
        "The settings are max-tokens, temp, top-p, top-k, min-p, repetition-penalty, "
        "presence-penalty, frequency-penalty, seed, reasoning, stop."
    )


def test_saved_settings_come_back_as_they_were() -> None:
    saved = {"temperature": 0, "max_tokens": 5, "stop": ["a", "b"], "seed": 2**64 - 1}
    assert check_settings(saved) == {**saved, "stop": ("a", "b")}


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ({"temperature": "0.5"}, "temp: '0.5' is not a valid value."),
        ({"temperature": None}, "temp: None is not a valid value."),
        ({"temperature": [1]}, "temp: [1] is not a valid value."),
        ({"temperature": True}, "temp: True is not a valid value."),
        ({"max_tokens": 1.5}, "max-tokens: 1.5 is not a valid value."),
        ({"top_p": 7}, "top-p: 7.0 is not in the range 0<x<=1."),
        ({"stop": [5]}, "stop: [5] is not a valid value."),
        ({"heat": 1}, "There is no setting 'heat'."),
    ],
)
def test_damaged_settings_are_named(saved: dict[str, Any], reason: str) -> None:
    with pytest.raises(PhimlxError) as caught:
        check_settings(saved)
    assert str(caught.value) == reason
