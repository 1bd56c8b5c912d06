"""The tokenizer that lies beside an adapter: used where it has tokens that the model's has not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phimlx.errors import PhimlxError, TokenizerError, some
from phimlx.prompt.published_templates import folder_templates, read_settings
from phimlx.prompt.tokenizer.tokenizer import Tokenizer, has_tokenizer


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer and chat template that go with a model and its adapter.

    Attributes:
        folder: that holds them.
        remarks: sentences on what a person would not expect.
        stop: control tokens that end a reply besides those of the model.
    """

    folder: Path
    remarks: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()


def choose_tokenizer(adapter: Path, model: Path, vocabulary: int) -> TokenizerChoice:
    """Choose the folder whose tokenizer and chat template go with an adapter.

    The adapter's own is chosen where it adds tokens to the model's, or gives some other ids, and
    the model has a row for each: then what was trained was written with it.

    Args:
        adapter, model: their folders.
        vocabulary: tokens that the model has rows for, the adapter's own rows among them.
    """
    usual = TokenizerChoice(model, _template_remarks(adapter, model))
    if not has_tokenizer(adapter) or not has_tokenizer(model) or _same_bytes(adapter, model):
        return usual
    try:
        theirs = Tokenizer.load(adapter).control_tokens
        eos = read_settings(adapter / "tokenizer_config.json").get("eos_token")
    except TokenizerError as error:
        return TokenizerChoice(model, (f"The adapter's own tokenizer is not used. {error}",))
    known = Tokenizer.load(model).control_tokens
    added = {name: id for name, id in theirs.items() if known.get(name) != id}
    if not added:
        return usual
    names = some(list(added))
    if max(added.values()) >= vocabulary:
        remark = (
            f"The adapter's own tokenizer adds {names}, for which this model has no rows: the "
            "model's is used."
        )
        return TokenizerChoice(model, (remark,))
    remark = f"The adapter's own tokenizer and chat template are used: they add {names}."
    return TokenizerChoice(adapter, (remark,), (eos,) if isinstance(eos, str) else ())


def _template_remarks(adapter: Path, model: Path) -> tuple[str, ...]:
    """Say where a chat template beside an adapter is another than the model's own."""
    try:
        theirs, own = folder_templates(adapter), folder_templates(model)
    except PhimlxError:
        return ()  # where it is the model's, it is told when it is used
    if not theirs or not own or theirs == own:
        return ()
    return ("The adapter's folder has another chat template than the model, which is not used.",)


def _same_bytes(adapter: Path, model: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json")
    files = [(adapter / name, model / name) for name in names]
    return all(
        one.is_file() == other.is_file()
        and (not one.is_file() or one.read_bytes() == other.read_bytes())
        for one, other in files
    )
