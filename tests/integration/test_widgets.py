"""The memory chart's kernel side, with a real backend and without a page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nos
import pytest
from nos.errors import UnavailableError
from nos_jupyter.widgets import MemoryProfile

from tests.servers import Server, wait_for


@pytest.fixture
def profile(client: nos.Client) -> Iterator[MemoryProfile]:
    made = MemoryProfile(client)
    yield made
    made.close()


def test_samples_arrive_and_name_what_is_loaded(profile: MemoryProfile, client: nos.Client) -> None:
    client.load("nos/digits")

    def models() -> set[str]:
        last = profile.samples[-1:]
        return {
            part.model
            for sample in last
            for worker in sample.workers
            for part in worker.device.models
            if part.device_bytes
        }

    wait_for(lambda: "nos/digits" in models(), "a sample names the model")
    assert profile.peak_bytes > 100_000


def test_the_saved_state_holds_neither_samples_nor_the_connection(
    profile: MemoryProfile, server: Server
) -> None:
    wait_for(lambda: profile.samples, "a sample")
    state = json.dumps({name: str(value) for name, value in profile.get_state().items()})
    assert server.token not in state
    assert server.address not in state


def test_a_page_without_scripts_still_gets_a_picture(profile: MemoryProfile) -> None:
    data, _ = profile._repr_mimebundle_()
    assert "<svg" in data["text/html"]
    assert data["text/plain"].startswith("MemoryProfile(peak ")


def test_closing_ends_the_thread_at_once(client: nos.Client) -> None:
    profile = MemoryProfile(client)
    wait_for(lambda: profile.samples, "a sample")
    profile.close()
    assert profile._follower.join(30)


def test_no_backend_is_said_and_tried_again(client: nos.Client) -> None:
    attempts = []

    def find() -> nos.Client:
        attempts.append(1)
        raise UnavailableError("no server listens")

    profile = MemoryProfile(find)
    wait_for(lambda: len(attempts) > 1, "it tries again")
    assert profile._follower.state == ("lost", "backend unreachable, retrying: no server listens")
    profile.close()


def test_a_wrong_token_is_said_and_tried_again(server: Server, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("nos_wrong")
    profile = MemoryProfile(lambda: nos.connect(server.address, token_file=str(wrong)))
    wait_for(lambda: profile._follower.state[0] == "lost", "it says so")
    assert profile._follower.state[1].startswith("retrying: ")
    assert "token" in profile._follower.state[1]
    profile.close()
    assert profile._follower.join(30)
