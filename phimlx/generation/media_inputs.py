"""Images, sounds and videos given with a prompt, and the arrays that the encoders take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from phimlx.generation.placed_media import Media
from phimlx.prompt.media_parts import (
    FRAMES,
    KINDS,
    MEDIA_TAG,
    PlaceholderTokens,
    expand_placeholders,
    source_list,
)

if TYPE_CHECKING:
    from phimlx.media.limits import Limits
    from phimlx.prompt.messages import Message

Sources = Mapping[str, Sequence[Any]]
"""Where images and sounds come from, by kind, in the order of the prompt."""


class Prepared(Protocol):
    """Images or sounds, prepared for an encoder.

    Attributes:
        tokens: placeholder tokens that each fills.
        digests: that tell each from others.
    """

    @property
    def tokens(self) -> list[int]: ...
    @property
    def digests(self) -> list[bytes]: ...
    def arrays(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class MediaInputs:
    """Media given with a prompt: one or a list of each, or None.

    Attributes:
        images: path, https URL, bytes, PIL image or numpy array. They go before what the user said
            last; so does all the following.
        audio: path, https URL, bytes or (samples, rate).
        video: path, https URL or bytes. Needs the extra "video".
        frames: how many images each video becomes.
        limits: how large each may be; `phimlx.media.limits.Limits()` where None.
    """

    images: Any = None
    audio: Any = None
    video: Any = None
    frames: int = FRAMES
    limits: Limits | None = None

    def sources(self) -> dict[str, list[Any]]:
        """The images, those of videos last, and the sounds.

        Raises:
            MediaError: for a video that cannot be read.
        """
        images = source_list("images", self.images)
        for source in source_list("video", self.video):
            from phimlx.media.video import read_video

            images += [frame.image for frame in read_video(source, self.frames, self.limits)]
        return {"image": images, "audio": source_list("audio", self.audio)}

    @property
    def has_media(self) -> bool:
        """Whether anything was given."""
        given = (self.images, self.audio, self.video)
        return any(
            one is not None and not (isinstance(one, list | tuple) and not one) for one in given
        )


def sources_in(messages: Iterable[Message]) -> dict[str, list[Any]]:
    """The images and sounds in a conversation."""
    parts = [part for message in messages for part in message.parts]
    return {kind: [part.value for part in parts if part.kind == kind] for kind in KINDS}


def name_placeholders(text: str, placeholders: PlaceholderTokens, names: Mapping[str, int]) -> str:
    """A text without template, `<|image_1|>` and `<|audio_1|>` written as placeholder tokens."""
    spelled = {token: name for name, token in names.items()}
    tags = {kind: spelled.get(token) for kind, token in placeholders.items()}
    return MEDIA_TAG.sub(lambda match: tags.get(match[1]) or match[0], text)


def fill(
    ids: Sequence[int],
    placeholders: PlaceholderTokens,
    sources: Sources,
    limits: Limits | None,
    prepare_images: Callable[..., Prepared],
    longest: int | None = None,
) -> tuple[list[int], Media | None]:
    """Ids with as many placeholder tokens as each item has features, and the encoders' arrays.

    Args:
        ids: with one placeholder token for each item.
        prepare_images: the model's own, called with sources and limits.
        longest: tokens that the model reads of a prompt with media; the rest is cut off. All of
            them where None.

    Raises:
        MediaError: for an image or a sound that cannot be read, or that the limits refuse.
        PromptError: where there are not as many placeholders as items.
    """
    prepared: dict[str, Prepared] = {}
    if sources["image"]:
        prepared["image"] = prepare_images(sources["image"], limits)
    if sources["audio"]:
        from phimlx.media.audio import prepare_audio

        prepared["audio"] = prepare_audio(sources["audio"], limits)
    counts = {kind: item.tokens for kind, item in prepared.items()}
    wide, order = expand_placeholders(ids, placeholders, counts)
    if not prepared:
        return wide, None
    items = {
        kind: iter(zip(item.digests, item.tokens, strict=True)) for kind, item in prepared.items()
    }
    arrays = {
        name: mx.array(array) for item in prepared.values() for name, array in item.arrays().items()
    }
    media = Media(arrays, tuple(next(items[kind]) for kind in order))
    if longest is None or len(wide) <= longest:
        return wide, media
    left = sum(token in placeholders.values() for token in wide[:longest])
    return wide[:longest], replace(media.beginning(left), cut=len(wide) - longest)
