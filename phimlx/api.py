"""The Python API: `load` a model, then `Phi.generate` or `Phi.stream`.

Knows how the parts fit together; every part's work is its own module's.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from phimlx import catalog
from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import ConfigError, GenerationError, PromptError, TokenizerError, shortened
from phimlx.files import read_json
from phimlx.generation.engine import PromptCache, generate_tokens
from phimlx.generation.media_inputs import Beside, fill, name_slots, sources_in
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.generation.stop import StopStrings
from phimlx.generation.stream import Reply, Stream
from phimlx.hub.layout import model_name
from phimlx.hub.resolve import resolve
from phimlx.models.base import CausalLM
from phimlx.prompt.media_parts import FRAMES

if TYPE_CHECKING:
    from phimlx.generation.engine import Media
    from phimlx.media.limits import Limits
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer
    from phimlx.transcription import Piece

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]

# Tokens that end a reply in every model of the family that has them, whatever its config lists:
# phi-4's first release named only <|endoftext|>, and its chats never ended.
ENDS = ("<|endoftext|>", "<|end|>", "<|im_end|>")

# Control tokens that carry a reply's structure; every other one is left out of its text.
STRUCTURE = ("<think>", "</think>", "<|tool_call|>", "<|/tool_call|>")

MAX_CROPS = 100  # of one picture; the published model has 36


def load(
    source: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: str | mx.Dtype | None = None,
) -> Phi:
    """Load a model.

    Args:
        source: a name of the catalogue ("phi-4-mini", "nano"), a Hub id or a folder, in MLX or Hub
            layout; the catalogue's default where None.
        adapter: folder of a LoRA or DoRA, in mlx-lm's or PEFT's format, or of a full fine-tuning.
        dtype: "float32", "float16" or "bfloat16"; as stored where None.

    Raises:
        ModelNotFoundError: where it is not on this machine.
        ConfigError, CheckpointError: where the folder is not a whole Phi-4 model, or the adapter
            not one for it.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    return Phi(resolve(source), dtype, adapter)


