"""One id per stream and frame, in the logs of all that it passes."""

import logging

import nos
import numpy as np
import pytest

from tests.servers import start_server, wait_for

NUM_FRAMES = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of this module's own, which logs all there is to log."""
    folder = tmp_path_factory.mktemp("tracing")
    running = start_server(folder, "--device", "cpu", "--log-level", "debug")
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
