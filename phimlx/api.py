"""The Python API: `load` a model, then `Phi.generate` or `Phi.stream`.

Knows how the parts fit together; every part's work is its own module's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from phimlx import catalog, hub
from phimlx.checkpoint import DTYPES, Checkpoint, load_model, read_json
from phimlx.errors import ConfigError, GenerationError, PromptError, TokenizerError
from phimlx.generation.engine import PromptCache, generate_tokens
from phimlx.generation.reply import Reply, Stream
from phimlx.generation.sampling import Sampler, Sampling
from phimlx.generation.stops import StopStrings
from phimlx.models.phi3 import Phi3ForCausalLM

if TYPE_CHECKING:
    from phimlx.prompt.chat import ChatTemplate
    from phimlx.prompt.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

# Tokens that end a reply in every model of the family that has them, whatever its config lists:
# phi-4's first release named only <|endoftext|>, and its chats never ended.
ENDS = ("<|endoftext|>", "<|end|>", "<|im_end|>")

# Control tokens that carry a reply's structure; every other one is left out of its text.
STRUCTURE = ("<think>", "</think>", "<|tool_call|>", "<|/tool_call|>")


def load(source: str | Path | None = None, dtype: str | mx.Dtype | None = None) -> Phi:
    """Load a model.

    Args:
        source: a name of the catalogue ("phi-4-mini", "nano"), a Hub id or a folder, in MLX or Hub
            layout; the catalogue's default where None.
        dtype: "float32", "float16" or "bfloat16"; as stored where None.

    Raises:
        ModelNotFoundError: where it is not on this machine.
        ConfigError, CheckpointError: where the folder is not a whole Phi-4 model.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    return Phi(hub.resolve(source), dtype)


