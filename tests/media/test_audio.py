"""Sounds as the published extractor hears them: every file, rate, depth and channel count."""

from __future__ import annotations

import io
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import soxr  # type: ignore[import-untyped]
from numpy.typing import NDArray

from phimlx.media import log_mel as features
from phimlx.media.audio import Audio, AudioClip, load_audio, log_mel, prepare_audio
from phimlx.media.audio_file import open_audio
from tests.bundled import present
from tests.media.sounds import av_sound, noise, sound_file

GOLDENS = Path(__file__).parents[1] / "goldens" / "audio" / "log_mel.npz"
STRIDE = 97
LAST = 79  # transformers counts one bin more into it than the published extractor

RECORDINGS = [
    "1272-128104-0004-8k.wav",
    "1272-141231-0002.flac",
    "1272-141231-0002.mp3",
    "1272-141231-0002.wav",
    "652-129742-0006.flac",
    "common_voice_en_59751.mp3",
    "jfk.flac",
    "jfk_16k.wav",
    "ls_test.flac",
    "sr_chinese.flac",
    "sr_english.wav",
    *(f"speechbrain/spk{speaker}_snt{text}.wav" for speaker in (1, 2) for text in range(1, 7)),
]


@pytest.fixture(scope="module")
def goldens() -> dict[str, NDArray[Any]]:
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


def made() -> dict[str, AudioClip]:
    """The sounds of `scripts/goldens/audio_goldens.py` that need no recording."""
    white = np.random.default_rng(1).standard_normal(48000).astype(np.float32)
    time = np.arange(40000) / 16000
    sweep = np.sin(2 * np.pi * (50 * time + 1550 * time**2)).astype(np.float32)
    return {
        "made/noise": AudioClip(np.float32(0.1) * white, 16000),
        "made/sweep": AudioClip(np.float32(0.9) * sweep, 16000),
        "made/quiet": AudioClip(np.float32(1e-4) * white[:8000], 16000),
        "made/silence": AudioClip(np.zeros(4000, np.float32), 16000),
        "made/one-frame": AudioClip(np.float32(0.1) * white[:400], 16000),
        "made/noise-8k": AudioClip(np.float32(0.1) * white[:20000], 8000),
    }


