"""Pictures through reasoning-vision, phimlx beside mlx-vlm: exactness, tokens, time and memory.

    python scripts/bench/reasoning_vision.py [--runs 3] [--original FOLDER]

Both load the same random model in the published layout, small enough for any machine, in float32.
A picture of 640 × 480 is read as each makes it: mlx-vlm enlarges it to 3,600 patches. One of
1280 × 720 has 3,600 in both, so equal tokens. Each run is a process of its own that first sees
something small; sides alternate. Ratios are of medians (below 1: phimlx takes less). Memory is what
is resident at the peak above what was before (above macOS, what MLX held).

With --original, a folder such as `tiny/tiny-phi4-siglip` of PHIMLX_TEST_DATA, each side's logits
are compared with those of Microsoft's own code, given the same patches. Needs mlx-vlm; its
processor is transformers' own, whose form on Pillow and NumPy is measured, which needs no torch.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from multimodal import compare, measure_work, write_picture

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.generation.engine import Engine
from phimlx.generation.placed_media import Media
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.media.naflex import prepare_patches

WIDTH, LAYERS, IMAGE = 128, 3, -200
CONFIG: dict[str, Any] = {
    "model_type": "phi4-siglip", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 352,
    "vocab_size": 2048, "max_position_embeddings": 32768, "rope_theta": 500000.0,
    "original_max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "eos_token_id": 2, "torch_dtype": "float32", "mm_hidden_size": WIDTH,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_tower": "siglip2-patch16-naflex",
    "vision_config": {
        "model_type": "siglip2_vision_model", "hidden_size": WIDTH, "intermediate_size": 480,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    },
}  # fmt: skip
TEXT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "rope_theta", "rms_norm_eps"),
)
PROMPT = [5, 6, 7]  # after the picture
MEASURED = ("tokens", "prepare, all cores", "prefill, all cores", "both, wall", "memory")
PICTURES = {
    "640x480": "640 × 480, as each makes it",
    "1280x720": "1280 × 720, equal tokens",
}


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """As published, and once more where mlx-vlm looks for the language model's shape."""
    text = {key: config[key] for key in TEXT}
    (folder / "config.json").write_text(json.dumps({**config, "text_config": text}))


def write_model(folder: Path) -> None:
    """Random weights, those included that phimlx does without and mlx-vlm loads."""
    folder.mkdir()
    write_config(folder, CONFIG)
    tower = "model.vision_tower.vision_tower.vision_model."
    weights, key = {}, mx.random.key(0)
    for name, array in dict(tree_flatten(build_model(CONFIG).parameters())).items():
        key, own = mx.random.split(key)
        weights[name] = mx.random.normal(array.shape, key=own) * 0.02 + ("norm" in name)
    first, last = (f"{tower}encoder.layers.{layer}." for layer in (0, LAYERS - 1))
    for name in [name for name in weights if name.startswith(first)]:
        weights[name.replace(first, last)] = weights[name]
    weights |= {f"{tower}post_layernorm.{part}": mx.ones(WIDTH) for part in ("weight", "bias")}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


Work = Callable[[Path], tuple[Any, Callable[[Any], int]]]
"""What a file becomes, and what reads that to the first token and returns how many tokens."""


def ours(folder: Path) -> Work:
    model = load_model(Checkpoint(folder))

    def read(made: Any) -> int:
        arrays = {name: mx.array(array) for name, array in made.arrays().items()}
        items = tuple(zip(made.digests, made.tokens, strict=True))
        prompt = [IMAGE] * made.tokens[0] + PROMPT
        request = Request(prompt, Sampler(Sampling(), 0), 1, media=Media(arrays, items))
        Engine(model).run_all([request])
        return len(prompt)

    return lambda file: (prepare_patches([file]), read)


def theirs(folder: Path) -> Work:
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.utils import load_model as load_theirs
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

    model = load_theirs(folder)
    half = [0.5, 0.5, 0.5]
    see = Siglip2ImageProcessorPil(
        patch_size=16, max_num_patches=3600, image_mean=half, image_std=half
    )

    def prepare(file: Path) -> Any:
        from PIL import Image

        return dict(see([Image.open(file)], return_tensors="np"))

    def read(made: Any) -> int:
        given = {name: mx.array(array) for name, array in made.items()}
        pixels = given.pop("pixel_values")
        height, width = given["spatial_shapes"][0].tolist()
        prompt = mx.array([[IMAGE, *PROMPT]])
        next(iter(generate_step(prompt, model, pixels, None, max_tokens=1, temperature=0, **given)))
        return int(height) * int(width) + len(PROMPT)

    return lambda file: (prepare(file), read)


def measure(side: str, folder: Path, small: Path, file: Path) -> dict[str, float]:
    """One run in this process."""
    took = measure_work(lambda: (ours if side == "phimlx" else theirs)(folder), small, file)
    return {key: took[key] for key in MEASURED}


def difference(folder: Path) -> None:
    """Print how far each side is from the original's logits, given the same patches."""
    from mlx_vlm.utils import load_model as load_theirs

    arrays = mx.load(str(folder / "oracle.safetensors"))
    assert isinstance(arrays, dict)
    with tempfile.TemporaryDirectory() as name:  # mlx-vlm takes every safetensors file for weights
        shutil.copyfile(folder / "model.safetensors", Path(name, "model.safetensors"))
        write_config(Path(name), json.loads((folder / "config.json").read_text()))
        models = {
            "phimlx": load_model(Checkpoint(Path(name)), mx.float32),
            "mlx-vlm": load_theirs(Path(name)),
        }
    print("largest difference from the original, in parts of the largest logit")
    for name, pictures in json.loads((folder / "cases.json").read_text()).items():
        ids, expected = arrays[f"{name}.input_ids"], arrays.get(f"{name}.logits")
        if not pictures or expected is None or expected.ndim == 3:
            continue
        files = [folder / "pictures" / f"{picture}.png" for picture in pictures]
        made = {k: mx.array(v) for k, v in prepare_patches(files).arrays().items()}
        texts = []
        for side, model in models.items():
            found = model(ids.astype(mx.int32), **made)
            logits = getattr(found, "logits", found)[0, arrays[f"{name}.rows"]]
            away = float(mx.abs(logits - expected).max() / mx.abs(expected).max())
            texts.append(f"{side} {away:.1e}")
        print(f"  {name:<10} {'   '.join(texts)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--original", type=Path, help="folder of the original code's logits")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, *paths = arguments.measure
        print(json.dumps(measure(side, *map(Path, paths))))
        return
    if arguments.original is not None:
        difference(arguments.original)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_model(home / "model")
        write_picture(home / "small.png", 64, 64)
        for size in PICTURES:
            file = home / f"{size}.png"
            write_picture(file, *map(int, size.split("x")))
            paths = map(str, (home / "model", home / "small.png", file))
            compare(PICTURES[size], arguments.runs, __file__, *paths)


if __name__ == "__main__":
    main()
