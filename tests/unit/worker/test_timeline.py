"""A device's history is kept from change to change."""

from nos_backend.worker.timeline import Sample, Timeline


def test_only_changes_are_kept():
    timeline = Timeline()
    for time_s, used in ((1.0, 10), (2.0, 10), (3.0, 20), (4.0, 10)):
        timeline.note(Sample(time_s, used, {"a@v1": used}))
    assert [sample["time_s"] for sample in timeline.read()] == [1.0, 3.0, 4.0]
    assert timeline.read()[1] == {"time_s": 3.0, "used_bytes": 20, "models": {"a@v1": 20}}


def test_the_oldest_go_first():
    timeline = Timeline()
    for number in range(5000):
        timeline.note(Sample(float(number), number, {}))
    samples = timeline.read()
    assert len(samples) == 3600
    assert samples[-1]["used_bytes"] == 4999