def check_golden(audio: Audio, name: str, goldens: dict[str, NDArray[Any]]) -> None:
    frames, tokens = goldens[f"{name}/frames"]
    assert audio.input_audio_embeds.shape == (1, frames, 80)
    assert audio.tokens == [tokens]
    kept = np.append(np.arange(0, frames, STRIDE), frames - 1)
    ours = audio.input_audio_embeds[0, kept]
    np.testing.assert_allclose(ours, goldens[f"{name}/published"], rtol=0, atol=1e-4)
    if f"{name}/transformers" in goldens:
        ported = goldens[f"{name}/transformers"]
        np.testing.assert_allclose(ours[:, :LAST], ported[:, :LAST], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", made())
def test_made_sounds_equal_the_published_extractor(
    name: str, goldens: dict[str, NDArray[Any]]
) -> None:
    check_golden(prepare_audio([made()[name]]), name, goldens)


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_equal_the_published_extractor(
    name: str, goldens: dict[str, NDArray[Any]], data: Path
) -> None:
    check_golden(prepare_audio([present(data / "audio" / name)]), name, goldens)


def test_features_equal_those_that_onnxruntime_expects(data: Path) -> None:
    expected = np.loadtxt(data / "golden" / "phi4mm_logmel_expected.txt", delimiter=",")
    ours = log_mel(load_audio(data / "audio" / "1272-141231-0002.wav"))
    assert ours.shape == (1332, 80)
    np.testing.assert_allclose(ours[:, :10], expected, rtol=0, atol=1e-4)


def test_batch_has_the_sizes_that_onnxruntime_expects(data: Path) -> None:
    oracles = json.loads((data / "golden" / "expected_public_oracles.json").read_text())
    expected = oracles["phi4mm_audio_batch"]
    audio = prepare_audio([present(data / "audio" / name) for name in expected["files"]])
    # libsndfile drops an MP3's padding, ONNX Runtime's decoder does not: 12 frames, one token.
    assert expected["valid_frames"] == [1098, 1332, 1344]
    assert expected["embed_sizes"] == [138, 167, 168]
    assert audio.input_audio_embeds.shape == (3, 1332, 80)
    assert audio.audio_attention_mask.sum(1).tolist() == [1098, 1332, 1332]
    assert audio.tokens == [138, 167, 167]
    eight = oracles["phi4mm_audio_8k"]
    alone = prepare_audio([present(data / "audio" / eight["file"])])
    assert list(alone.input_audio_embeds.shape) == eight["feature_shape"]


def test_several_sounds_are_padded_and_masked_as_published(
    goldens: dict[str, NDArray[Any]],
) -> None:
    sounds = made()
    audio = prepare_audio([sounds[f"made/{name}"] for name in ("noise", "sweep", "noise-8k")])
    embeds = audio.input_audio_embeds[:, ::STRIDE]
    np.testing.assert_allclose(embeds, goldens["batch/embeds"], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(audio.audio_attention_mask, goldens["batch/mask"])
    assert audio.audio_attention_mask.dtype == np.bool_
    np.testing.assert_array_equal(audio.audio_embed_sizes, goldens["batch/sizes"])
    assert audio.audio_embed_sizes.dtype == np.int64
    assert not audio.input_audio_embeds[~audio.audio_attention_mask].any()
    assert list(audio.arrays()) == [
        "input_audio_embeds",
        "audio_embed_sizes",
        "audio_attention_mask",
    ]


def test_one_sound_has_no_mask() -> None:
    audio = prepare_audio([(noise(1.0), 16000)])
    assert audio.audio_attention_mask is None
    assert list(audio.arrays()) == ["input_audio_embeds", "audio_embed_sizes"]
    assert audio.seconds == [1.0]


def test_blocks_of_frames_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = AudioClip(noise(2.0), 16000)
    whole = log_mel(clip)
    monkeypatch.setattr(features, "BLOCK", 7)
    np.testing.assert_allclose(log_mel(clip), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("WAV", {"subtype": "PCM_16"}),
        ("WAV", {"subtype": "PCM_24"}),
        ("WAV", {"subtype": "FLOAT"}),
        ("WAV", {"subtype": "DOUBLE"}),
        ("RF64", {"subtype": "PCM_16"}),
        ("FLAC", {"subtype": "PCM_24"}),
        ("AIFF", {"subtype": "PCM_16"}),
        ("AU", {"subtype": "PCM_16"}),
        ("CAF", {"subtype": "ALAC_16"}),
    ],
)
def test_lossless_files_give_their_samples(kind: str, options: dict[str, str]) -> None:
    samples = np.round(noise(0.5) * 32768) / np.float32(32768)
    clip = load_audio(sound_file(samples, 16000, kind, **options))
    assert clip.rate == 16000
    np.testing.assert_array_equal(clip.samples, samples)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("MP3", {}), ("OGG", {"subtype": "VORBIS"}), ("OGG", {"subtype": "OPUS"})],
)
def test_lossy_files_sound_alike(kind: str, options: dict[str, str]) -> None:
    time = np.arange(16000) / 16000
    tone = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    clip = load_audio(sound_file(tone, 16000, kind, **options))
    assert clip.samples.shape == tone.shape
    assert np.corrcoef(clip.samples, tone)[0, 1] > 0.99


@pytest.mark.parametrize("rate", [8001, 11025, 12000, 22050, 24000, 32000, 44100, 48000, 96000])
def test_other_rates_are_resampled_by_soxr_before_anything_else(rate: int) -> None:
    samples = noise(5.0, rate)
    clip = load_audio((samples, rate))
    assert clip.rate == 16000
    np.testing.assert_array_equal(clip.samples, soxr.resample(samples, rate, 16000, quality="HQ"))


@pytest.mark.parametrize("rate", [4000, 6000, 7999])
def test_slower_rates_take_the_path_of_8_khz(rate: int) -> None:
    samples = noise(1.0, rate)
    clip = load_audio((samples, rate))
    assert clip.rate == 8000
    np.testing.assert_array_equal(clip.samples, soxr.resample(samples, rate, 8000, quality="HQ"))


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(channels: int) -> None:
    samples = np.round(noise(0.3 * channels) * 32768).reshape(-1, channels).astype(np.int16)
    expected = (samples / 32768).mean(1).astype(np.float32)
    from_file = load_audio(sound_file(samples, 16000))
    np.testing.assert_array_equal(from_file.samples, expected)
    np.testing.assert_array_equal(load_audio((samples, 16000)).samples, expected)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8])
