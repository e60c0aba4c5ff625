from __future__ import annotations

import time
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nos_backend.scheduling.placement import Needs, Refusal, WorkerLoad, unsuited
from nos_backend.scheduling.reconcile import (
    MAX_LOST_LOADS,
    Drain,
    Failure,
    Load,
    Phase,
    Reconciler,
    Retired,
)

KEY = "m@v1"


def cluster(*addresses: str) -> Reconciler:
    plane = Reconciler()
    for address in addresses:
        plane.joined(WorkerLoad(address=address, name=address, device="cpu"), 0.0)
    return plane


def settle(plane: Reconciler) -> list[object]:
    """Carry out commands, every load a success, until none is left."""
    done: list[object] = []
    while commands := plane.step():
        for command in commands:
            done.append(command)
            if isinstance(command, Load):
                plane.loaded(command.key, command.address)
            elif isinstance(command, Drain):
                plane.drained(command.key, command.address)
    return done


def scaled(plane: Reconciler, low: int, high: int) -> None:
    plane.scale(KEY, Needs(), min_replicas=low, max_replicas=high)


def test_a_wanted_model_is_loaded_once():
    plane = cluster("a", "b")
    plane.want(KEY, Needs())
    assert plane.step() == [Load(KEY, "a")]
    assert plane.step() == []
    assert plane.loaded(KEY, "a")
    assert plane.models[KEY].state == "loaded"


def test_replicas_have_a_worker_each_and_what_is_missing_says_why():
    plane = cluster("a", "b")
    scaled(plane, 3, 3)
    assert plane.step() == [Load(KEY, "a"), Load(KEY, "b")]
    assert plane.models[KEY].pending is Refusal.TAKEN
    plane.joined(WorkerLoad(address="c", name="c", device="cpu"), 1.0)
    assert plane.step() == [Load(KEY, "c")]
    assert plane.models[KEY].pending is None


def test_a_surplus_is_drained_and_never_the_last_that_serves():
    plane = cluster("a", "b")
    plane.want(KEY, Needs())
    settle(plane)
    scaled(plane, 2, 2)
    assert plane.step() == [Load(KEY, "b")]
    scaled(plane, 1, 1)
    assert plane.step() == []  # b loads still
    plane.loaded(KEY, "b")
    assert plane.step() == [Drain(KEY, "a", "1 to 1 were asked for")]
    assert plane.models[KEY].serving == ["b"]


def test_a_model_without_limits_below_is_scaled_to_zero_and_back():
    plane = cluster("a")
    scaled(plane, 0, 2)
    assert settle(plane) == []
    plane.want(KEY, Needs())
    assert settle(plane) == [Load(KEY, "a")]
    plane.aim(KEY, 0, "nobody asked for 30 s")
    assert settle(plane) == [Drain(KEY, "a", "nobody asked for 30 s")]
    assert plane.models[KEY].state == "idle"


def test_a_retiring_workers_model_serves_elsewhere_before_it_is_drained():
    plane = cluster("a", "b")
    plane.want(KEY, Needs())
    settle(plane)
    plane.retire(["a"])
    assert plane.step() == [Load(KEY, "b")]
    plane.loaded(KEY, "b")
    assert plane.step() == [Drain(KEY, "a", "its worker retires")]
    assert plane.step() == []
    plane.drained(KEY, "a")
    assert plane.step() == [Retired("a")]
    assert plane.step() == []


def test_the_last_worker_may_retire_too():
    plane = cluster("a")
    plane.want(KEY, Needs())
    settle(plane)
    plane.retire(["a"])
    assert settle(plane) == [Drain(KEY, "a", "its worker retires"), Retired("a")]
    assert plane.models[KEY].state == "waiting"


def test_retiring_more_than_the_limits_allow_is_noticed():
    plane = cluster("a", "b")
    scaled(plane, 2, 2)
    assert plane.pinned(["a"]) == {KEY: 2}
    scaled(plane, 1, 2)
    assert plane.pinned(["a"]) == {}


def test_a_lost_workers_model_is_placed_again():
    plane = cluster("a", "b")
    plane.want(KEY, Needs())
    settle(plane)
    assert plane.lost("a", 1.0) == []
    assert plane.step() == [Load(KEY, "b")]


def test_a_model_that_takes_workers_down_is_given_up_and_tried_again_on_demand():
    plane = cluster("a", "b", "c")
    plane.want(KEY, Needs())
    for address in ("a", "b"):
        assert plane.step() == [Load(KEY, address)]
        failed = plane.lost(address, 1.0)
    assert failed == [KEY]
    assert plane.step() == []
    assert str(MAX_LOST_LOADS) in str(plane.models[KEY].failure)
    plane.want(KEY, Needs())
    assert plane.step() == [Load(KEY, "c")]


