"""What transformers' processor makes of pictures, for tests/media/test_image.py.

    PICTURES=folder-of-real-pictures python scripts/goldens/image_goldens.py tests/goldens/images

Every picture is compared whole with phimlx's preparation, and one value of each SAMPLE is kept.
Needs torch, torchvision and transformers 4.51, whose processor resizes by Pillow as the published
one does; from 5 on torchvision resizes, whose rounding differs by a level from machine to machine.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.numpy import save_file
from torchvision.transforms import functional
from transformers.models.phi4_multimodal.image_processing_phi4_multimodal_fast import (
    Phi4MultimodalImageProcessorFast,
)

sys.path.insert(0, str(Path(__file__).parents[2]))
from phimlx.media.image import prepare_images
from tests.media.test_image import LARGE, SAMPLE, SHAPES, WHOLE, synthetic

SEVERAL = [(448, 448), (1000, 700), (30, 90)]
SIZES = 1200

DYNAMIC_HD = 36

PROCESSOR = Phi4MultimodalImageProcessorFast(dynamic_hd=DYNAMIC_HD)


def record(name: str, pictures: list[Image.Image]) -> dict[str, np.ndarray]:
    """The reference's arrays, strided; prints how far phimlx's are from them."""
    made = PROCESSOR(pictures, return_tensors="pt")
    pixels = made["image_pixel_values"].numpy()
    masks = made["image_attention_mask"].numpy()
    ours = prepare_images(pictures)
    far = np.abs(ours.input_image_embeds - pixels)
    print(
        f"{name:>28}: crops {far[:, 1:].max():.1e}, whole {far[:, 0].max():.1e}, "
        f"masks {(ours.image_attention_mask != masks).sum()}, tokens {ours.tokens}"
    )
    return {
        f"{name}/pixels": pixels.ravel()[::SAMPLE].copy(),
        f"{name}/sizes": made["image_sizes"].numpy(),
        f"{name}/tokens": made["num_img_tokens"].numpy(),
        f"{name}/mask": masks.sum(-1),
    }


def grids() -> np.ndarray:
    """[pictures, 6]: width and height; of the reference's canvas; columns and rows not masked."""
    numbers = random.Random(4)
    sizes = [(width, height) for width in (1, 3, 7) for height in (1, 2, 5)]
    sizes += [(449 * i, 449 * j) for i in range(1, 20, 3) for j in range(1, 20, 3)]
    sizes += [(3000 * i, 3000 * j) for i in range(1, 8) for j in range(1, 8)]
    while len(sizes) < SIZES:
        width = int(10 ** numbers.uniform(1, 4))
        sizes.append((width, max(1, int(width * 36 ** numbers.uniform(-1, 1)))))
    # Only the sizes matter: nothing is resized.
    functional.resize = functional.pad = lambda *_, **__: None
    rows = []
    for width, height in sizes:
        picture = SimpleNamespace(size=(width, height))
        try:
            _, mask = PROCESSOR.dynamic_preprocess(picture, max_num=DYNAMIC_HD)
        except ValueError:  # too long
            continue
        down, across = mask.shape
        used = (int(mask[0].sum()), int(mask[:, 0].sum()))
        rows.append((width, height, across * 14, down * 14, *used))
    return np.array(rows, np.int64)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str, arrays: dict[str, Any]) -> None:
        save_file(arrays, folder / f"{name}.safetensors")

    made = {}
    for size in SHAPES + WHOLE + LARGE:
        made |= record("{}x{}".format(*size), [Image.fromarray(synthetic(*size))])
    save("synthetic", made)
    save("several", record("several", [Image.fromarray(synthetic(*size)) for size in SEVERAL]))
    made = {}
    for path in sorted(Path(os.environ["PICTURES"]).iterdir()):
        made |= record(path.name, [ImageOps.exif_transpose(Image.open(path))])
    save("real", made)
    save("grids", {"grids": grids()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