def test_integers_are_scaled_as_a_file_of_their_depth(dtype: type) -> None:
    limits = np.iinfo(dtype)
    samples: NDArray[Any] = np.linspace(limits.min, limits.max, 4000).astype(dtype)
    subtype = {"int16": "PCM_16", "int32": "PCM_32", "uint8": "PCM_U8"}[samples.dtype.name]
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 16000, 1, subtype, format="WAV") as output:
        wide = samples.astype(np.int32) - 128 << 24 if dtype is np.uint8 else samples
        output.write(wide)
    np.testing.assert_array_equal(
        load_audio((samples, 16000)).samples, load_audio(file.getvalue()).samples
    )


def test_path_string_bytes_file_and_array_are_the_same_sound(tmp_path: Path) -> None:
    data = sound_file(noise(0.5), 16000)
    path = tmp_path / "a sound.wav"
    path.write_bytes(data)
    samples, rate = soundfile.read(path, dtype="float32")
    with path.open("rb") as file:
        sources = [path, str(path), data, file, (samples, rate), (samples[:, None], rate)]
        digests = {load_audio(source).digest for source in sources}
    assert digests == {load_audio(load_audio(path)).digest}


def test_name_of_a_file_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "sound.raw"
    path.write_bytes(sound_file(noise(0.5), 16000, "FLAC"))
    assert load_audio(path).seconds == 0.5


@pytest.mark.parametrize("tail", [b"", b"TAG" + bytes(125)])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_mp3_need_not_say_how_long_it_is(rate: int, tail: bytes) -> None:
    data = av_sound(noise(3.0, rate), rate, "mp3", "libmp3lame", write_xing="0", id3v2_version="0")
    assert b"Info" not in data
    clip = load_audio(data + tail)
    assert clip.seconds == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 32000, 44100])
def test_mp3_of_varying_bitrate_is_read_to_its_end(rate: int, channels: int) -> None:
    samples = noise(6.0 * channels, rate).reshape(-1, channels)
    data = sound_file(samples, rate, "MP3", bitrate_mode="VARIABLE")
    # Without the frame at the beginning that counts the others.
    uncounted = data[data.index(data[:2], 100) :]
    assert b"Xing" in data
    assert b"Xing" not in uncounted
    whole, clip = load_audio(data), load_audio(uncounted)
    assert clip.seconds == pytest.approx(whole.seconds, abs=0.3)
    # The same sound, behind the decoder's delay, which the lost frame gave too.
    late = len(clip.samples) - len(whole.samples)
    lags = np.correlate(clip.samples[8000 : 8000 + 4096 + late], whole.samples[8000:12096])
    assert lags.max() > 0.5 * np.sum(whole.samples[8000:12096] ** 2)


def test_digest_is_of_rate_and_samples() -> None:
    samples = noise(0.1)
    expected = sha256((16000).to_bytes(4, "little") + samples.tobytes()).digest()
    assert prepare_audio([(samples, 16000)]).digests == [expected]
    assert AudioClip(samples, 8000).digest != expected


def test_40_seconds_are_500_tokens() -> None:
    assert features.token_count(features.frame_count(640_000, 16000)) == 500
    assert features.token_count(features.frame_count(320_000, 8000)) == 500
    assert features.token_count(features.frame_count(641_440, 16000)) == 501


def test_a_long_sound_is_read_in_blocks() -> None:
    data = sound_file(noise(60.0, 8000), 8000)
    with open_audio(data) as sound:
        lengths = [len(block) for block in sound.blocks]
    assert sum(lengths) == 480_000
    assert max(lengths) == 65536


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("mp4", "aac", 44100),
        ("adts", "aac", 44100),
        ("mp4", "alac", 16000),
        ("webm", "libopus", 48000),
        ("matroska", "libopus", 48000),
        ("mpegts", "aac", 44100),
    ],
)
def test_containers_are_read_by_pyav(container: str, codec: str, rate: int) -> None:
    time = np.arange(2 * rate) / rate
    tone = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    clip = load_audio(av_sound(tone, rate, container, codec))
    assert clip.rate == 16000
    assert clip.seconds == pytest.approx(2.0, abs=0.1)
    # One tone of the right pitch and loudness, wherever the encoder's padding put it.
    middle = clip.samples[8000:24000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() == 440
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, abs=0.01)


def test_lossless_container_gives_its_samples() -> None:
    samples = np.round(noise(0.5) * 32768) / np.float32(32768)
    clip = load_audio(av_sound(samples, 16000, "mp4", "alac"))
    np.testing.assert_allclose(clip.samples, samples, rtol=0, atol=1 / 32768)
