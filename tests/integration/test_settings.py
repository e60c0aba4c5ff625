"""A server that is told to log everything, and to take less than usual."""

import io
import logging

import nos
import numpy as np
import pytest
from nos.errors import LimitExceededError
from PIL import Image

from tests.servers import start_server, wait_for

NUM_FRAMES = 3
TALKER = """
import sys

class Talker:
    def __call__(self, count: int) -> int:
        for number in range(count):
            print(number)
        sys.stdout.flush()
        return count
"""
LIMITS = {
    "--max-frame-bytes": 100_000,
    "--max-image-pixels": 600,
    "--max-log-lines": 7,
    "--max-source-bytes": 400,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of this module's own, which logs all there is to log."""
    folder = tmp_path_factory.mktemp("settings")
    limits = [text for flag, limit in LIMITS.items() for text in (flag, str(limit))]
    running = start_server(folder, "--device", "cpu", "--log-level", "debug", *limits)
    yield running
    running.stop()


def test_a_frame_has_one_name_in_the_logs_of_client_gateway_worker_and_executor(server, caplog):
    caplog.set_level(logging.DEBUG, logger="nos")
    frame = np.arange(16, dtype=np.float32)
    with (
        nos.connect(server.address, token_file=server.token_file, via="relay") as client,
        client.model("nos/echo").stream() as stream,
    ):
        for _ in range(NUM_FRAMES):
            stream.send(frame)
        stream.finish()
        assert [result.seq for result in stream] == [1, 2, 3]
    opened = [it.args for it in caplog.records if it.msg.startswith("stream %s to %s goes")]
    (stream_id,) = [name for name, model, _ in opened if model.startswith("nos/echo")]
    folder = server.state_dir / "logs"
    for number in range(1, NUM_FRAMES + 1):
        name = f"frame {stream_id}/{number}"
        assert f"{name} is sent: 64 bytes" in caplog.text
        assert f"{name} ends: " in caplog.text
        for log, events in (
            ("gateway", ["64 bytes up", "64 bytes down"]),
            ("worker-cpu-0", ["has arrived: 64 bytes", "runs on executor", "ends: queue"]),
        ):
            for event in events:
                wait_for_line(folder / f"{log}.log", name, event)


def wait_for_line(path, *words):
    def has_line():
        return any(all(it in line for it in words) for line in path.read_text().splitlines())

    wait_for(has_line, f"{words} in {path.name}", 30)


@pytest.fixture
def client(server):
    with nos.connect(server.address, token_file=server.token_file) as connected:
        yield connected


@pytest.mark.accept("F7")
@pytest.mark.parametrize("via", ["auto", "direct"])
def test_a_frame_over_its_limit_is_refused_and_the_next_runs(server, via):
    limit = LIMITS["--max-frame-bytes"]
    with nos.connect(server.address, token_file=server.token_file, via=via) as client:
        echo = client.model("nos/echo")
        assert echo(np.zeros(limit, np.uint8)).size == limit
        with pytest.raises(LimitExceededError, match=f"at most {limit} bytes, got {limit + 1}"):
            echo(np.zeros(limit + 1, np.uint8))
        assert echo(7) == 7


@pytest.mark.accept("F7")
def test_an_image_over_its_limit_is_refused_and_the_next_is_seen(client):
    edges = client.model("nos/edges")
    assert edges(png(30, 20)).shape == (20, 30)
    with pytest.raises(LimitExceededError, match="at most 600 pixels"):
        edges(png(31, 20))
    assert edges(png(20, 30)).shape == (30, 20)


def png(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return nos.Media("image/png", file.getvalue())


@pytest.mark.accept("F7")
def test_a_source_over_its_limit_is_refused(client):
    limit = LIMITS["--max-source-bytes"]
    client.register(TALKER.ljust(limit), name="me/talker")
    with pytest.raises(LimitExceededError, match=f"at most {limit} bytes, got {limit + 1}"):
        client.register(TALKER.ljust(limit + 1), name="me/talker")


def test_lines_over_their_limit_are_dropped_and_counted(client):
    client.register(TALKER, name="me/talker")
    talker = client.model("me/talker")
    assert talker(100) == 100

    def dropped():
        talker(1)
        return [it for it in map(str, client.logs("me/talker")) if "lines dropped: over 7" in it]

    wait_for(dropped, "it is said that lines were dropped", 30)
