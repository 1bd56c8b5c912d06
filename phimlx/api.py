"""The Python API: `load` a model, then `Phi.generate` or `Phi.stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from phimlx import catalog
from phimlx.adapters.variants import THINK, Variants
from phimlx.checkpoint.folder import DTYPES, Checkpoint
from phimlx.checkpoint.load import load_model
from phimlx.errors import (
    CacheError,
    ConfigError,
    ContextLengthError,
    GenerationError,
    shortened,
)
from phimlx.files import translate_read_errors
from phimlx.generation.engine import Engine
from phimlx.generation.generation_config import GenerationConfig
from phimlx.generation.grammar.reply_form import ReplyForm
from phimlx.generation.grammar.schema import answer_reader
from phimlx.generation.options import SEEDS, GenerationOptions, PromptOptions
from phimlx.generation.prompt_cache import PromptCache
from phimlx.generation.prompt_reader import Prompt, PromptReader
from phimlx.generation.reply import Reply
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.generation.stop import StopStrings
from phimlx.generation.stream import Stream
from phimlx.hub.content_hash import Contents
from phimlx.hub.layout import model_name
from phimlx.hub.resolve import resolve, resolve_adapter
from phimlx.machine.kv_bits import check_kv_bits
from phimlx.machine.pass_cost import load_curve
from phimlx.models.base import CausalLM
from phimlx.models.lora import DEFAULT
from phimlx.preferences.file import read_alias
from phimlx.shared_model import Machines, Peers
from phimlx.tools.chat import Chats

if TYPE_CHECKING:
    from phimlx.generation.placed_media import Media
    from phimlx.generation.prefix_file import Source
    from phimlx.generation.prefix_store import PrefixStore
    from phimlx.prompt.chat_template import ChatTemplate
    from phimlx.prompt.tokenizer.tokenizer import Tokenizer
    from phimlx.transcription import TranscriptSegment

GREEDY = Sampling()


def load(
    source: str | Path | None = None,
    adapter: str | Path | None = None,
    dtype: str | mx.Dtype | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    machines: Machines | Peers | None = None,
) -> Phi:
    """Load a model.

    Args:
        source: a name of the catalogue ("phi-4-mini", "nano") or of the user's own, a Hub id or a
            folder, in MLX or Hub layout; the catalogue's default where None.
        adapter: folder or Hub id of a LoRA or DoRA, in mlx-lm's or PEFT's format, or of a full
            fine-tuning; that of the user's own name where None.
        dtype: "float32", "float16" or "bfloat16"; as stored where None.
        rope_scaling: reaches further than the model was trained, as in a config:
            `{"rope_type": "yarn", "factor": 4.0}`, "linear" or "dynamic". It is another model then
            than the published one.
        machines: which share the model, each with a part of its weights; this one leads, or none
            does.

    Raises:
        ModelNotFoundError: where it is not on this machine.
        ConfigError, CheckpointError: where the folder is not a whole Phi-4 model, or the adapter
            not one for it; where the machines cannot share it.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    if adapter is None and source is not None:
        adapter = read_alias(source).get("adapter")
    if machines is None:
        return Phi(resolve(source), dtype, adapter, rope_scaling)
    folder = None if adapter is None else resolve_adapter(adapter)
    load_part = partial(machines.load, source, rope_scaling, folder)
    return Phi(resolve(source), dtype, folder, rope_scaling, load_part)