class Phi:
    """A model with its tokenizer and chat template.

    Attributes:
        model: takes `input_ids` `[batch, length]`, returns logits `[batch, length, vocab]`.
        tokenizer: None where the folder has no tokenizer.json; then only token ids go in and out.
        config: the folder's config.json.
        context_length: tokens that prompt and reply may have together.
        sampling: the model's own sampling settings, used for what a call leaves out.
        eos: tokens that end a reply.
    """

    def __init__(self, folder: Path, dtype: mx.Dtype | None = None) -> None:
        checkpoint = Checkpoint(folder)
        self.path = checkpoint.folder
        self.config = checkpoint.config
        self.model: Phi3ForCausalLM = load_model(checkpoint, dtype)
        known = catalog.by_config(self.config, self.path)
        self.name = known.alias if known else self.path.resolve().name
        self.context_length = self.model.config.max_position_embeddings
        self.tokenizer: Tokenizer | None = None
        if (self.path / "tokenizer.json").is_file():
            from phimlx.prompt.tokenizer import Tokenizer

            self.tokenizer = Tokenizer.load(self.path)
        self._template: ChatTemplate | None = None
        settings = self.path / "generation_config.json"
        generation_config = read_json(settings) if settings.is_file() else {}
        usual = known.sampling if known else {}
        self.sampling = Sampling.defaults(generation_config, usual)
        self.eos = self._end_tokens(generation_config)

    @property
    def template(self) -> ChatTemplate:
        """The chat template, read when it is first needed.

        Raises:
            TokenizerError, PromptError: where the folder has no tokenizer or no template.
        """
        if self._template is None:
            from phimlx.prompt.chat import ChatTemplate

            self._template = ChatTemplate.load(self.path, self._text_tokenizer(), self.name)
        return self._template

    def generate(self, prompt: Prompt, **options: Any) -> Reply:
        """The whole reply at once; arguments as for `stream`."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.reply

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        raw: bool = False,
        cache: PromptCache | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> Stream:
        """Start a reply and hand it over piece by piece.

        Everything is checked here; the model starts with the first piece.

        Args:
            prompt: a text (one user message), a list of messages
                (`{"role": "user", "content": "…"}`), or token ids, taken as they are.
            max_tokens: of the reply; as many as the context holds where None.
            stop: texts that end the reply and are left out of it.
            seed: for the same reply again; drawn, and named in the reply, where None.
            tools: function definitions that the model may call.
            raw: take a text as it is, without template, its control tokens recognised.
            cache: from `new_cache`; what earlier calls with it computed is not computed again.
            on_prefill: called with the tokens computed and the tokens to compute.

        Raises:
            PromptError, TokenizerError: where the prompt cannot be made into tokens.
            GenerationError: where it does not fit the context, or a setting is out of range.
        """
        sampling = self.sampling.override(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        )
        stops = StopStrings(stop)
        if stops.stops:
            self._text_tokenizer()
        tokens = self.encode(prompt, tools=tools, raw=raw)
        max_tokens = self._room(len(tokens), max_tokens)
        if seed is None:
            seed = secrets.randbits(32)
        elif isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise GenerationError(f"seed is {seed!r}; it must be a whole number, 0 or more.")
        cache = cache or self.new_cache()

        def report(computed: int, to_compute: int) -> None:
            stream.reply.stats.cached_tokens = len(tokens) - to_compute
            if on_prefill is not None:
                on_prefill(computed, to_compute)

        sampler = Sampler(sampling, seed, tokens)
        stream = Stream(
            generate_tokens(self.model, tokens, sampler, max_tokens, cache, report),
            prompt_tokens=len(tokens),
            max_tokens=max_tokens,
            seed=seed,
            eos=self.eos,
            stops=stops,
            tokenizer=self.tokenizer,
            hidden=self._hidden_tokens(),
            parser=self._parser(tokens, tools),
        )
        return stream

    def new_cache(self) -> PromptCache:
        """An empty cache for calls that build on each other, as the turns of a chat do."""
        return PromptCache(self.model)

    def encode(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        raw: bool = False,
    ) -> list[int]:
        """The tokens of a prompt; arguments as for `stream`."""
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("The prompt is empty.")
            if raw:
                return self._text_tokenizer().encode(prompt, control=True)
            return self.template.encode([{"role": "user", "content": prompt}], tools)
        items = list(prompt)
        if not items:
            raise PromptError("The prompt is empty.")
        if all(isinstance(item, Mapping) for item in items):
            return self.template.encode([dict(item) for item in items], tools)  # type: ignore[call-overload]
        vocabulary = self.model.config.vocab_size
        for token in items:
            is_token = isinstance(token, int) and not isinstance(token, bool)
            if not is_token or not 0 <= token < vocabulary:  # type: ignore[operator]
                raise PromptError(
                    f"The prompt holds {token!r}, which is no token of a vocabulary of "
                    f"{vocabulary}."
                )
        return items  # type: ignore[return-value]

    def _room(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens the reply may have."""
        room = self.context_length - prompt_tokens
        if max_tokens is None:
            if room < 1:
                raise GenerationError(
                    f"The prompt has {prompt_tokens:,} tokens, but {self.name} holds "
                    f"{self.context_length:,} for prompt and reply together.",
                    hint="Shorten the prompt.",
                )
            return room
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise GenerationError(f"max_tokens is {max_tokens!r}; it must be 1 or more.")
        if max_tokens > room:
            raise GenerationError(
                f"The prompt has {prompt_tokens:,} tokens and the reply may have {max_tokens:,}: "
                f"{prompt_tokens + max_tokens:,} together, but {self.name} holds "
                f"{self.context_length:,}.",
                hint="Shorten the prompt, or lower max_tokens.",
            )
        return max_tokens

    def _parser(self, tokens: list[int], tools: Sequence[Mapping[str, Any]] | None) -> Any:
        if self.tokenizer is None:
            return None
        from phimlx.prompt.reply import ReplyParser

        opened = self.tokenizer.decode(tokens[-4:]).rstrip().endswith("<think>")
        return ReplyParser(tools=bool(tools), starts_in_reasoning=opened)

    def _hidden_tokens(self) -> frozenset[int]:
        control = self.tokenizer.control_tokens if self.tokenizer else {}
        return frozenset(token for name, token in control.items() if name not in STRUCTURE)

    def _end_tokens(self, generation_config: Mapping[str, Any]) -> frozenset[int]:
        ends: set[int] = set()
        for place, config in (
            ("config.json", self.config),
            ("generation_config.json", generation_config),
        ):
            value = config.get("eos_token_id")
            listed = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(token, bool) or not isinstance(token, int) for token in listed):
                raise ConfigError(f"{place}: eos_token_id is {value!r}, not a token or a list.")
            ends.update(listed)
        control = self.tokenizer.control_tokens if self.tokenizer else {}
        ends.update(control[name] for name in ENDS if name in control)
        return frozenset(ends)

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.path} holds no tokenizer.json, so it takes and gives token ids only.",
                hint="Give the prompt as a list of ids, or add the tokenizer files to the folder.",
            )
        return self.tokenizer
