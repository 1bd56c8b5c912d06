"""Modes of models that reason: with a prompt one chooses whether a reply begins with thought."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phimlx import catalog
from phimlx.errors import PromptError

if TYPE_CHECKING:
    from phimlx.prompt.chat_template import ChatTemplate

AUTO = "auto"
MODES = (AUTO, "on", "off")


def opening(mode: str, template: ChatTemplate, name: str) -> str:
    """The text that a reply begins with in a mode, behind the prompt: "" where none is needed.

    Args:
        name: of the model.

    Raises:
        PromptError: where the model has no such mode.
    """
    if mode == AUTO:
        return ""
    if mode in template.modes:
        return template.modes[mode]
    known = catalog.find(name)
    reasons = template.reasons or (known is not None and known.reasoning)
    if reasons and mode == "on":
        return ""
    if reasons:
        raise PromptError(
            f"{name} reasons before every reply: it was not trained to answer without.",
            hint="phi-4-reasoning-vision does both; phi-4 and phi-4-mini answer at once.",
        )
    raise PromptError(
        f"{name} does not reason, so reasoning cannot be {mode}.",
        hint="Leave it out, or use a model that reasons, such as phi-4-reasoning.",
    )