def test_one_worker_that_cannot_load_it_leaves_the_others_serving():
    plane = cluster("a", "b")
    scaled(plane, 2, 2)
    plane.step()
    plane.loaded(KEY, "a")
    assert not plane.refused(KEY, "b", Failure("no room"))
    assert plane.step() == []
    assert plane.models[KEY].pending == Failure("no room")
    assert plane.models[KEY].state == "loaded"


def test_a_worker_that_comes_and_goes_is_avoided_for_a_minute():
    plane = cluster("a", "b")
    for second in range(3):
        plane.lost("a", float(second))
        plane.joined(WorkerLoad(address="a", name="a", device="cpu"), float(second))
    plane.observed(WorkerLoad(address="b", name="b", device="cpu", num_pending=9))
    plane.want(KEY, Needs())
    assert plane.step() == [Load(KEY, "b")]
    plane.lost("a", 2.5)
    plane.joined(WorkerLoad(address="a", name="a", device="cpu"), 90.0)
    plane.want("other@v1", Needs())
    assert plane.step() == [Load("other@v1", "a")]


class AnyOrder(RuleBasedStateMachine):
    """Events in any order keep the promises; whoever is left alone ends with what was wanted."""

    KEYS = st.sampled_from(["x@v1", "y@v1", "z@v1"])
    NAMES = st.sampled_from(["a", "b", "c", "d"])

    def __init__(self) -> None:
        super().__init__()
        self.plane = Reconciler()
        self.loading: set[tuple[str, str]] = set()
        self.draining: set[tuple[str, str]] = set()
        self.now_s = 0.0

    @rule(key=KEYS)
    def want(self, key: str) -> None:
        self.plane.want(key, Needs(weight_bytes=10))

    @rule(key=KEYS, low=st.integers(0, 3), more=st.integers(0, 2))
    def scale(self, key: str, low: int, more: int) -> None:
        self.plane.scale(
            key, Needs(weight_bytes=10), min_replicas=low, max_replicas=max(1, low + more)
        )

    @rule(key=KEYS, wanted=st.integers(0, 5))
    def aim(self, key: str, wanted: int) -> None:
        if key in self.plane.models:
            self.plane.aim(key, wanted, "because")

    @rule(key=KEYS)
    def forget(self, key: str) -> None:
        self.plane.forget(key)
        self.loading = {pair for pair in self.loading if pair[0] != key}
        self.draining = {pair for pair in self.draining if pair[0] != key}

    @rule(name=NAMES)
    def join(self, name: str) -> None:
        if name not in self.plane.workers:
            load = WorkerLoad(address=name, name=name, device="cpu", capacity_bytes=25)
            self.plane.joined(load, self.now_s)

    @rule(name=NAMES)
    def lose(self, name: str) -> None:
        self.now_s += 1.0
        self.plane.lost(name, self.now_s)
        self.loading = {pair for pair in self.loading if pair[1] != name}
        self.draining = {pair for pair in self.draining if pair[1] != name}

    @rule(name=NAMES)
    def retire(self, name: str) -> None:
        self.plane.retire([name])

    @rule(name=NAMES)
    def keep(self, name: str) -> None:
        self.plane.keep(name)

    @rule()
    def step(self) -> None:
        for command in self.plane.step():
            if isinstance(command, Load):
                assert command.address not in self.plane.retiring
                assert (command.key, command.address) not in self.loading | self.draining
                self.loading.add((command.key, command.address))
            elif isinstance(command, Drain):
                self.draining.add((command.key, command.address))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), is_good=st.booleans())
    def answer(self, data: st.DataObject, is_good: bool) -> None:
        pair = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.discard(pair)
        if is_good:
            assert self.plane.loaded(*pair)
        else:
            self.plane.refused(*pair, Failure("no"))

    @precondition(lambda self: self.draining)
    @rule(data=st.data())
    def drained(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(sorted(self.draining)))
        self.draining.discard(pair)
        self.plane.drained(*pair)

    @invariant()
    def replicas_are_what_was_commanded(self) -> None:
        for key, model in self.plane.models.items():
            assert model.min_replicas <= model.max_replicas
            assert model.target <= model.max_replicas
            for address, phase in model.replicas.items():
                assert address in self.plane.workers
                assert ((key, address) in self.loading) == (phase is Phase.LOADING)
                assert ((key, address) in self.draining) == (phase is Phase.DRAINING)

    def teardown(self) -> None:
        for pair in self.loading:
            self.plane.loaded(*pair)
        for pair in self.draining:
            self.plane.drained(*pair)
        settle(self.plane)
        usable = self.plane.workers.keys() - self.plane.retiring
        for model in self.plane.models.values():
            if model.failure is None and not model.refused:
                assert len(model.serving) == min(model.target, len(usable))
        told = self.plane.retiring
        assert not {at for model in self.plane.models.values() for at in model.replicas} & told


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_thousand_models_and_fifty_workers_are_reconciled_quickly():
    plane = Reconciler()
    for number in range(50):
        load = WorkerLoad(
            address=f"w{number:02}", name=f"w{number}", device="cpu", capacity_bytes=1000
        )
        plane.joined(load, 0.0)
    for number in range(1000):
        plane.want(f"m{number}@v1", Needs(weight_bytes=10))
    start_s = time.perf_counter()
    commands = plane.step()
    placing_s = time.perf_counter() - start_s
    assert len(commands) == 1000
    per_worker = [sum(item.address == at for item in commands) for at in plane.workers]
    assert set(per_worker) == {20}
    settle(plane)
    assert plane.lost("w00", 1.0) == []
    assert len(plane.step()) == 20
    assert placing_s < 2.0


