"""The tokenizer that lies beside an adapter: used where it has tokens that the model's has not."""

from __future__ import annotations

from pathlib import Path

from phimlx.errors import TokenizerError, some
from phimlx.prompt.tokenizer.tokenizer import Tokenizer, has_tokenizer

TEMPLATES = ("chat_template.jinja", "chat_template.json")


def choose_tokenizer(adapter: Path, model: Path, vocabulary: int) -> tuple[Path, tuple[str, ...]]:
    """Choose the folder whose tokenizer and chat template go with an adapter.

    The adapter's own is chosen where it adds tokens to the model's, or gives some other ids, and
    the model has a row for each: then what was trained was written with it.

    Args:
        adapter, model: their folders.
        vocabulary: tokens that the model has rows for, the adapter's own rows among them.

    Returns:
        The folder, and sentences on what a person would not expect.
    """
    if not has_tokenizer(adapter) or not has_tokenizer(model) or _same_bytes(adapter, model):
        return model, ()
    try:
        theirs = Tokenizer.load(adapter)
    except TokenizerError as error:
        return model, (f"The adapter's own tokenizer is not used: {error}",)
    known = Tokenizer.load(model).control_tokens
    added = {name: id for name, id in theirs.control_tokens.items() if known.get(name) != id}
    if not added:
        return model, ()
    if max(added.values()) >= vocabulary:
        return model, (
            f"The adapter's own tokenizer adds {some(list(added))}, for which this model has no "
            "rows: the model's tokenizer is used.",
        )
    return adapter, (
        f"The adapter's own tokenizer and chat template are used: they add {some(list(added))}.",
    )


def _same_bytes(adapter: Path, model: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json")
    files = [(adapter / name, model / name) for name in names]
    return all(
        one.is_file() == other.is_file()
        and (not one.is_file() or one.read_bytes() == other.read_bytes())
        for one, other in files
    )
