"""What passes over several tokens cost: interpolation, what is kept, and what is not believed."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phimlx.machine import device
from phimlx.machine.pass_cost import PUBLISHED, PassCost, curves_folder, load_curve, save_curve

MEASURED = PassCost(((1, 1.0), (2, 1.25), (4, 2.0), (32, 9.0)), measured=True)


def model(bits: int | None = None) -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 64, bias=False))
    if bits:
        nn.quantize(made, group_size=64, bits=bits)
    return made


@pytest.mark.parametrize(
    ("tokens", "cost"),
    [(1, 1.0), (2, 1.0), (3, 1.13), (4, 1.43), (6, 2.135), (8, 2.84), (9, 3.67), (10, 4.5)]
    + [(tokens, 4.5) for tokens in range(10, 33)]
    + [(64, 9.0)],
)
def test_the_published_curve(tokens: int, cost: float) -> None:
    assert PUBLISHED.cost(tokens) == pytest.approx(cost)


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=40))
def test_a_curve_passes_through_its_points(costs: list[float]) -> None:
    points = ((1, 1.0), *((index + 2, cost) for index, cost in enumerate(costs)))
    curve = PassCost(points)
    assert [curve.cost(tokens) for tokens, _ in points] == [cost for _, cost in points]


@pytest.mark.parametrize(
    "points",
    [
        (),
        ((2, 1.0),),
        ((1, 2.0),),
        ((1, 1.0), (1, 1.0)),
        ((1, 1.0), (3, 2.0), (2, 3.0)),
        ((1, 1.0), (2, float("nan"))),
        ((1, 1.0), (2, float("inf"))),
        ((1, 1.0), (2, 0.0)),
    ],
)
def test_what_is_no_curve_is_refused(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="cost"):
        PassCost(points)


def test_a_measured_curve_comes_back_to_the_same_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_curve(model(), tmp_path) is PUBLISHED
    save_curve(model(), MEASURED, tmp_path)
    assert load_curve(model(), tmp_path) == MEASURED
    assert load_curve(model(bits=4), tmp_path) is PUBLISHED
    save_curve(model(bits=4), PUBLISHED, tmp_path)
    assert load_curve(model(bits=4), tmp_path).points == PUBLISHED.points
    assert load_curve(model(bits=8), tmp_path) is PUBLISHED
    monkeypatch.setattr(device, "device_name", lambda: "Apple M9")
    assert load_curve(model(), tmp_path) is PUBLISHED
    monkeypatch.undo()
    monkeypatch.setattr(device, "backend", lambda: "metal")
    assert load_curve(model(), tmp_path) is PUBLISHED


def test_a_later_curve_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    file = save_curve(model(), PUBLISHED, tmp_path)
    assert save_curve(model(), MEASURED, tmp_path) == file
    assert load_curve(model(), tmp_path) == MEASURED
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        {"points": None},
        {"points": []},
        {"points": [[1, 1.0], [2]]},
        {"points": [[1, 1.0], [2, "x"]]},
        {"points": [[1, 1.0], [2, -1]]},
        {"points": [[1, 1.0], [2, 1e999]]},
        {"points": [[1, 1.0], [1e999, 1]]},
        {"points": 3},
        {"format": 0},
        {"device": "another"},
        {"model": "another"},
    ],
    ids=str,
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: dict[str, object]) -> None:
    file = save_curve(model(), MEASURED, tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    assert load_curve(model(), tmp_path) is PUBLISHED


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{", b"[" * 100_000, b" " * (1 << 17)])
def test_a_file_that_is_no_curve_counts_as_none(tmp_path: Path, data: bytes) -> None:
    save_curve(model(), MEASURED, tmp_path).write_bytes(data)
    assert load_curve(model(), tmp_path) is PUBLISHED


def test_curves_are_kept_in_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in curves_folder().parents
    assert save_curve(model(), MEASURED).parent == curves_folder()
    assert load_curve(model()) == MEASURED