class Phi:
    """A model with its tokenizer and chat template.

    Attributes:
        model: takes `input_ids` `[batch, length]`, returns logits `[batch, length, vocab]`.
        tokenizer: None where the folder has no tokenizer.json; then only token ids go in and out.
        config: the folder's config.json.
        context_length: tokens that prompt and reply may have together.
        sampling: the model's own sampling settings, used for what a call leaves out.
        eos: tokens that end a reply.
        slots: the tokens that stand for pictures and sounds; None where text alone is read.
    """

    def __init__(
        self, folder: Path, dtype: mx.Dtype | None = None, adapter: str | Path | None = None
    ) -> None:
        checkpoint = Checkpoint(folder)
        self.path = checkpoint.folder
        self.config = checkpoint.config
        self.model: CausalLM = load_model(checkpoint, dtype)
        if adapter is not None:
            from phimlx.adapters.attach import load_adapter

            load_adapter(self.model, adapter, self.path, self.config)
        known = catalog.by_config(self.config, model_name(self.path))
        self.name = known.alias if known else self.path.resolve().name
        self.context_length = self.model.config.max_position_embeddings
        slots = self.model.placeholders
        self.placeholders = None if slots is None else {"image": slots.image, "audio": slots.audio}
        self.tokenizer: Tokenizer | None = None
        if (self.path / "tokenizer.json").is_file():
            from phimlx.prompt.tokenizer.tokenizer import Tokenizer

            self.tokenizer = Tokenizer.load(self.path)
        self._template: ChatTemplate | None = None
        generation_config = read_json(self.path / "generation_config.json", missing_ok=True)
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
            from phimlx.prompt.chat_template import ChatTemplate

            self._template = ChatTemplate.load(
                self.path, self._text_tokenizer(), self.name, self.placeholders
            )
        return self._template

    @property
    def takes_media(self) -> bool:
        """Whether the model sees pictures and hears sounds."""
        return self.placeholders is not None

    def generate(self, prompt: Prompt = "", **options: Any) -> Reply:
        """The whole reply at once; arguments as for `stream`."""
        return self.stream(prompt, **options).whole()

    def stream(
        self,
        prompt: Prompt = "",
        *,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        frames: int = FRAMES,
        limits: Limits | None = None,
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
                (`{"role": "user", "content": "…"}`), or token ids, taken as they are. The
                content of a message may be a list of parts, see `phimlx.prompt.media_parts`. May be
                left out where there is audio: a spoken question.
            images: one or a list of them: path, https URL, bytes, PIL image or numpy array. They
                go before what the user said last; so does all the following.
            audio: one or a list of them: path, https URL, bytes or (samples, rate).
            video: one or a list of them: path, https URL or bytes. Needs the extra "video".
            frames: how many pictures each video becomes.
            limits: how large media may be; `phimlx.media.limits.Limits()` where None.
            max_tokens: of the reply; as many as the context holds where None.
            stop: texts that end the reply and are left out of it.
            seed: for the same reply again; drawn, and named in the reply, where None.
            tools: function definitions that the model may call.
            raw: take a text as it is, without template, its control tokens recognised.
            cache: from `new_cache`; what earlier calls with it computed is not computed again.
            on_prefill: called with the tokens computed and the tokens to compute.

        Raises:
            PromptError, TokenizerError: where the prompt cannot be made into tokens.
            MediaError: where a picture, sound or video cannot be read.
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
        beside = Beside(images, audio, video, frames, limits)
        tokens, media = self._read(prompt, beside, tools, raw)
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
        generated = generate_tokens(self.model, tokens, sampler, max_tokens, cache, report, media)
        stream = self._reply(generated, tokens, max_tokens, seed, stops, tools)
        return stream

    def generate_all(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        batch_size: int = 8,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Reply]:
        """The likeliest reply to each of many prompts without media, several at a time.

        Args:
            max_tokens: of each reply.
            batch_size: prompts that are answered together.
            advance: called with the number of prompts that have been answered.

        Raises:
            PromptError, TokenizerError, GenerationError: as `stream`.
        """
        from phimlx.generation.greedy import greedy

        read = [self.encode(prompt) for prompt in prompts]
        for tokens in read:
            self._room(len(tokens), max_tokens)
        replies = greedy(self.model, read, max_tokens, self.eos, batch_size, advance)
        return [
            self._reply((t for t in reply), tokens, max_tokens, 0, StopStrings(())).whole()
            for tokens, reply in zip(read, replies, strict=True)
        ]

    def transcribe(self, source: Any, **options: Any) -> Iterator[Piece]:
        """The speech in a recording of any length; see `phimlx.transcription`."""
        from phimlx.transcription import transcribe

        return transcribe(self, source, **options)

    def new_cache(self) -> PromptCache:
        """An empty cache for calls that build on each other, as the turns of a chat do."""
        return PromptCache(self.model)

    def encode(
        self,
        prompt: Prompt = "",
        *,
        images: Any = None,
        audio: Any = None,
        video: Any = None,
        frames: int = FRAMES,
        limits: Limits | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        raw: bool = False,
    ) -> list[int]:
        """The tokens of a prompt; arguments as for `stream`."""
        return self._read(prompt, Beside(images, audio, video, frames, limits), tools, raw)[0]

    def _read(
        self,
        prompt: Prompt,
        beside: Beside,
        tools: Sequence[Mapping[str, Any]] | None,
        raw: bool,
    ) -> tuple[list[int], Media | None]:
        """The tokens of a prompt, and what fills the slots among them."""
        from phimlx.prompt.media_parts import attach, no_media
        from phimlx.prompt.messages import read_messages

        if beside and self.placeholders is None:
            raise no_media(self.name)
        sources = beside.sources()
        if isinstance(prompt, str) and not raw:
            if not prompt and not sources["audio"]:
                raise PromptError("The prompt is empty.", hint="Say what the model is to do.")
            prompt = [{"role": "user", "content": prompt}]
        if len(prompt) == 0:
            raise PromptError("The prompt is empty.")
        if isinstance(prompt, str):
            names = self._text_tokenizer().control_tokens
            slots = self.placeholders
            text = name_slots(prompt, slots, names) if beside and slots else prompt
            ids = self._text_tokenizer().encode(text, control=True)
        elif all(isinstance(item, Mapping) for item in prompt):
            said = cast("Sequence[Mapping[str, Any]]", prompt)
            messages = read_messages(attach(said, sources["image"], sources["audio"]))
            sources = sources_in(messages)
            if self.placeholders is None and any(sources.values()):
                raise no_media(self.name)
            ids = self.template.encode(messages, tools)
        else:
            ids = self._checked(prompt)
        if self.placeholders is None or not any(sources.values()):
            return ids, None
        return fill(ids, self.placeholders, sources, beside.limits, self._picture_settings)

    @cached_property
    def _picture_settings(self) -> dict[str, int]:
        """What preprocessor_config.json says of how pictures are cut up."""
        path = self.path / "preprocessor_config.json"
        crops = read_json(path, missing_ok=True).get("dynamic_hd")
        if crops is None:
            return {}
        if type(crops) is not int or not 1 <= crops <= MAX_CROPS:
            raise ConfigError(
                f"{path.name}: dynamic_hd is {shortened(crops)}; it must be from 1 to {MAX_CROPS}."
            )
        return {"dynamic_hd": crops}

    def _reply(
        self,
        generated: Generator[int],
        prompt: list[int],
        max_tokens: int,
        seed: int,
        stops: StopStrings,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Stream:
        """The reply that tokens are, as they come."""
        return Stream(
            generated,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            seed=seed,
            eos=self.eos,
            stops=stops,
            tokenizer=self.tokenizer,
            hidden=self._hidden_tokens(),
            parser=self._parser(prompt, tools),
        )

    def _checked(self, items: Sequence[Any]) -> list[int]:
        """Token ids that were given as the prompt."""
        vocabulary = self.model.config.vocab_size
        for token in items:
            is_token = isinstance(token, int) and not isinstance(token, bool)
            if not is_token or not 0 <= token < vocabulary:
                raise PromptError(
                    f"The prompt holds {token!r}, which is no token of a vocabulary of "
                    f"{vocabulary}."
                )
        return list(items)

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
        from phimlx.prompt.reply_parser import ReplyParser

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
