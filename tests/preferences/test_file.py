"""The file of settings: what it may hold, what is said of the rest, and which value counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from phimlx.errors import SettingsError
from phimlx.preferences.edit import set_value, unset_value
from phimlx.preferences.file import config_path, read_preferences

FILE = """\
# mine
model = "work"
temperature = 0.5
kv_bits = 8
stop = ["a", "b"]
history = false

[models.phi-4]
temp = 0.8
system = "Think."

[alias.work]
model = "~/work"
adapter = "letters"
seed = 3

[alias]
big = "phi-4"
"""


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHIMLX_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    return config_path()


def test_without_a_file_nothing_is_set(path: Path) -> None:
    found = read_preferences()
    assert (found.path, found.top, found.models, found.alias) == (path, {}, {}, {})
    assert found.choose("nano").model == "nano"
    assert found.choose().model is None


def test_what_counts_for_a_model(path: Path) -> None:
    path.write_text(FILE.replace("[alias]\nbig", "[alias.big]\nmodel"))
    found = read_preferences()
    assert found.get("history") is False
    choice = found.choose()
    assert (choice.name, choice.model) == ("work", "/home/me/work")
    values = {key: (value.value, value.source) for key, value in choice.values.items()}
    assert values == {
        "temperature": (0.5, str(path)),
        "kv_bits": (8, str(path)),
        "stop": (("a", "b"), str(path)),
        "adapter": ("letters", f"{path} [alias.work]"),
        "seed": (3, f"{path} [alias.work]"),
    }
    for name in ("phi-4", "big", "microsoft/phi-4"):
        choice = found.choose(name)
        assert choice.get("temperature") == 0.8
        assert choice.values["system"].source == f"{path} [models.phi-4]"
    assert found.resolve("big") == "phi-4"
    assert found.resolve("other") == "other"


def test_the_environment_comes_before_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text('model = "a"\ntemperature = 0.5\n[models.phi-4]\nsystem = "x"\n')
    for name, value in {"MODEL": "phi-4", "TEMPERATURE": "0.1", "SYSTEM": "y", "TOP_K": ""}.items():
        monkeypatch.setenv(f"PHIMLX_{name}", value)
    choice = read_preferences().choose()
    assert (choice.model, choice.get("temperature"), choice.get("system")) == ("phi-4", 0.1, "y")
    assert choice.values["system"].source == "PHIMLX_SYSTEM"
    assert read_preferences().choose("b").model == "b"


MEND = "Mend it: phimlx config edit"


@pytest.mark.parametrize(
    ("text", "error", "hint"),
    [
        ("modle = 'a'", "there is no setting 'modle'.", f"Did you mean model? {MEND}"),
        ("model_s = 1", "there is no setting 'model_s'.", f"Did you mean models? {MEND}"),
        (
            "[alias.a]\nmodel = 'b'\nhistory = true",
            "in alias.a, there is no setting 'history'.",
            None,
        ),
        ("temp = 0.5\ntemperature = 1", "temperature is given twice.", MEND),
        ("temperature = '1'", "temperature: '1' is not a valid value.", MEND),
        ("temperature = -1", "temp: -1.0 is not in the range x>=0.", MEND),
        ("seed = true", "seed: True is not a valid value.", MEND),
        ("history = 'no'", "history: 'no' is not a valid value.", MEND),
        ("history = 1", "history: 1 is not a valid value.", MEND),
        ("kv-bits = 3", "kv-bits: 3 is not one of '8', '4'.", MEND),
        ("theme = 'pink'", "theme: 'pink' is not one of 'auto', 'dark', 'light', 'plain'.", MEND),
        ("model = ''", "model: empty text stops nothing.", MEND),
        ("models = 3", "models is 3; it must be a table of tables.", MEND),
        ("[models]\na = 3", "models.a is 3; it must be a table.", MEND),
        ("[alias.a]\nseed = 1", "alias.a names no model.", MEND),
        (
            "[alias]\nnano = 'b'",
            "alias.nano is the name of a model of the catalogue.",
            f"Choose another name. {MEND}",
        ),
    ],
)
def test_what_does_not_hold_is_told(text: str, error: str, hint: str | None, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_preferences()
    assert str(caught.value) == f"{path}: {error}"
    assert hint is None or caught.value.hint == hint


@pytest.mark.parametrize("text", ["model =", "a = " + "[" * 5000, "\0"])
def test_what_is_no_toml_is_told(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(SettingsError, match=r" is not TOML \(") as caught:
        read_preferences()
    assert caught.value.hint == MEND


def test_a_variable_that_does_not_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHIMLX_TOP_P", "7")
    with pytest.raises(SettingsError) as caught:
        read_preferences()
    assert str(caught.value) == "PHIMLX_TOP_P: top-p: 7.0 is not in the range 0<x<=1."
    assert caught.value.hint == "Unset it."


def test_set_and_unset_leave_the_rest_as_it_was(path: Path) -> None:
    path.write_text('# mine\nmodel = "a"  # why\n\n[models.phi-4]\ntemp = 1.0\n')
    set_value(path, "temp", "0.5")
    set_value(path, "history", "false")
    set_value(path, "models.phi-4.temperature", "0.7")
    set_value(path, "models.microsoft/phi-2.seed", "1")
    set_value(path, "alias.work", "~/x")
    set_value(path, "alias.work.system", "Be \x1b brief.")
    text = path.read_text()
    assert text.startswith('# mine\nmodel = "a"  # why\n')
    found = read_preferences()
    assert found.top == {"model": "a", "temperature": 0.5, "history": False}
    assert found.models == {"phi-4": {"temperature": 0.7}, "microsoft/phi-2": {"seed": 1}}
    assert found.alias == {"work": {"model": "/home/me/x", "system": "Be \x1b brief."}}
    assert path.stat().st_mode & 0o077 == 0
    for name in ("temperature", "models.phi-4", "alias.work"):
        assert unset_value(path, name)
        assert not unset_value(path, name)
    found = read_preferences()
    assert (found.top, found.alias) == ({"model": "a", "history": False}, {})
    assert "# mine" in path.read_text()


def test_an_alias_that_is_a_text_takes_more(path: Path) -> None:
    path.write_text('[alias]\nwork = "a"\n')
    set_value(path, "alias.work.seed", "1")
    assert read_preferences().alias == {"work": {"model": "a", "seed": 1}}


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("modle", "a", "there is no setting 'modle'."),
        ("alias.work.modle", "a", "there is no setting 'modle'."),
        ("models.phi-4", "a", "'models.phi-4' names no setting."),
        ("alias.", "a", "'alias.' names no setting."),
        ("alias.work.seed", "1", "alias.work names no model."),
        ("alias.nano", "a", "alias.nano is the name of a model of the catalogue."),
        ("temperature", "hot", "temp: 'hot' is not a valid number."),
        ("history", "perhaps", "history: 'perhaps' is neither true nor false."),
    ],
)
def test_what_cannot_be_set_leaves_the_file(name: str, value: str, error: str, path: Path) -> None:
    path.write_text("seed = 1\n")
    with pytest.raises(SettingsError) as caught:
        set_value(path, name, value)
    assert str(caught.value) == error
    assert path.read_text() == "seed = 1\n"