DEVICES = ["cpu", "cuda:0"]
MEMORIES = [0, 20, 40]
WORKERS = st.lists(
    st.builds(
        WorkerLoad,
        address=st.uuids().map(str),
        device=st.sampled_from(DEVICES),
        place=st.sampled_from(["one", "two", "three"]),
        capacity_bytes=st.sampled_from(MEMORIES),
        used_bytes=st.integers(0, 10),
        num_pending=st.integers(0, 3),
        installs=st.booleans(),
    ),
    max_size=8,
)
NEEDS = st.builds(
    Needs,
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    weight_bytes=st.sampled_from([0, 10, 30]),
    memory_bytes=st.sampled_from(MEMORIES),
    has_packages=st.booleans(),
    is_packed=st.booleans(),
)


@given(workers=WORKERS, needs=NEEDS, wanted=st.integers(1, 8))
def test_replicas_are_where_they_may_be_and_what_is_missing_says_why(workers, needs, wanted):
    plane = Reconciler()
    for load in workers:
        plane.joined(load, 0.0)
    plane.scale(KEY, needs, min_replicas=wanted, max_replicas=wanted)
    settle(plane)
    model = plane.models[KEY]
    good = [load for load in workers if unsuited(needs, load) is None]
    assert len(model.serving) == min(wanted, len(good))
    assert {load.address for load in good} >= set(model.serving)
    if len(good) >= wanted:
        assert model.pending is None
    elif good:
        assert model.pending is Refusal.TAKEN
    elif workers:
        assert model.pending in {unsuited(needs, load) for load in workers}
        assert model.state == "waiting"
    else:
        assert model.pending is Refusal.NO_WORKER


@given(workers=WORKERS, before=NEEDS, after=NEEDS, wanted=st.integers(1, 4))
def test_other_wishes_move_replicas_and_none_is_drained_before_others_serve(
    workers, before, after, wanted
):
    plane = Reconciler()
    for load in workers:
        plane.joined(load, 0.0)
    plane.scale(KEY, before, min_replicas=wanted, max_replicas=wanted)
    settle(plane)
    num_served = len(plane.models[KEY].serving)
    plane.scale(KEY, after, min_replicas=wanted, max_replicas=wanted)
    good = {load.address for load in workers if unsuited(after, load) is None}
    for _ in range(20):
        for command in plane.step():
            if isinstance(command, Drain):
                assert len(plane.models[KEY].serving) >= wanted
                plane.drained(command.key, command.address)
            elif isinstance(command, Load):
                assert command.address in good
                plane.loaded(command.key, command.address)
    assert len(plane.models[KEY].serving) >= min(num_served, wanted)
    if len(good) >= wanted:
        for address in plane.models[KEY].serving:
            assert unsuited(after, plane.workers[address]) not in {
                Refusal.NO_DEVICE,
                Refusal.NO_MEMORY,
            }


def test_a_surplus_leaves_the_fullest_device_or_the_emptiest_where_it_is_packed():
    for is_packed, stays in ((False, ["a", "c"]), (True, ["a", "b"])):
        plane = Reconciler()
        for address, place in (("a", "x"), ("b", "x"), ("c", "y")):
            load = WorkerLoad(address=address, name=address, device="cpu", place=place)
            plane.joined(load, 0.0)
        needs = Needs(is_packed=is_packed)
        plane.scale(KEY, needs, min_replicas=3, max_replicas=3)
        settle(plane)
        plane.observed(replace(plane.workers["b"], num_pending=0))
        plane.observed(replace(plane.workers["a"], num_pending=1))
        plane.scale(KEY, needs, min_replicas=2, max_replicas=2)
        settle(plane)
        assert sorted(plane.models[KEY].serving) == stays
