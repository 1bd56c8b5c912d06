"""Time and memory of preparing and prefilling a picture and a sound, phimlx beside mlx-vlm.

    python scripts/bench/multimodal.py [--runs 5] [--picture 1344x896] [--seconds 30]

Both load the same random model in the published layout, small enough for any machine, in float32.
The picture is 1344 × 896 pixels, the sound 30 s at 16 kHz. Each run is a process of its own that
first sees or hears something small; sides alternate. Ratios are of medians (below 1: phimlx takes
less); beside wall time stands that of all cores, which a busy machine disturbs less. Memory is what
is resident at the peak above what was before (above macOS, what MLX held). Needs mlx-vlm, soundfile
and Linux for resident memory.

mlx-vlm shrinks a picture to 3,600 patches, each of which becomes a token, and has neither crops nor
separators. So a picture is measured twice: as each makes it, and with mlx-vlm's tower given the
same crops, pooled and ended as the model needs them, which makes equal work and equal tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from phimlx.checkpoint.folder import Checkpoint
from phimlx.checkpoint.load import build_model, load_model
from phimlx.generation.engine import Engine
from phimlx.generation.placed_media import Media
from phimlx.generation.request import Request
from phimlx.generation.sampler import Sampler, Sampling
from phimlx.media.audio import prepare_audio
from phimlx.media.image import prepare_images
from phimlx.sizes import size_text

WIDTH, LAYERS, SLOTS = 256, 4, {"image_token_id": 2046, "audio_token_id": 2047}
CONFIG: dict[str, Any] = {
    "model_type": "phi4mm", "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 704,
    "vocab_size": 2048, "max_position_embeddings": 131072, "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "eos_token_id": 2, "torch_dtype": "float32", **SLOTS,
    "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 24, "long_factor": [1.0 + i for i in range(24)],
    },
    "vision_config": {
        "hidden_size": WIDTH, "intermediate_size": 960, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "patch_size": 14, "image_size": 448,
    },
    "audio_processor": {
        "name": "cascades",
        "config": {
            "attention_dim": WIDTH, "attention_heads": 4, "linear_units": 384, "input_size": 80,
            "num_blocks": LAYERS, "kernel_size": 3, "ext_pw_out_channel": WIDTH,
            "depthwise_seperable_out_channel": WIDTH, "conv_channels": WIDTH,
            "nemo_conv_settings": {"conv_channels": WIDTH}, "t5_bias_max_distance": 500,
            "relative_attention_bias_args": {"type": "t5", "t5_bias_max_distance": 500},
        },
    },
    "vision_lora": {"r": 16, "lora_alpha": 32}, "speech_lora": {"r": 20, "lora_alpha": 40},
    "mm_hidden_size": WIDTH, "image_token_index": -200, "audio_token_index": 2047,  # mlx-vlm's
}  # fmt: skip
PROMPT = [5, 6, 7]  # after the slots
SIDES = ("phimlx", "mlx-vlm")
CASES = {
    "picture": "a picture, as each makes it",
    "crops": "a picture, the same crops and tokens",
    "sound": "a sound",
}

Work = Callable[[Path], tuple[Any, Callable[[Any], int]]]
"""What a file becomes, and what reads that to the first token and returns how many tokens."""


def write_model(folder: Path) -> None:
    """Random weights, those included that phimlx does without and mlx-vlm loads."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tower = "model.embed_tokens_extend.image_embed.img_processor."
    weights, key = {}, mx.random.key(0)
    for name, array in dict(tree_flatten(build_model(CONFIG).parameters())).items():
        key, own = mx.random.split(key)
        weights[name] = mx.random.normal(array.shape, key=own) * 0.02 + ("norm" in name)
    last = f"{tower}encoder.layers.{LAYERS - 1}."
    for name in [name for name in weights if name.startswith(f"{tower}encoder.layers.0.")]:
        weights[name.replace(f"{tower}encoder.layers.0.", last)] = weights[name]
    weights |= {f"{tower}post_layernorm.{part}": mx.ones(WIDTH) for part in ("weight", "bias")}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def write_picture(file: Path, width: int, height: int) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 64, (height, width, 3))
    ramp = np.linspace(0, 190, width)[None, :, None]
    Image.fromarray((noise + ramp).astype(np.uint8)).save(file, quality=90)


