from __future__ import annotations

from nos_backend.scheduling.autoscaling import Aim, Autoscaler, Sample

KEY = "m@v1"
DOWN_AFTER_S = 10.0


class Load:
    """A model with calls of one length, by a clock of its own."""

    def __init__(self, low: int, high: int, target: int = 1) -> None:
        self.scaler = Autoscaler(DOWN_AFTER_S)
        self.low, self.high, self.target = low, high, target
        self.now_s = 0.0
        self.answered = 0.0
        #: (time, aim), as they came.
        self.aims: list[tuple[float, Aim]] = []

    def run(self, seconds: float, callers: int, call_s: float = 0.5) -> None:
        """Have so many callers call one after the other."""
        for _ in range(int(seconds * 2)):
            self.now_s += 0.5
            busy = min(callers, self.target)
            self.answered += busy * 0.5 / call_s
            sample = Sample(
                num_pending=callers,
                num_busy=busy,
                num_answered=int(self.answered),
                num_serving=self.target,
            )
            aim = self.scaler.observe(
                KEY, sample, self.now_s, low=self.low, high=self.high, target=self.target
            )
            if aim is not None:
                self.aims.append((self.now_s, aim))
                self.target = aim.target


def test_calls_that_wait_get_more_replicas_up_to_the_limit():
    load = Load(1, 4)
    load.run(20, callers=8)
    assert [aim.target for _, aim in load.aims] == [2, 4]
    assert load.aims[0][0] <= 5
    assert "calls waited" in load.aims[0][1].why


def test_as_many_callers_as_replicas_are_served_at_once():
    load = Load(1, 4, target=2)
    load.run(60, callers=2)
    assert load.aims == []


def test_a_burst_that_is_over_before_a_replica_could_serve_adds_none():
    load = Load(1, 4)
    load.run(1, callers=8)
    load.run(5, callers=0)
    assert load.aims == []


def test_many_calls_that_wait_for_milliseconds_are_no_queue():
    load = Load(1, 4)
    load.run(30, callers=64, call_s=0.001)
    assert load.aims == []


def test_idle_replicas_leave_together_after_a_while():
    load = Load(1, 4, target=4)
    load.run(DOWN_AFTER_S + 1, callers=0)
    assert [(time_s, aim.target) for time_s, aim in load.aims] == [(10.5, 1)]
    assert load.aims[0][1].why == "no call for 10 s"


def test_a_little_use_keeps_a_little():
    load = Load(1, 4, target=4)
    load.run(60, callers=1)
    assert load.target == 1
    load = Load(1, 4, target=4)
    load.run(60, callers=2)
    assert load.target == 2


def test_no_call_at_all_scales_to_zero_where_that_is_allowed():
    load = Load(0, 2)
    load.run(DOWN_AFTER_S + 1, callers=0)
    assert load.target == 0
    load = Load(1, 2)
    load.run(DOWN_AFTER_S + 1, callers=0)
    assert load.target == 1


def test_whoever_just_asked_finds_it_there():
    load = Load(0, 2)
    load.run(9, callers=0)
    load.scaler.asked(KEY, load.now_s)
    load.run(9, callers=0)
    assert load.aims == []


def test_load_that_comes_and_goes_does_not_flap():
    load = Load(1, 4)
    for _ in range(20):
        load.run(4, callers=8)
        load.run(4, callers=0)
    targets = [aim.target for _, aim in load.aims]
    assert targets == sorted(targets)


def test_a_model_that_answers_nothing_gets_more():
    load = Load(1, 2)
    load.run(5, callers=3, call_s=1e9)
    assert [aim for _, aim in load.aims] == [Aim(2, "calls waited and none was answered")]
