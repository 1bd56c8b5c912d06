"""What pictures and sounds add to a run: memory, and the features of frozen encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

from mlx.utils import tree_flatten

import phimlx
from phimlx.machine.device import crops_at_once, device_name
from phimlx.models.base import CausalLM
from phimlx.models.multimodal import MultimodalLM
from phimlx.training.data.batches import Example
from phimlx.training.data.media import MediaReader
from phimlx.training.features import EncodedMedia, FeatureStore
from phimlx.training.memory_estimate import MediaPlan
from phimlx.training.settings import TrainSettings


def encoded_media(
    model: CausalLM,
    reader: MediaReader | None,
    settings: TrainSettings,
    fingerprint: str,
    note: Callable[[str], object],
) -> EncodedMedia | None:
    """Make what finds the features of pictures and sounds; None where the model takes none.

    Args:
        fingerprint: of the model's files.
        note: called with a sentence where features cannot be kept.
    """
    if reader is None or not isinstance(model, MultimodalLM):
        return None
    store = None
    if limit := round(settings.feature_store * 1e9):
        about = (phimlx.__version__, version("mlx"), device_name(), fingerprint)
        computed = (model.compute_dtype, crops_at_once())
        store = FeatureStore("\n".join(map(str, (*about, *computed))), limit, note)
    return EncodedMedia(model, reader, store)


def media_plan(
    model: CausalLM, settings: TrainSettings, examples: Sequence[Example], itemsize: int
) -> MediaPlan:
    """Tell what pictures and sounds add to the memory of a run.

    Args:
        model: which needs no weights.

    Raises:
        TrainingError: where the model cannot be trained so.
    """
    from phimlx.training.trainable import OWN_ADAPTERS, trained_parts

    held = frozenset().union(*(example.held for example in examples))
    parts = trained_parts(model, settings, held)
    own = getattr(model.config, "adapters", {})
    ranks = tuple(
        settings.rank if part == "new" else own[OWN_ADAPTERS[part]][0]
        for part in parts
        if part == "new" or part in OWN_ADAPTERS
    )
    projectors = 0
    if "projector" in parts:
        projectors = sum(
            array.size
            for name, array in dict(tree_flatten(model.parameters())).items()
            if model.architecture.is_projector(name, held)
        )
    encoding = encoding_memory(model, examples, itemsize)
    return MediaPlan(ranks, projectors, encoding, bool(parts) and "new" not in parts)


def encoding_memory(model: CausalLM, examples: Sequence[Example], itemsize: int) -> int:
    """Bytes that encoding the largest picture or the longest sound takes; 0 without any."""
    longest = {"image": 0, "audio": 0}
    for item in (item for each in examples for item in each.media):
        longest[item.kind] = max(longest[item.kind], item.tokens)
    picture = sound = 0
    if longest["image"]:
        largest = model.architecture.largest_image(model.config, itemsize, longest["image"])
        picture = largest["working"] if largest else 0
    if longest["audio"]:
        sound = model.architecture.longest_sound(model.config, itemsize, longest["audio"])
    return max(picture, sound)