def write_sound(file: Path, seconds: float) -> None:
    times = np.arange(int(16000 * seconds)) / 16000
    samples = 8000 * np.sin(2 * np.pi * (200 + 40 * np.sin(3 * times)) * times)
    samples += np.random.default_rng(0).normal(0, 500, len(times))
    with wave.open(str(file), "wb") as opened:
        opened.setparams((1, 2, 16000, 0, "NONE", ""))
        opened.writeframes(samples.astype("<i2").tobytes())


def ours(folder: Path, case: str) -> Work:
    model = load_model(Checkpoint(folder))
    slot = SLOTS["audio_token_id" if case == "sound" else "image_token_id"]

    def prepare(file: Path) -> Any:
        return prepare_audio([file]) if case == "sound" else prepare_images([file])

    def read(made: Any) -> int:
        arrays = {name: mx.array(array) for name, array in made.arrays().items()}
        items = tuple(zip(made.digests, made.tokens, strict=True))
        prompt = [slot] * made.tokens[0] + PROMPT
        request = Request(prompt, Sampler(Sampling(), 0), 1, media=Media(arrays, items))
        Engine(model).run_all([request])
        return len(prompt)

    return lambda file: (prepare(file), read)


def theirs(folder: Path, case: str) -> Work:
    from mlx_vlm.generate.ar import generate_step
    from mlx_vlm.models.phi4mm.processing_phi4mm import (
        Phi4MMAudioFeatureExtractor,
        Phi4MMImageProcessor,
    )
    from mlx_vlm.utils import load_model as load_theirs

    model = load_theirs(folder)
    read_sound = import_module("soundfile").read  # which has no types
    see, hear = Phi4MMImageProcessor(), Phi4MMAudioFeatureExtractor()

    def prepare(file: Path) -> Any:
        from PIL import Image

        if case == "sound":
            return hear([read_sound(file, dtype="float32")])
        if case == "crops":
            return prepare_images([file])
        return see(Image.open(file))

    def read(made: Any) -> int:
        if case == "sound":
            slots = [2047] * int(made["audio_embed_sizes"][0].item())
            pixels, given = None, dict(made)
        elif case == "picture":
            slots, given = [-200], dict(made)
            pixels = given.pop("pixel_values")
            height, width = given["spatial_shapes"][0].tolist()
        else:
            slots, pixels = [-200], mx.array(made.input_image_embeds[0])
            rows = assembled(model, pixels, made)
            given = {"cached_image_features": model.apply_mm_projector([rows])}
        prompt = mx.array([slots + PROMPT])
        next(iter(generate_step(prompt, model, pixels, None, max_tokens=1, temperature=0, **given)))
        if case == "crops":
            return made.tokens[0] + len(PROMPT)
        return len(PROMPT) + (len(slots) if case == "sound" else height * width)

    return lambda file: (prepare(file), read)


