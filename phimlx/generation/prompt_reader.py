"""Prompts in every form that a caller may give them, to token ids and prepared media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phimlx.errors import ConfigError, PromptError, TokenizerError, shortened
from phimlx.files import read_json
from phimlx.generation.media_inputs import fill, name_placeholders, sources_in
from phimlx.generation.options import PromptOptions
from phimlx.generation.placed_media import Media
from phimlx.prompt.media_parts import PlaceholderTokens

if TYPE_CHECKING:
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text (one user message), token ids taken as they are, or a list of messages; the content of a
message may be a list of parts, see `phimlx.prompt.media_parts`."""

MAX_CROPS = 100  # of one image; the published model has 36


class PromptReader:
    """Reads prompts for one model folder.

    Attributes:
        tokenizer: None where the folder holds none; then only token ids go in and out.
    """

    def __init__(
        self, folder: Path, name: str, vocab_size: int, placeholders: PlaceholderTokens | None
    ) -> None:
        """`placeholders`: tokens that stand for images and sounds; None where text alone is read.

        Raises:
            TokenizerError: where there is a tokenizer that cannot be used.
        """
        self.folder = folder
        self.name = name
        self.placeholders = placeholders
        self._vocab_size = vocab_size
        self._form: str | None = None
        from phimlx.prompt.tokenizer.tokenizer import Tokenizer, has_tokenizer

        self.tokenizer = Tokenizer.load(folder) if has_tokenizer(folder) else None

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, read when it is first needed.

        Raises:
            TokenizerError, PromptError: where the folder has no tokenizer or no template.
        """
        from phimlx.prompt.chat_template import ChatTemplate

        return ChatTemplate.load(
            self.folder, self.text_tokenizer(), self.name, self.placeholders, self._form
        )

    def use_form(self, name: str) -> None:
        """Write conversations in a published prompt form, whatever the folder's own template.

        Raises:
            PromptError: where no form has that name.
        """
        from phimlx.prompt.published_templates import named_template

        self._form = named_template(name).name
        self.__dict__.pop("template", None)

    def stop_strings(self, prompt: Prompt, options: PromptOptions) -> tuple[str, ...]:
        """Texts that end a reply in the form that the prompt is written in."""
        written = isinstance(prompt, str) and not options.raw
        written = written or any(isinstance(item, Mapping) for item in prompt[:1])
        return self.template.stop if written else ()

    def said(self, prompt: Prompt, options: PromptOptions) -> str:
        """What the reply's turn already says, of a prompt that has been read."""
        if not options.continue_final_message:
            return ""
        from phimlx.prompt.messages import read_messages

        return read_messages(cast("Sequence[Mapping[str, Any]]", prompt))[-1].content

    def opens_reasoning(self, ids: Sequence[int]) -> bool:
        """Whether a prompt has begun the reply's reasoning, with a token or in letters."""
        return self.text_tokenizer().decode(ids[-8:]).rstrip().endswith("<think>")

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises TokenizerError where there is none."""
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.folder} holds no tokenizer.json, so it takes and gives token ids only.",
                hint="Give the prompt as a list of ids, or add the tokenizer files to the folder.",
            )
        return self.tokenizer

    def read(self, prompt: Prompt, options: PromptOptions) -> tuple[list[int], Media | None]:
        """The tokens of a prompt, and what stands at the placeholders among them.

        Raises:
            PromptError, TokenizerError: where the prompt cannot be made into tokens.
            MediaError: where an image, sound or video cannot be read.
        """
        from phimlx.prompt.media_parts import attach, no_media
        from phimlx.prompt.messages import read_messages

        if options.has_media and self.placeholders is None:
            raise no_media(self.name)
        sources = options.sources()
        if isinstance(prompt, str) and not options.raw:
            if not prompt and not sources["audio"]:
                raise PromptError("The prompt is empty.", hint="Say what the model is to do.")
            prompt = [{"role": "user", "content": prompt}]
        if len(prompt) == 0:
            raise PromptError("The prompt is empty.")
        messages_given = all(isinstance(item, Mapping) for item in prompt)
        if options.continue_final_message and not messages_given:
            raise PromptError(
                "continue_final_message needs messages, of which the last is the assistant's.",
                hint="Give a raw text as far as it is to go: it is continued in any case.",
            )
        if isinstance(prompt, str):
            ids = self._encode_raw(prompt, options)
        elif messages_given:
            said = cast("Sequence[Mapping[str, Any]]", prompt)
            messages = read_messages(attach(said, sources["image"], sources["audio"]))
            sources = sources_in(messages)
            if self.placeholders is None and any(sources.values()):
                raise no_media(self.name)
            continues = options.continue_final_message
            ids = self.template.encode(messages, options.tools, True, continues)
        else:
            ids = self._checked(prompt)
        if self.placeholders is None or not any(sources.values()):
            return ids, None
        return fill(ids, self.placeholders, sources, options.limits, self._image_settings)

    def _encode_raw(self, text: str, options: PromptOptions) -> list[int]:
        tokenizer = self.text_tokenizer()
        if options.has_media and self.placeholders is not None:
            text = name_placeholders(text, self.placeholders, tokenizer.control_tokens)
        return tokenizer.encode(text, control=True)

    def _checked(self, items: Sequence[Any]) -> list[int]:
        """Token ids that were given as the prompt."""
        for token in items:
            is_token = isinstance(token, int) and not isinstance(token, bool)
            if not is_token or not 0 <= token < self._vocab_size:
                raise PromptError(
                    f"The prompt holds {shortened(token)}, which is no token of a vocabulary of "
                    f"{self._vocab_size}."
                )
        return list(items)

    @cached_property
    def _image_settings(self) -> dict[str, int]:
        """Settings for cutting up images, from preprocessor_config.json."""
        path = self.folder / "preprocessor_config.json"
        crops = read_json(path, missing_ok=True).get("dynamic_hd")
        if crops is None:
            return {}
        if type(crops) is not int or not 1 <= crops <= MAX_CROPS:
            raise ConfigError(
                f"{path.name}: dynamic_hd is {shortened(crops)}; it must be from 1 to {MAX_CROPS}."
            )
        return {"dynamic_hd": crops}
