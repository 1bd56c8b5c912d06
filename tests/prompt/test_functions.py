"""Python functions as tools: their definitions, and how arguments reach them."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import functools
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional

import pytest
from llguidance import LLMatcher
from pydantic import BaseModel, Field

from phimlx.errors import PromptError
from phimlx.generation.grammar.reply_form import ReplyForm
from phimlx.generation.options import GenerationOptions
from phimlx.prompt.functions import ArgumentsError, Function, value_text
from phimlx.prompt.tools import read_tools


class Unit(enum.Enum):
    C = "celsius"
    F = "fahrenheit"


@dataclasses.dataclass
class Place:
    """Somewhere."""

    city: str
    country: str | None = None


class Stay(BaseModel):
    where: Place
    nights: int = Field(ge=1, description="How long.")


class Doc:
    """As PEP 727 has it."""

    def __init__(self, documentation: str) -> None:
        self.documentation = documentation


def google(a: int, b: float = 2.5) -> str:
    """Join numbers.

    As a text.

    Args:
        a: The first, which
            is whole.
        b (float): The second.

    Returns:
        The text.
    """
    return f"{a} {b}"


def numpy(a: int, b: float = 2.5) -> str:
    """Join numbers.

    As a text.

    Parameters
    ----------
    a : int
        The first, which
        is whole.
    b : float, optional
        The second.

    Returns
    -------
    str
        The text.
    """
    return f"{a} {b}"


def sphinx(a: int, b: float = 2.5) -> str:
    """Join numbers.

    As a text.

    :param a: The first, which
        is whole.
    :param float b: The second.
    :returns: The text.
    """
    return f"{a} {b}"


def annotated(
    a: Annotated[int, "The first, which is whole."],
    b: Annotated[float, Doc("The second.")] = 2.5,
) -> str:
    """Join numbers.

    As a text.
    """
    return f"{a} {b}"


@pytest.mark.parametrize("function", [google, numpy, sphinx, annotated])
def test_what_is_said_of_a_function_in_any_style(function: Callable[..., str]) -> None:
    assert Function(function).definition == {
        "name": function.__name__,
        "description": "Join numbers.\n\nAs a text.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "The first, which is whole."},
                "b": {"type": "number", "default": 2.5, "description": "The second."},
            },
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    assert Function(function).call({"a": "3"}) == "3 2.5"


def typed(
    kind: Literal["a", "b"],
    maybe: Optional[int],  # noqa: UP045
    many: list[str],
    place: Place,
    stay: Stay,
    day: datetime.date = datetime.date(2026, 1, 2),
    unit: Unit = Unit.C,
    few: Annotated[int, Field(le=3)] = 1,
    pairs: dict[str, tuple[int, int]] | None = None,
    schema: str = "model_config",
    _hidden: object = None,
    then: Any = print,
) -> list[Any]:
    return [kind, maybe, many, place, stay, day, unit, few, pairs, schema, then]


def test_types_as_pydantic_has_them() -> None:
    function = Function(typed)
    properties = function.definition["parameters"]["properties"]
    null = {"type": "null"}
    assert function.definition["parameters"]["required"] == [
        *("kind", "maybe", "many", "place", "stay")
    ]
    assert properties["kind"] == {"type": "string", "enum": ["a", "b"]}
    assert properties["maybe"] == {"anyOf": [{"type": "integer"}, null]}
    assert properties["many"] == {"type": "array", "items": {"type": "string"}}
    assert properties["place"] == {"$ref": "#/$defs/Place"}
    assert properties["day"] == {"type": "string", "format": "date", "default": "2026-01-02"}
    assert properties["unit"] == {"$ref": "#/$defs/Unit", "default": "celsius"}
    assert properties["few"] == {"type": "integer", "maximum": 3, "default": 1}
    assert properties["pairs"]["default"] is None
    assert properties["schema"] == {"type": "string", "default": "model_config"}
    assert properties["then"] == {}  # whose default JSON cannot say
    assert function.definition["parameters"]["$defs"]["Stay"]["properties"]["nights"] == {
        "type": "integer",
        "minimum": 1,
        "description": "How long.",
    }
    given: dict[str, Any] = {"kind": "b", "maybe": None, "many": ["x"], "place": {"city": "Rome"}}
    given |= {"stay": {"where": {"city": "Oslo", "country": "NO"}, "nights": 2}}
    given |= {"unit": "fahrenheit", "pairs": {"a": [1, 2]}}
    assert function.call(given) == [
        *("b", None, ["x"], Place("Rome"), Stay(where=Place("Oslo", "NO"), nights=2)),
        *(datetime.date(2026, 1, 2), Unit.F, 1, {"a": (1, 2)}, "model_config", print),
    ]


class Shop:
    """A shop."""

    def __init__(self) -> None:
        self.sold: list[str] = []

    def sell(self, thing: str) -> str:
        """Sell a thing."""
        self.sold.append(thing)
        return "sold"

    def __call__(self, thing: str) -> str:
        """Sell it at once."""
        return self.sell(thing)

    @staticmethod
    def price(thing: str) -> int:
        """Tell a price."""
        return len(thing)


def placed(a: int, /, b: int, *rest: int, c: int = 0, **more: int) -> list[Any]:
    return [a, b, rest, c, more]


@functools.cache
def cached(a: int) -> int:
    """Remember."""
    return a


@pytest.mark.parametrize(
    ("function", "name", "described", "offered", "given", "result"),
    [
        (Shop().sell, "sell", "Sell a thing.", ["thing"], {"thing": "x"}, "sold"),
        (Shop(), "Shop", "Sell it at once.", ["thing"], {"thing": "x"}, "sold"),
        (Shop.price, "price", "Tell a price.", ["thing"], {"thing": "xyz"}, 3),
        (placed, "placed", None, ["a", "b", "c"], {"b": 2, "a": 1}, [1, 2, (), 0, {}]),
        (functools.partial(placed, 7, c=5), "placed", None, ["b"], {"b": 2}, [7, 2, (), 5, {}]),
        (cached, "cached", "Remember.", ["a"], {"a": 4}, 4),
    ],
)
def test_what_else_can_be_called(
    function: Callable[..., Any],
    name: str,
    described: str | None,
    offered: list[str],
    given: dict[str, Any],
    result: Any,
) -> None:
    bound = Function(function)
    assert bound.definition["name"] == name
    assert bound.definition.get("description") == described
    assert list(bound.definition["parameters"]["properties"]) == offered
    assert bound.call(given) == result


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ArgumentsError) as caught:
        Function(google).call({"b": "x", "c": 1})
    assert str(caught.value) == (
        "a: Field required; b: Input should be a valid number, unable to parse string as a number; "
        "c: Extra inputs are not permitted"
    )


def unknown(a: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
    pass


def callback(a: int, then: Callable[[int], int]) -> None:
    pass


def lost(a: Shop) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda a: a, "The function '<lambda>' has no name that a model could call."),
        (unknown, "unknown has an annotation that means nothing: name 'Missing' is not defined."),
        (callback, "The parameter then of callback has no JSON Schema: "),
        (lost, "The parameter a of lost has no JSON Schema: "),
    ],
)
def test_a_function_that_cannot_be_offered_says_why(
    function: Callable[..., Any], problem: str
) -> None:
    with pytest.raises(PromptError) as caught:
        read_tools([function])
    assert str(caught.value).startswith(problem)
    assert caught.value.hint


@pytest.mark.parametrize("function", [google, typed, placed, cached])
def test_a_reply_can_be_held_to_each(function: Callable[..., Any]) -> None:
    form = ReplyForm.read(GenerationOptions(tools=[function], tool_choice=function.__name__))
    assert form is not None
    assert LLMatcher.validate_grammar(form.source("none", {})) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is\n", "as it is\n"),
        (7, "7"),
        (None, "null"),
        ([1.5, True, {"a": datetime.date(2026, 1, 2)}], '[1.5,true,{"a":"2026-01-02"}]'),
        (Place("Rome"), '{"city":"Rome","country":null}'),
        (Stay(where=Place("Rome"), nights=1), None),
        ((each for each in "ab"), '["a","b"]'),
        (b"\xff", "b'\\xff'"),
        ({"a": Unit}, None),
    ],
)
def test_what_a_function_returns_is_text(value: Any, text: str | None) -> None:
    found = value_text(value)
    assert json.loads(found) if text is None else found == text