class Phi(Chats):
    """A model with its tokenizer and chat template.

    Attributes:
        model: takes `input_ids` `[batch, length]`, returns logits `[batch, length, vocab]`.
        engine: generates the replies.
        tokenizer: None where the folder holds none; then only token ids go in and out.
        config: the folder's config.json.
        context_length: tokens that prompt and reply may have together.
        sampling: the model's own sampling settings, used for what a call leaves out.
        is_base: whether the model was trained to complete text, not to answer.
        reasons: whether the model was trained to think before it answers.
        chat_form: the prompt form in which such a model writes conversations; None for its usual.
        remarks: what of its generation_config.json could not be understood, and how an adapter
            was read.
        placeholders: the tokens that stand for images and sounds, of the kinds that the model
            takes; None where text alone is read.
    """

    def __init__(
        self,
        folder: Path,
        dtype: mx.Dtype | None = None,
        adapter: str | Path | None = None,
        rope_scaling: Mapping[str, Any] | None = None,
        load_weights: Callable[[Checkpoint, mx.Dtype | None], CausalLM] = load_model,
    ) -> None:
        checkpoint = Checkpoint(folder, rope_scaling)
        self.path = checkpoint.folder
        self._contents = Contents(self.path, checkpoint.files)
        self.model: CausalLM = load_weights(checkpoint, dtype)
        self.config = checkpoint.config
        known = catalog.by_config(self.config, model_name(self.path))
        self.name = known.alias if known else self.path.resolve().name
        self.is_base = known is not None and known.base
        self.chat_form = known.chat_form if known else None
        self.context_length = self.model.config.max_position_embeddings
        tokens = self.model.placeholders
        self.placeholders = None if tokens is None else tokens.by_kind
        generation_config = GenerationConfig.read(self.path)
        configs = {
            "config.json": self.config,
            "generation_config.json": generation_config.values,
        }
        self._variants = Variants(self.model, self.path, self.name, configs)
        remarks = self._variants.begin(None if adapter is None else resolve_adapter(adapter))
        self.engine = Engine(self.model, load_curve(self.model).cost)
        self.remarks = (*remarks, *generation_config.remarks)
        usual = known.sampling if known else {}
        self.sampling = Sampling.defaults(generation_config.values, usual)
        thinks = self.tokenizer is not None and THINK in self.tokenizer.control_tokens
        self.reasons = thinks or (known is not None and known.reasoning)

    def load_adapter(self, source: str | Path, name: str) -> tuple[str, ...]:
        """Load one more adapter, for requests that name it: `generate(…, adapter=name)`.

        The model is there once, and requests with any of its adapters share forward passes.

        Args:
            source: folder or Hub id of a LoRA or DoRA of the layers' projections.
            name: letters, digits, dots, dashes and underscores.

        Returns:
            Sentences on how it was read, for a person.

        Raises:
            ConfigError, CheckpointError: for a name that cannot be or is taken, and as `load`.
            ModelNotFoundError: where it is not on this machine.
        """
        return self._variants.load(resolve_adapter(source), name)

    def delete_adapter(self, name: str) -> None:
        """Let go of an adapter that `load_adapter` loaded, and of its memory.

        Raises:
            GenerationError: where there is none, or requests use it.
        """
        self._variants.delete(name, self.engine)
        self.engine.forget_prefixes()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that a request may use."""
        return self._variants.names

    @property
    def eos(self) -> frozenset[int]:
        """Tokens that end a reply."""
        return self._variants.default.stop_tokens

    @eos.setter
    def eos(self, tokens: frozenset[int]) -> None:
        self._variants.default.stop_tokens = tokens

    @property
    def _reader(self) -> PromptReader:
        return self._variants.default.reader

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._reader.tokenizer

    @property
    def template(self) -> ChatTemplate:
        """The chat template, read when it is first needed.

        Raises:
            TokenizerError, PromptError: where the folder has no tokenizer or no template.
        """
        return self._reader.template

    @property
    def takes_media(self) -> bool:
        """Whether the model takes more than text."""
        return self.placeholders is not None

    @property
    def hears(self) -> bool:
        """Whether the model takes sounds."""
        return "audio" in (self.placeholders or {})

    def stamp(self, adapter: str | None = DEFAULT) -> str:
        """Tell the model's files from any others, and an adapter's, as they were when loaded."""
        files = self._variants.contents_of(self._variants.find(adapter).adapter)
        return self._contents.stamp + ("" if files is None else f"+{files.stamp}")

    def use_prompt_form(self, name: str) -> None:
        """Write conversations in a published prompt form, such as "phi-2-chat".

        Raises:
            PromptError: where no form has that name.
        """
        self._variants.use_form(name)

    def generate(self, prompt: Prompt = "", **options: Any) -> Reply:
        """Generate a whole reply; arguments as for `stream`."""
        return self.stream(prompt, **options).result()

    def stream(self, prompt: Prompt = "", **options: Any) -> Stream:
        """Start a reply and hand it over chunk by chunk.

        Everything is checked here; the model starts with the first chunk.

        Args:
            prompt: a text (one user message), a list of messages
                (`{"role": "user", "content": "…"}`), or token ids, taken as they are. May be left
                out where there is audio: a spoken question.
            options: images, audio, video, frames, limits, tools, raw, continue_final_message,
                reasoning, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty,
                presence_penalty, frequency_penalty, logit_bias, logprobs, top_logprobs,
                prompt_logprobs, stop, seed, cache, kv_bits, on_prefill, prompt_lookup, schema,
                regex, grammar, tool_choice, plain, adapter; see
                `phimlx.generation.options.GenerationOptions`.

        Raises:
            PromptError, TokenizerError: where the prompt cannot be made into tokens.
            MediaError: where an image, sound or video cannot be read.
            GenerationError: where it does not fit the context, or a setting is out of range.
        """
        return Stream(self.engine, self.request(prompt, GenerationOptions(**options)))

    def generate_all(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int,
        media: Sequence[Media | None] = (),
        batch_size: int = 8,
        kv_bits: int | None = None,
        adapter: str | None = DEFAULT,
        advance: Callable[[int], object] = lambda count: None,
    ) -> list[Reply]:
        """Generate the greedy replies to many prompts, several at a time.

        Args:
            max_tokens: of each reply.
            media: what stands among the tokens of each prompt, where that is given as ids.
            batch_size: prompts that are answered together.
            kv_bits, adapter: as for `stream`.
            advance: called with the number of prompts that have been answered.

        Raises:
            PromptError, TokenizerError, GenerationError: as `stream`.
        """
        options = GenerationOptions(max_tokens=max_tokens, seed=0, kv_bits=kv_bits, adapter=adapter)
        requests = [self.request(prompt, options, GREEDY) for prompt in prompts]
        for request, shown in zip(requests, media, strict=False):
            request.media = shown
        self.engine.run_all(requests, batch_size, advance)
        return [request.reply for request in requests]

    def transcribe(self, source: Any, **options: Any) -> Iterator[TranscriptSegment]:
        """Transcribe the speech in a recording of any length; see `phimlx.transcription`."""
        from phimlx.transcription import transcribe

        return transcribe(self, source, **options)

    def new_cache(
        self, kv_bits: int | None = None, prefixes: PrefixStore | None = None
    ) -> PromptCache:
        """Make an empty cache for calls that build on each other, as the turns of a chat do.

        Args:
            kv_bits: 8 or 4, to hold keys and values quantized: half or a quarter of the memory,
                and a little less exact. As they come where None.
            prefixes: from `prefix_store`; what it keeps of a prompt is not computed again.

        Raises:
            GenerationError: for other bits, or where the model's heads cannot be quantized.
        """
        return PromptCache(self.model, kv_bits, prefixes)

    def save_cache(self, cache: PromptCache, path: str | Path) -> None:
        """Write a cache to a file, which `load_cache` reads in another process.

        The file tells what was asked and said; its owner alone may read it. Weights that were
        changed in memory are not noticed: the file would be taken for one of the model's own.

        Raises:
            GenerationError: where the cache is another model's.
            CacheError: for an empty cache, where the model's files have changed since it was
                loaded, or where the file cannot be written.
        """
        from phimlx.generation.prefix_file import write_prefix

        self._check_whole()
        cache.check(self.model)
        adapter = cache.kv.loaded[0] if cache.kv.loaded else None
        write_prefix(Path(path), cache, self._source(adapter))

    def load_cache(self, path: str | Path, adapter: str | None = DEFAULT) -> PromptCache:
        """Read a cache that `save_cache` wrote with this model, adapter, dtype and version.

        Args:
            adapter: that it was made with, by its name here.

        Raises:
            GenerationError: where there is no such adapter.
            CacheError: where the file is missing, damaged, or of anything else.
        """
        from phimlx.generation.prefix_file import read_prefix

        self._check_whole()
        loaded = self._variants.find(adapter).adapter
        return read_prefix(Path(path), self.model, self._source(loaded), loaded)

    def prefix_store(
        self, note: Callable[[str], object] = lambda text: None, **settings: Any
    ) -> PrefixStore | None:
        """Open the store of long prompts in the cache folder; None where its limit is 0, and where
        machines share the model, none of which has whole keys and values.

        `store.save(cache)` keeps what a cache holds; `new_cache(prefixes=store)` finds it again.

        Args:
            note: called with a sentence where something kept is of no use, or nothing can be kept.
            settings: folder, limit, min_tokens; see `phimlx.generation.prefix_store.PrefixStore`.

        Raises:
            SettingsError: where PHIMLX_CACHE_LIMIT is no number.
        """
        from phimlx.generation.prefix_store import PrefixStore

        if self.model.leader is not None:
            return None
        store = PrefixStore(self.model, self._source, note, **settings)
        return store if store.limit else None

    def _check_whole(self) -> None:
        if self.model.leader is not None:
            raise CacheError(
                "Machines share the model, and none has keys and values of its own to keep in a "
                "file.",
                hint="Load the model on one machine for that.",
            )

    def _source(self, adapter: str | None) -> Source:
        """Tell the model from others; reads its files where nobody knows what they hold.

        Args:
            adapter: that a row uses, as the model knows it.

        Raises:
            CacheError: where they have changed since the model was loaded, or cannot be read, or
                the adapter has been deleted.
        """
        from phimlx.generation.prefix_file import Source

        files = self._variants.contents_of(adapter)
        with translate_read_errors(self.path, CacheError):
            return Source(
                self._contents.digest,
                None if files is None else files.digest,
                self.name if catalog.find(self.name) else model_name(self.path),
                str(self.path.resolve()),
            )

    def encode(
        self, prompt: Prompt = "", adapter: str | None = DEFAULT, **options: Any
    ) -> list[int]:
        """Encode a prompt as tokens.

        Args:
            prompt, adapter: as for `stream`.
            options: images, audio, video, frames, limits, tools, raw, continue_final_message,
                reasoning.
        """
        return self._variants.find(adapter).reader.read(prompt, PromptOptions(**options))[0]

    def requests(self, prompt: Prompt, options: GenerationOptions, n: int) -> list[Request]:
        """Make requests for `n` replies to one prompt, whose seeds follow each other.

        Each has the reply that a request alone has with its seed. Errors as `stream` raises them.

        Raises:
            GenerationError: for an `n` that is no count, or several with one cache.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise GenerationError(f"n is {shortened(n)}; it must be 1 or more.")
        if n > 1 and options.cache is not None:
            raise GenerationError(
                "A cache serves one reply at a time, and n asks for several.",
                hint="Leave one of them out.",
            )
        seed = options.chosen_seed()
        seeds = [(seed + choice) % SEEDS for choice in range(n)]
        return self._make_requests(prompt, options, self.sampling, seeds)

    def request(
        self, prompt: Prompt, options: GenerationOptions, sampling: Sampling | None = None
    ) -> Request:
        """Make a request for the engine; errors as `stream` raises them.

        Args:
            sampling: settings for what `options` leave out; the model's own where None.
        """
        seeds = [options.chosen_seed()]
        return self._make_requests(prompt, options, sampling or self.sampling, seeds)[0]

    def _make_requests(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        usual: Sampling,
        seeds: Sequence[int],
    ) -> list[Request]:
        """Make a request for each seed, of a prompt that is read once."""
        variant = self._variants.find(options.adapter)
        prompts = variant.reader
        sampling = options.sampling(usual)
        self._check_bias(sampling)
        check_kv_bits(options.kv_bits, self.model.config.head_dim)
        own = StopStrings(options.stop).stops
        if own:
            prompts.text_tokenizer()
        if options.cache is not None:
            options.cache.check(self.model, options.kv_bits)
        form = ReplyForm.read(options)
        if form is not None:
            prompts.text_tokenizer()
        tokens, media = prompts.read(prompt, options)
        stops = (*own, *prompts.stop_strings(prompt, options))
        said = prompts.said(prompt, options)
        room = self._room(len(tokens), options)
        calls = form is not None and form.may_call
        read_answer = None if options.schema is None else answer_reader(options.schema, said)
        return [
            Request(
                tokens,
                Sampler(sampling, seed, tokens),
                room,
                variant.stop_tokens,
                media,
                variant.reply_reader(tokens, StopStrings(stops), calls, said, options.plain),
                options.cache,
                options.on_prefill,
                options.prompt_lookup,
                options.kv_bits,
                options.top_logprobs if options.logprobs else None,
                options.prompt_logprobs,
                None if form is None else variant.constraint(form, tokens, self.reasons, said),
                variant.adapter,
                read_answer,
            )
            for seed in seeds
        ]

    def _check_bias(self, sampling: Sampling) -> None:
        vocabulary = self.model.config.vocab_size
        beyond = [token for token in sampling.logit_bias if token >= vocabulary]
        if beyond:
            raise GenerationError(
                f"logit_bias has token {beyond[0]}, which is none of a vocabulary of {vocabulary}."
            )

    def _room(self, prompt_tokens: int, options: GenerationOptions) -> int:
        """Number of tokens that the reply may have."""
        max_tokens, least = options.max_tokens, 1 if options.prompt_logprobs is None else 0
        room = self.context_length - prompt_tokens
        if max_tokens is None:
            if room < 1:
                raise ContextLengthError(
                    f"The prompt has {prompt_tokens:,} tokens, but {self.name} holds "
                    f"{self.context_length:,} for prompt and reply together.",
                    hint="Shorten the prompt.",
                )
            return room
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < least:
            raise GenerationError(f"max_tokens is {max_tokens!r}; it must be {least} or more.")
        if max_tokens > room:
            raise ContextLengthError(
                f"The prompt has {prompt_tokens:,} tokens and the reply may have {max_tokens:,}: "
                f"{prompt_tokens + max_tokens:,} together, but {self.name} holds "
                f"{self.context_length:,}.",
                hint="Shorten the prompt, or lower max_tokens.",
            )
        return max_tokens
