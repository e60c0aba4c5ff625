"""Samples to files and back, block by block; what is no audio says so."""

import av
import numpy as np
import pytest
from nos import audio, video
from nos.errors import InvalidRequestError, InvalidTensorError

RATE_HZ = 16_000
#: 2.5 s of a tone.
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE_HZ * 5 // 2) / RATE_HZ)).astype(np.float32)


@pytest.fixture
def tone(tmp_path):
    path = tmp_path / "tone.wav"
    with audio.Writer(path, RATE_HZ) as writer:
        for begin in range(0, TONE.size, 700):
            writer.write(TONE[begin : begin + 700])
        assert writer.num_samples == TONE.size
    return path


def test_samples_come_back_in_blocks(tone):
    with audio.Audio(tone) as blocks:
        assert (blocks.rate_hz, blocks.num_channels) == (RATE_HZ, 1)
        assert blocks.__length_hint__() == 3
        found = list(blocks)
    assert [(it.shape, it.dtype) for it in found] == [
        ((size,), np.float32) for size in (RATE_HZ, RATE_HZ, RATE_HZ // 2)
    ]
    np.testing.assert_allclose(np.concatenate(found), TONE, atol=2**-15)


@pytest.mark.parametrize("suffix", ["flac", "mp3", "m4a"])
def test_sound_of_any_kind_is_resampled_and_mixed(tmp_path, suffix):
    path = tmp_path / f"both.{suffix}"
    with audio.Writer(path, RATE_HZ) as writer:
        writer.write(np.stack([TONE, np.zeros_like(TONE)], axis=1))
    assert audio.read(path).shape[1:] == (2,)
    mono = audio.read(path, rate_hz=RATE_HZ // 2, num_channels=1)
    assert abs(mono.size - TONE.size / 2) < 0.2 * RATE_HZ
    middle = mono[2000:18_000]
    spectrum = np.abs(np.fft.rfft(middle))
    assert spectrum.argmax() == pytest.approx(440 * middle.size / (RATE_HZ / 2), abs=2)


def test_the_sound_of_a_video_is_read(tmp_path):
    path = tmp_path / "talk.mp4"
    with av.open(str(path), "w") as container:
        picture, sound = container.add_stream("mpeg4", 10), container.add_stream("aac", RATE_HZ)
        picture.width = picture.height = 16
        container.mux(
            picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), "rgb24"))
        )
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "flt", "mono")
        frame.sample_rate = RATE_HZ
        container.mux([*sound.encode(frame), *sound.encode(), *picture.encode()])
    assert audio.read(path).shape[0] >= 4096


def test_what_is_no_audio_says_so(tmp_path, tone):
    text = tmp_path / "notes.wav"
    text.write_text("no sound " * 100)
    for path in (text, tmp_path / "absent.wav", tmp_path):
        with pytest.raises(InvalidRequestError, match="no audio can be read there"):
            audio.read(path)
    silent = tmp_path / "silent.mp4"
    with video.Writer(silent) as writer:
        writer.write(np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(InvalidRequestError, match="no sound in it"):
        audio.Audio(silent)
    for wrong in ({"rate_hz": 0}, {"rate_hz": 1e4}, {"num_channels": 3}, {"block_s": 0}):
        with pytest.raises(InvalidRequestError, match=next(iter(wrong))):
            audio.Audio(tone, **wrong)


def test_a_block_that_does_not_fit_is_refused_and_the_file_goes_on(tmp_path):
    path = tmp_path / "out.wav"
    with audio.Writer(path, RATE_HZ) as writer:
        writer.write(np.full((100, 2), 3.0, np.float64))
        for wrong in (np.zeros(4, np.float32), np.zeros((4, 2), np.int16), np.zeros((4, 3), float)):
            with pytest.raises(InvalidTensorError, match="num_samples, 2"):
                writer.write(wrong)
    np.testing.assert_allclose(audio.read(path), np.ones((100, 2)), atol=2**-14)
    with pytest.raises(InvalidRequestError, match="closed"):
        writer.write(np.zeros((1, 2), np.float32))
    with pytest.raises(InvalidRequestError, match="no audio can be written there"):
        audio.Writer(tmp_path / "absent" / "out.wav", RATE_HZ)


def test_nothing_is_left_of_a_file_without_samples(tmp_path):
    audio.Writer(tmp_path / "empty.wav", RATE_HZ).close()
    assert not list(tmp_path.iterdir())
