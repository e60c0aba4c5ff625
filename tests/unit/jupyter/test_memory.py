"""The history behind the memory chart."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from nos.types import Device, Event, ModelMemory, Status, Worker
from nos_jupyter.memory import MAX_SAMPLES, History, Mark, Sample


def sample(time_s: float, used_bytes: int, *parts: ModelMemory) -> Sample:
    device = Device(
        name="cpu", product="a <chip>", capacity_bytes=1 << 30, used_bytes=used_bytes, models=parts
    )
    return Sample(time_s, (Worker(name="w0", address="127.0.0.1:1", pid=1, device=device),))


def test_the_peak_is_the_most_that_one_device_used() -> None:
    history = History()
    for used_bytes in (10, 300, 20):
        history.samples.append(sample(used_bytes, used_bytes))
    assert history.peak_bytes == 300


def test_only_the_last_samples_are_kept() -> None:
    history = History()
    history.samples.extend(sample(at, 1) for at in range(MAX_SAMPLES + 5))
    assert len(history.samples) == MAX_SAMPLES
    assert history.samples[0].time_s == 5


def test_a_model_that_made_room_is_marked_when_it_is_back_and_not_before() -> None:
    history = History()

    def at(time_s: float, *models: str) -> list[str]:
        parts = [ModelMemory(model=name, device_bytes=1) for name in models]
        status = Status(version="", state="ready", workers=sample(time_s, 9, *parts).workers)
        event = Event(time_s=time_s, kind="status", status=status)
        return [new.kind for new in history.take(event) if isinstance(new, Mark)]

    assert at(0.0, "a", "b") == []
    (left,) = history.take(Event(time_s=0.5, kind="evicted", model="a@v1"))
    assert isinstance(left, Mark)
    # News of a worker take a moment: it still seems to be there.
    assert at(1.0, "a", "b") == []
    assert at(1.5, "b") == []
    assert at(2.0, "a", "b") == ["reloaded"]
    assert at(2.5, "a", "b") == []
    assert [(mark.kind, mark.model) for mark in history.marks] == [
        ("evicted", "a@v1"),
        ("reloaded", "a"),
    ]
    assert history.take(Event(time_s=3.0, kind="profiled", model="a@v1")) == []


def test_the_still_picture_is_well_formed_and_names_each_model() -> None:
    history = History()
    history.samples.append(sample(0.0, 0))
    history.samples.append(sample(0.5, 4096, ModelMemory(model="a&b", device_bytes=1024)))
    picture = f"<div>{history.to_html().replace('&nbsp;', ' ')}</div>"
    text = "".join(ElementTree.fromstring(picture).itertext())
    assert "a&b 1.0 KiB" in text
    assert "contexts, activations 3.0 KiB" in text
    assert "cpu a <chip>: 4.0 KiB of 1.0 GiB" in text


def test_a_single_sample_fills_the_picture() -> None:
    history = History()
    history.samples.append(sample(1.8e9, 10, ModelMemory(model="m", device_bytes=10)))
    picture = history.to_html()
    assert "480.0,16.0" in picture
    assert "peak 10 B<" in picture


def test_no_sample_is_said_so() -> None:
    assert "no memory sample yet" in History().to_html()


def test_what_travels_is_json() -> None:
    told = json.loads(json.dumps(sample(1.0, 9, ModelMemory(model="m", device_bytes=4)).to_json()))
    assert told["devices"][0]["models"] == [["m", 4]]
    assert Mark(1.0, "loaded", "m").to_json() == {"t": 1.0, "kind": "loaded", "model": "m"}
