"""Prompts in every form that a caller may give them, to token ids and prepared media."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from phimlx.errors import PromptError, TokenizerError, shortened
from phimlx.files import read_json
from phimlx.generation.grammar.compiler import GrammarCompiler
from phimlx.generation.media_inputs import Prepared, fill, name_placeholders, sources_in
from phimlx.generation.options import PromptOptions
from phimlx.generation.placed_media import Media
from phimlx.models.base import CausalLM
from phimlx.prompt.media_parts import PlaceholderTokens, no_media

if TYPE_CHECKING:
    from phimlx.media.limits import Limits
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text (one user message), token ids taken as they are, or a list of messages; the content of a
message may be a list of parts, see `phimlx.prompt.media_parts`."""


class PromptReader:
    """Reads prompts for one model folder.

    Attributes:
        tokenizer: None where the folder holds none; then only token ids go in and out.
    """

    def __init__(self, folder: Path, name: str, model: CausalLM, model_folder: Path) -> None:
        """`folder` has the tokenizer and template for `model`, which people call `name`, and
        `model_folder` what it says of pictures.

        Raises:
            TokenizerError: where there is a tokenizer that cannot be used.
        """
        self.folder = folder
        self.name = name
        self._model_folder = model_folder
        places = model.placeholders
        self.placeholders: PlaceholderTokens | None = None if places is None else places.by_kind
        self._vocab_size = model.config.vocab_size
        self._longest_with_media = model.longest_with_media
        self._architecture = model.architecture
        self._form: str | None = None
        self._grammars: dict[frozenset[int], GrammarCompiler] = {}
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
            self.folder,
            self._media_tokenizer,
            self.name,
            self.placeholders,
            self._form,
            self._architecture.after_media,
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

    def grammars(self, stop_tokens: frozenset[int]) -> GrammarCompiler:
        """What compiles grammars for this tokenizer, made once for the tokens that end a reply.

        Raises:
            TokenizerError: where the folder holds no tokenizer.
        """
        if stop_tokens not in self._grammars:
            tokenizer = self.text_tokenizer()
            self._grammars[stop_tokens] = GrammarCompiler(tokenizer, self._vocab_size, stop_tokens)
        return self._grammars[stop_tokens]

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

    @cached_property
    def _media_tokenizer(self) -> Tokenizer:
        """The tokenizer, to which the texts that stand for media are control tokens."""
        texts, tokens = self._architecture.placeholder_texts, self.placeholders or {}
        return self.text_tokenizer().extended({text: tokens[kind] for kind, text in texts.items()})

    def read(self, prompt: Prompt, options: PromptOptions) -> tuple[list[int], Media | None]:
        """The tokens of a prompt, and what stands at the placeholders among them.

        Raises:
            PromptError, TokenizerError: where the prompt cannot be made into tokens.
            MediaError: where an image, sound or video cannot be read.
        """
        from phimlx.prompt.media_parts import attach
        from phimlx.prompt.messages import read_messages
        from phimlx.prompt.reasoning import AUTO, opening

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
        continues = options.continue_final_message
        if continues and not messages_given:
            raise PromptError(
                "continue_final_message needs messages, of which the last is the assistant's.",
                hint="Give a raw text as far as it is to go: it is continued in any case.",
            )
        if options.reasoning != AUTO and (continues or not messages_given):
            raise PromptError(
                "The prompt says itself how the reply begins, so reasoning cannot be "
                f"{options.reasoning}.",
                hint="Give messages, and leave all of the reply to the model.",
            )
        if isinstance(prompt, str):
            ids = self._encode_raw(prompt, options)
        elif messages_given:
            said = cast("Sequence[Mapping[str, Any]]", prompt)
            messages = read_messages(attach(said, sources["image"], sources["audio"]))
            sources = sources_in(messages)
            self._check_kinds(sources)
            begun = opening(options.reasoning, self.template, self.name)
            ids = self.template.encode(messages, options.tools, True, continues, begun)
        else:
            ids = self._checked(prompt)
        self._check_kinds(sources)
        if self.placeholders is None or not any(sources.values()):
            return ids, None
        longest = self._longest_with_media
        prepare = self._prepare_images
        return fill(ids, self.placeholders, sources, options.limits, prepare, longest)

    def _check_kinds(self, sources: Mapping[str, Sequence[Any]]) -> None:
        """Raise PromptError for media of a kind that the model does not take."""
        taken = self.placeholders or {}
        if any(found and kind not in taken for kind, found in sources.items()):
            raise no_media(self.name, sees=bool(taken))

    def _encode_raw(self, text: str, options: PromptOptions) -> list[int]:
        if not options.has_media or self.placeholders is None:
            return self.text_tokenizer().encode(text, control=True)
        tokenizer = self._media_tokenizer
        text = name_placeholders(text, self.placeholders, tokenizer.control_tokens)
        return tokenizer.encode(text, control=True)

    def _checked(self, items: Sequence[Any]) -> list[int]:
        """Token ids that were given as the prompt."""
        stand_for_media = (self.placeholders or {}).values()
        for token in items:
            is_token = isinstance(token, int) and not isinstance(token, bool)
            known = is_token and (0 <= token < self._vocab_size or token in stand_for_media)
            if not known:
                raise PromptError(
                    f"The prompt holds {shortened(token)}, which is no token of a vocabulary of "
                    f"{self._vocab_size}."
                )
        return list(items)

    def _prepare_images(self, sources: Sequence[Any], limits: Limits | None) -> Prepared:
        """Prepare images as preprocessor_config.json says."""
        settings = read_json(self._model_folder / "preprocessor_config.json", missing_ok=True)
        prepared: Prepared = self._architecture.prepare_images(settings)(sources, limits)
        return prepared
