"""Video files and cameras through models, and results as video files."""

import os
import pty
import subprocess
import sys
import termios
import threading
import time

import av
import nos
import numpy as np
import pytest
from nos import video
from nos.errors import InvalidRequestError, InvalidTensorError, OverloadedError, UnavailableError

NUM_FRAMES = 12
HEIGHT, WIDTH = 1080, 1920
STEP = WIDTH // NUM_FRAMES

SMALL = """
import nos
import torch
from typing import Annotated

@nos.model(name="small-frames")
class Small:
    def __call__(self, frame: Annotated[torch.Tensor, "uint8[48, 64, 3]"]) -> list[int]:
        return list(frame.shape)
"""


def bar_at(index):
    """A frame that tells its number by where it is white."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[:, index * STEP + 20 : (index + 1) * STEP - 20] = 255
    return frame


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """An H.264 file of 1080p."""
    path = tmp_path_factory.mktemp("movie") / "in.mp4"
    with video.Writer(path, 30) as writer:
        for index in range(NUM_FRAMES):
            writer.write(bar_at(index))
    return path


def test_a_video_comes_back_as_it_was_written(movie):
    with video.Video(movie) as frames:
        assert (frames.size, frames.rate_hz) == ((HEIGHT, WIDTH), 30.0)
        positions = [int(frame[0, :, 0].argmax()) // STEP for frame in frames]
    assert positions == list(range(NUM_FRAMES))
    with av.open(str(movie)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


def edge_positions(path):
    """Return where each frame's bar is, by its edges."""
    with video.Video(path) as frames:
        columns = [frame[:, :, 0].mean(0) for frame in frames]
    assert {len(it) for it in columns} == {WIDTH}
    return [int(np.flatnonzero(it > 100).max()) // STEP for it in columns]


def run_cli(server, *arguments):
    """Run `nos` with a terminal as its standard error; return its exit code, output and terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    environment = {**os.environ, "NOS_ADDRESS": server.address}
    environment["NOS_TOKEN_FILE"] = str(server.token_file)
    shown = []

    def read():
        try:
            while data := os.read(ours, 4096):
                shown.append(data)
        except OSError:  # the last process that had it has gone
            pass

    reader = threading.Thread(target=read)
    reader.start()
    command = [sys.executable, "-m", "nos.cli", *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=theirs, timeout=100, check=False
    )
    os.close(theirs)
    reader.join()
    os.close(ours)
    return done.returncode, done.stdout.decode(), b"".join(shown).decode()


@pytest.mark.accept("D1")
def test_a_video_goes_through_a_model_to_a_new_file_with_a_progress_bar(server, movie, tmp_path):
    out = tmp_path / "out.mp4"
    code, printed, terminal = run_cli(server, "stream", "nos/edges", movie, "--out", out)
    assert (code, printed) == (0, ""), terminal
    assert f"{NUM_FRAMES}/{NUM_FRAMES}" in terminal
    assert edge_positions(out) == list(range(NUM_FRAMES))


def test_map_shows_its_progress_and_knows_the_number_of_frames(client, movie, capsys):
    with video.Video(movie, size=(54, 96)) as frames:
        shapes = {it.shape for it in client.model("nos/edges").map(frames, progress=True)}
    assert shapes == {(54, 96)}
    assert f"{NUM_FRAMES}/{NUM_FRAMES}" in capsys.readouterr().err


def test_frames_are_scaled_here_to_what_the_model_declares(server, client, movie):
    client.register(SMALL)
    try:
        model = client.model("small-frames")
        assert video.frame_size(model.method().info) == (48, 64)
        assert video.frame_size(client.model("nos/edges").method().info) is None
        code, printed, terminal = run_cli(server, "stream", "small-frames", movie)
    finally:
        client.unregister("small-frames")
    assert code == 0, terminal
    assert printed.splitlines() == [f"frame {seq}: [48, 64, 3]" for seq in range(1, NUM_FRAMES + 1)]


@pytest.mark.accept("D2")
def test_a_camera_keeps_its_rate_while_the_model_takes_twice_the_frame_time(client, accept):
    num_frames, rate_hz = 40, 20.0
    ends = []
    with (
        video.Camera(f"testsrc=size=64x48:rate={rate_hz},realtime", input_format="lavfi") as camera,
        client.model("fake/slow").stream(policy="latest") as stream,
    ):
        stream.send(0.0)
        assert next(stream).value == 0.0
        receiver = threading.Thread(target=lambda: ends.extend(stream))
        receiver.start()
        start_s = time.monotonic()
        for _, _frame in zip(range(num_frames), camera, strict=False):
            stream.send(2 / rate_hz)
        took_s = time.monotonic() - start_s
        stream.finish()
        receiver.join(60)
    dropped = [end.seq for end in ends if isinstance(end.error, OverloadedError)]
    answered = [end.seq for end in ends if end.error is None]
    assert sorted(dropped + answered) == list(range(2, num_frames + 2))
    assert answered == sorted(answered)
    assert answered[-1] == num_frames + 1
    assert len(dropped) >= num_frames // 4
    accept.figure(took_s * rate_hz / num_frames, 1.1, "times as long as the camera takes")


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_what_is_no_video_is_said(tmp_path, content):
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match="no video can be read there"):
        video.Video(path)


def test_a_file_without_frames_is_said(tmp_path):
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(InvalidRequestError, match="there are no frames in it"):
        video.Video(path)


def test_a_video_that_breaks_off_says_after_how_many_frames(tmp_path):
    path = tmp_path / "x.mp4"
    noise = np.random.default_rng(0)
    with video.Writer(path, 30) as writer:
        for _ in range(8):
            writer.write(noise.integers(0, 255, (64, 64, 3), np.uint8))
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + len(data) // 4
    data[start : start + len(data) // 2] = bytes(len(data) // 2)
    path.write_bytes(data)
    with video.Video(path) as frames, pytest.raises(InvalidRequestError, match=r"broken after \d"):
        list(frames)


def test_an_absent_camera_is_said():
    with pytest.raises(UnavailableError, match="no video can be read there"):
        video.Camera(99)


@pytest.mark.parametrize(
    "frame", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), "text", None]
)
def test_what_is_no_picture_gets_into_no_video(tmp_path, frame):
    path = tmp_path / "x.mp4"
    with video.Writer(path) as writer, pytest.raises(InvalidTensorError, match="does not fit"):
        writer.write(frame)
    assert not path.exists()


def test_frames_of_one_video_have_one_size(tmp_path):
    with video.Writer(tmp_path / "x.mp4") as writer:
        writer.write(np.zeros((33, 45), bool))
        with pytest.raises(InvalidTensorError, match=r"\(33, 45\), got uint8 \(32, 45\)"):
            writer.write(np.zeros((32, 45), np.uint8))
    with video.Video(tmp_path / "x.mp4") as frames:
        assert [frame.shape for frame in frames] == [(33, 45, 3)]


@pytest.mark.parametrize("name", ["x.nothing", "nowhere/x.mp4"])
def test_a_place_for_no_video_is_said_at_once(tmp_path, name):
    with pytest.raises(InvalidRequestError, match="no video can be written there"):
        video.Writer(tmp_path / name)


def test_results_that_are_no_pictures_make_no_video(server, movie, tmp_path):
    out = tmp_path / "out.mp4"
    code, _, terminal = run_cli(server, "stream", "nos/echo", "-m", "digest", movie, "--out", out)
    assert code == 1
    assert "the frame does not fit into the video" in terminal
    assert not out.exists()


def test_import_of_video_needs_no_ffmpeg():
    code = "import sys; sys.modules['av'] = None; from nos import video; video.Video('x.mp4')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert "pip install 'nos-inference[video]'" in done.stderr
    assert nos.__version__