def assembled(model: Any, crops: mx.array, made: Any) -> mx.array:
    """mlx-vlm's tower over the crops of a picture without padding, as the model wants its rows."""
    count, channels, side, patch = *crops.shape[:3], 14
    places = side // patch
    patches = crops.reshape(count, channels, places, patch, places, patch)
    patches = patches.transpose(0, 2, 4, 3, 5, 1).reshape(count, places * places, -1)
    shapes = mx.array([[places, places]] * count)
    features = mx.stack(model.vision_tower(patches, None, shapes))
    pooled = features.reshape(count, places // 2, 2, places // 2, 2, -1).mean(axis=(2, 4))
    rows, columns = (int(size) // side for size in made.image_sizes[0])
    half = places // 2
    grid = pooled[1:].reshape(rows, columns, half, half, -1).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * half, columns * half, -1)
    end = mx.zeros((1, 1, grid.shape[-1]))
    parts = [
        mx.concatenate([each, mx.broadcast_to(end, (len(each), 1, each.shape[-1]))], axis=1)
        for each in (grid, pooled[0])
    ]
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    return mx.concatenate([flat[0], end[0], flat[1]])


def resident() -> tuple[int, int]:
    """Bytes resident now and at the peak; MLX's where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return mx.get_active_memory(), mx.get_peak_memory()
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, peak = (1024 * int(lines[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> None:
    mx.reset_peak_memory()
    refs = Path("/proc/self/clear_refs")
    if refs.exists():
        refs.write_text("5")


def measure(side: str, case: str, folder: Path, small: Path, file: Path) -> dict[str, float]:
    """One run in this process."""
    return measure_work(lambda: (ours if side == "phimlx" else theirs)(folder, case), small, file)


def measure_work(prepare: Callable[[], Any], small: Path, file: Path) -> dict[str, float]:
    """Measure a side's work on a file, after it has done a small one.

    Args:
        prepare: loads the side's model; the function that it makes prepares a file, and gives
            what it made and the function that reads that.
    """
    if not mx.metal.is_available():
        mx.set_default_device(mx.cpu)
    work = prepare()
    made, read = work(small)
    read(made)
    del made, read
    gc.collect()
    mx.clear_cache()
    forget_peak()
    before, _ = resident()
    clocks = [(time.perf_counter(), time.process_time())]
    made, read = work(file)
    clocks.append((time.perf_counter(), time.process_time()))
    tokens = read(made)
    clocks.append((time.perf_counter(), time.process_time()))
    start, between, end = clocks
    return {
        "tokens": tokens,
        "prepare, wall": between[0] - start[0],
        "prepare, all cores": between[1] - start[1],
        "prefill, wall": end[0] - between[0],
        "prefill, all cores": end[1] - between[1],
        "both, wall": end[0] - start[0],
        "both, all cores": end[1] - start[1],
        "memory": resident()[1] - before,
    }


def compare(title: str, runs: int, script: str, *arguments: str) -> None:
    """Let a script measure the sides in turn, and print what they took.

    Args:
        arguments: of `script --measure SIDE`, which prints a line of JSON.
    """
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(runs):
        for side in SIDES:
            command = [sys.executable, script, "--measure", side, *arguments]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[side].append(json.loads(printed.splitlines()[-1]))
    print(f"\n{title}")
    for key in found[SIDES[0]][0]:
        mine, other = (statistics.median(run[key] for run in found[side]) for side in SIDES)
        if key == "tokens":
            texts = [f"{value:,.0f}" for value in (mine, other)]
        elif key == "memory":
            texts = [size_text(int(value)) for value in (mine, other)]
        else:
            texts = [f"{value:.3f} s" for value in (mine, other)]
        line = f"  {key:<20} phimlx {texts[0]:>10}   mlx-vlm {texts[1]:>10}"
        print(f"{line}   ratio {mine / other:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--picture", metavar="WIDTHxHEIGHT", default="1344x896")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--case", choices=CASES, action="append", help="all where none is named")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, case, *paths = arguments.measure
        print(json.dumps(measure(side, case, *map(Path, paths))))
        return
    width, height = map(int, arguments.picture.split("x"))
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_model(home / "model")
        write_picture(home / "small.jpg", 448, 448)
        write_picture(home / "picture.jpg", width, height)
        write_sound(home / "small.wav", 1)
        write_sound(home / "sound.wav", arguments.seconds)
        for case in arguments.case or CASES:
            files = ("small.wav", "sound.wav") if case == "sound" else ("small.jpg", "picture.jpg")
            paths = [str(home / file) for file in ("model", *files)]
            compare(CASES[case], arguments.runs, __file__, case, *paths)


if __name__ == "__main__":
    main()
