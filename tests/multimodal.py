"""The tiny multimodal checkpoint with a tokenizer of bytes, so that text goes in and comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from phimlx.prompt.published_templates import MINI
from tests.prompt.conftest import MINI_TOKENS, tiny_tokenizer_json

PICTURE, SOUND = 510, 511  # the checkpoint's slot tokens


def multimodal_folder(data: Path, folder: Path) -> Path:
    """Puts a model that sees, hears and babbles into `folder`."""
    source = data / "tiny" / "tiny-phi4mm-remote"
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(source / name, folder / name)
    tokens = [token for token in MINI_TOKENS if token != "<|endoftext10|>"]
    (folder / "tokenizer.json").write_text(json.dumps(tiny_tokenizer_json(tokens)))
    slots = {
        str(PICTURE): {"content": "<|endoftext10|>"},
        str(SOUND): {"content": "<|endoftext11|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": slots}))
    (folder / "chat_template.jinja").write_text(MINI)
    return folder
