"""A model as requests use it: alone, or with one of the adapters that were loaded beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from phimlx.errors import CacheError, ConfigError, GenerationError, shortened
from phimlx.generation.engine import Engine
from phimlx.generation.grammar.reply_form import Reasoning, ReplyForm
from phimlx.generation.prompt_reader import PromptReader
from phimlx.generation.reply import ReplyReader
from phimlx.generation.stop import StopStrings
from phimlx.hub.content_hash import Contents
from phimlx.models.base import CausalLM
from phimlx.models.lora import DEFAULT

if TYPE_CHECKING:
    from phimlx.generation.grammar.constraint import Constraint
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer

# Tokens that end a reply in every model of the family that has them, whatever its config lists:
# phi-4's first release named only <|endoftext|>, and its chats never ended.
STOP_TOKENS: tuple[str, ...] = ("<|endoftext|>", "<|end|>", "<|im_end|>")

# Control tokens that carry a reply's structure; every other one is left out of its text.
THINK = "<think>"
STRUCTURE = (THINK, "</think>", "<|tool_call|>", "<|/tool_call|>")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass
class Variant:
    """An adapter of a loaded model, or none, and all that goes with it.

    Attributes:
        adapter: by which name rows of the model choose it; None for the model alone.
        contents: its files; None for the model alone.
        reader: reads prompts, with the tokenizer that goes with it.
        stop_tokens: tokens that end a reply.
    """

    adapter: str | None
    contents: Contents | None
    reader: PromptReader
    stop_tokens: frozenset[int]

    def reply_reader(
        self,
        prompt: list[int],
        stops: StopStrings,
        calls: bool,
        said: str,
        plain: bool,
    ) -> ReplyReader | None:
        """Make what reads the reply to a prompt; None where there is no tokenizer.

        Args:
            calls: whether it may call tools.
            said: the text that the prompt ends with and the reply goes on with.
            plain: whether all of it is text, reasoning with its tags and calls, too.
        """
        tokenizer = self.reader.tokenizer
        if tokenizer is None:
            return None
        from phimlx.prompt.reply_parser import ReplyParser

        opened = self.reader.opens_reasoning(prompt)
        parser = ReplyParser(tools=calls, starts_in_reasoning=opened, said=said, plain=plain)
        control = tokenizer.control_tokens.items()
        hidden = frozenset(token for name, token in control if name not in STRUCTURE)
        return ReplyReader(tokenizer, parser, stops, hidden, at_start=not said)

    def constraint(
        self, form: ReplyForm, prompt: list[int], reasons: bool, said: str
    ) -> Constraint:
        """Hold a reply to its form, after the reasoning that it may begin with.

        Args:
            reasons: whether the model was trained to think before it answers.
            said: as `reply_reader` takes it.

        Raises:
            GrammarError: where no reply can be held to it, or one that begins so.
        """
        reasoning: Reasoning = "optional" if reasons else "none"
        if self.reader.opens_reasoning(prompt):
            reasoning = "opened"
        return self.reader.grammars(self.stop_tokens).hold(form, reasoning, said)


class Variants:
    """The variants of one model, by the names that requests give.

    `default` is the model with the adapter that it was loaded with, where it was with one, and None
    is the model alone.

    Args:
        folder: the model's.
        name: the model's, for people.
        configs: contents of its files that list tokens which end a reply, by name.
    """

    def __init__(
        self,
        model: CausalLM,
        folder: Path,
        name: str,
        configs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._model = model
        self._folder, self._name = folder, name
        self._configs = configs
        self._found: dict[str | None, Variant] = {}
        self._numbers = count(1)  # a name may come again, and caches must tell whose they are
        self._prompt_form: str | None = None

    def begin(self, adapter: Path | None) -> tuple[str, ...]:
        """Make the default variant.

        Args:
            adapter: folder of the one that the model is loaded with; None for none.

        Returns:
            Sentences on how it was read, for a person.

        Raises:
            ConfigError, CheckpointError: where it cannot be read, or was made for another model.
        """
        if adapter is None:
            self._found[DEFAULT] = self._found[None] = self._make(self._folder)
            return ()
        self._found[DEFAULT], remarks = self._load(adapter, DEFAULT)
        return remarks

    def load(self, folder: Path, name: str) -> tuple[str, ...]:
        """Load one more adapter; returned is, and errors are, as by `begin`.

        Raises:
            ConfigError: for a name that cannot be, or is taken.
            GenerationError: where the default adapter changes what all requests share.
        """
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(
                f"{shortened(name)} is no name of an adapter.",
                hint="Use at most 64 letters, digits, dots, dashes and underscores.",
            )
        if name in self._found:
            raise ConfigError(
                f"There is an adapter {name} already.", hint="Choose another name, or delete it."
            )
        self._found[name], remarks = self._load(folder, f"loaded-{next(self._numbers)}")
        return remarks

    def delete(self, name: str, engine: Engine) -> None:
        """Let go of an adapter.

        Args:
            engine: whose requests may use it.

        Raises:
            GenerationError: where there is none, it is the default one, or requests use it.
        """
        from phimlx.adapters.attach import delete_adapter

        variant = self.find(name)
        if variant.adapter in (None, DEFAULT):
            raise GenerationError("What the model was loaded with stays with it.")
        users = engine.users_of(variant.adapter)
        if users:
            raise GenerationError(
                f"The adapter {name} is in use by {users} request{'s' * (users > 1)}.",
                hint="Wait until they have ended, or cancel them.",
            )
        del self._found[name]
        delete_adapter(self._model, variant.adapter)
        mx.clear_cache()

    def find(self, name: Any) -> Variant:
        """Find the variant that a request names. Raises GenerationError where there is none."""
        if name is None and None not in self._found:
            self._model.check_adapter(None)
            self._found[None] = self._make(self._folder)
        if not isinstance(name, str | None) or name not in self._found:
            names = ", ".join(self.names)
            raise GenerationError(
                f"There is no adapter {shortened(name)}.",
                hint=f"Those that are loaded: {names}." if names else "None is loaded.",
            )
        return self._found[name]

    def contents_of(self, adapter: str | None) -> Contents | None:
        """Find the files of an adapter that a row used, as the model knows it; None for none.

        Raises:
            CacheError: where it has been deleted.
        """
        found = {each.adapter: each.contents for each in self._found.values()}
        if adapter is not None and adapter not in found:
            raise CacheError("The cache was made with an adapter that has been deleted.")
        return found.get(adapter)

    @property
    def default(self) -> Variant:
        return self._found[DEFAULT]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of adapters, for requests."""
        return tuple(name for name, each in self._found.items() if name and each.adapter)

    def use_form(self, name: str) -> None:
        """Write conversations in a published prompt form; errors as `PromptReader.use_form`."""
        for variant in self._found.values():
            variant.reader.use_form(name)
        self._prompt_form = name

    def _load(self, folder: Path, name: str) -> tuple[Variant, tuple[str, ...]]:
        """Put an adapter beside the model's layers; its variant, and remarks for a person."""
        from phimlx.adapters.attach import delete_adapter, load_adapter
        from phimlx.adapters.tokenizer import choose_tokenizer

        contents = Contents(folder)
        config = self._configs["config.json"]
        if self._model.leader is None:
            adapter = load_adapter(self._model, folder, self._folder, config, name)
        else:
            adapter = self._model.leader.load_adapter(self._model, folder, name)
        try:
            choice = choose_tokenizer(folder, self._folder, self._model.config.vocab_size)
            variant = self._make(choice.folder, choice.stop, name, contents)
        except BaseException:
            delete_adapter(self._model, name)
            raise
        return variant, (*adapter.remarks, *choice.remarks)

    def _make(
        self,
        folder: Path,
        stop: tuple[str, ...] = (),
        adapter: str | None = None,
        contents: Contents | None = None,
    ) -> Variant:
        """Make a variant with the tokenizer in a folder, read once."""
        readers = (each.reader for each in self._found.values())
        reader = next((reader for reader in readers if reader.folder == folder), None)
        if reader is None:
            reader = PromptReader(folder, self._name, self._model, self._folder)
            if self._prompt_form is not None:
                reader.use_form(self._prompt_form)
        stops = _read_stop_tokens(self._configs, reader.tokenizer, STOP_TOKENS + stop)
        return Variant(adapter, contents, reader, stops)


def _read_stop_tokens(
    configs: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer | None, names: Sequence[str]
) -> frozenset[int]:
    """Collect the tokens that configs list, and control tokens by name.

    Raises:
        ConfigError: where what is listed is no token.
    """
    found: set[int] = set()
    for place, config in configs.items():
        value = config.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
            raise ConfigError(
                f"{place}: eos_token_id is {shortened(value)}, not a token or a list."
            )
        found.update(listed)
    control = tokenizer.control_tokens if tokenizer else {}
    found.update(control[name] for name in names if name in control)
    return frozenset(found)
