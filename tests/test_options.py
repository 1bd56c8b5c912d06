"""One schema behind flags, files and mappings: what it takes, and how it says what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from phimlx.errors import ConversionError, PhimlxError, SettingsError
from phimlx.options import (
    Fraction,
    OptionError,
    Options,
    Positive,
    PositiveCount,
    Text,
    click_options,
    from_file,
    from_flags,
    option,
    read,
    schemas,
)


class Schema(Options):
    """One field of each kind."""

    error: ClassVar[type[PhimlxError]] = ConversionError

    bits: Literal[2, 4, 8] = option(4, "Bits a weight.", "--q-bits", "-b")
    rate: Positive | None = option(None, "Of learning  [default: what is usual]")
    share: Fraction = option(0.5, "A part.")
    count: PositiveCount = option(3, "So many.")
    folder: Path | None = option(None, "Where it goes.", metavar="FOLDER")
    fast: bool = option(False, "Hurry.")
    stop: tuple[Text, ...] = option((), "Stop there; may be given again.")
    words: tuple[Literal["a", "b"], ...] = option((), "Some of them.", commas=True)
    low: Annotated[int, Field(ge=-2, le=2)] = option(0, "Low.")


@click.command()
@click_options(Schema)
def command(**flags: Any) -> None:
    """Say what was given."""
    settings = from_flags(Schema, flags)
    click.echo(repr({name: getattr(settings, name) for name in sorted(settings.model_fields_set)}))


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(command, arguments, prog_name="it")
    return result.exit_code, result.output


def test_flags_become_values_of_their_types() -> None:
    assert run() == (0, "{}\n")
    given = (
        "-b 8 --rate 1e-3 --share 0.25 --count 2 --folder x --fast --stop a,b --stop c --words b,a"
    )
    assert run(*given.split(), "--low", "-2") == (
        0,
        f"{{'bits': 8, 'count': 2, 'fast': True, 'folder': {Path('x')!r}, 'low': -2, "
        "'rate': 0.001, 'share': 0.25, 'stop': ('a,b', 'c'), 'words': ('b', 'a')}\n",
    )


def test_help_shows_bounds_of_words_and_defaults() -> None:
    assert run("--help")[1] == (
        "Usage: it [OPTIONS]\n\n"
        "  Say what was given.\n\n"
        "Options:\n"
        "  -b, --q-bits 2|4|8  Bits a weight  [default: 4]\n"
        "  --rate X            Of learning  [default: what is usual]\n"
        "  --share X           A part  [default: 0.5]\n"
        "  --count N           So many  [default: 3]\n"
        "  --folder FOLDER     Where it goes.\n"
        "  --fast              Hurry.\n"
        "  --stop TEXT         Stop there; may be given again.\n"
        "  --words a|b,…       Some of them.\n"
        "  --low N             Low.\n"
        "  --help              Show this message and exit.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-b", "3"], "'--q-bits' / '-b': '3' is not one of 2, 4, 8."),
        (["--rate", "nan"], "'--rate': 'nan' is not a number, above 0, 100000 at most."),
        (["--share", "1"], "'--share': '1' is not a number, 0 or more, below 1."),
        (["--count", "2.5"], "'--count': '2.5' is not a whole number, 1 or more."),
        (["--stop", ""], "'--stop': '' is not a text."),
        (["--words", "a,c"], "'--words': 'a,c' is not a list, each one of a, b."),
        (["--low", "3"], "'--low': '3' is not a whole number, -2 or more, 2 at most."),
    ],
)
def test_a_flag_that_does_not_hold(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert (code, output.splitlines()[-1]) == (2, f"Error: Invalid value for {message}")


def test_what_does_not_go_together_is_said_of_all_flags_not_of_one() -> None:
    class Pair(Options):
        """Two that go together."""

        one: PositiveCount | None = option(None, "This.")
        other: PositiveCount | None = option(None, "That.")

        @model_validator(mode="after")
        def _go_together(self) -> Self:
            if (self.one is None) != (self.other is None):
                raise OptionError("one goes with other.", hint="Give both.")
            return self

    @click.command()
    @click_options(Pair)
    def pair(**flags: Any) -> None:
        """Read both."""
        click.echo(from_flags(Pair, flags).other)

    runner = CliRunner()
    assert runner.invoke(pair, ["--one", "1", "--other", "2"]).output == "2\n"
    error = runner.invoke(pair, ["--one", "1"]).exception
    assert isinstance(error, SettingsError)
    assert (str(error), error.hint) == ("one goes with other.", "Give both.")


def test_some_of_the_flags() -> None:
    some = click.command()(click_options(Schema, ["count", "fast"])(lambda **flags: None))
    assert [each.name for each in some.params] == ["count", "fast"]


def test_a_list_in_a_mapping_is_no_text_with_commas() -> None:
    assert read(Schema, {"stop": ["a,b"], "words": ["a"]}).stop == ("a,b",)
    with pytest.raises(ConversionError) as caught:
        read(Schema, {"stop": "a,b"}, "the request")
    assert str(caught.value) == "the request: stop is 'a,b'; it must be a list, each a text."


def test_the_class_of_an_error_is_the_schemas_own(tmp_path: Path) -> None:
    class Plain(Options):
        """Nothing said."""

        count: PositiveCount = option(1, "So many.")

    path = tmp_path / "a.toml"
    path.write_text("cuont = 3")
    with pytest.raises(SettingsError) as caught:
        from_file(Plain, path)
    assert (str(caught.value), caught.value.hint) == (
        f"{path}: there is no setting cuont.",
        "Did you mean count?",
    )


def test_the_schema_is_json_schema() -> None:
    bounds = {"minimum": -2, "maximum": 2, "default": 0, "type": "integer"}
    assert schemas(Schema)["low"].items() >= bounds.items()
    assert Schema.model_json_schema()["additionalProperties"] is False


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)


@given(st.sampled_from(list(Schema.model_fields)), JSON)
def test_whatever_a_mapping_holds_there_is_a_sentence(name: str, value: object) -> None:
    try:
        settings = read(Schema, {name: value})
    except ConversionError as error:
        said = str(error)
    else:
        said = "" if settings.model_fields_set == (set() if value is None else {name}) else "lost"
    assert not said or (said.startswith(f"{name} is ") and "; it must be " in said)
