"""Models come and go on a device by the budget and the policy, never while they run."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from nos_backend.scheduling import eviction
from nos_backend.scheduling.residency import (
    Added,
    CapacityChanged,
    Evict,
    Evicted,
    Finished,
    Footprint,
    Load,
    Loaded,
    LoadFailed,
    NoRoom,
    Overran,
    Refuse,
    Removed,
    Residency,
    Started,
    Tick,
    Tier,
    Unwanted,
    Wanted,
)


def device(sizes, **options):
    state = Residency(**options)
    for name, size in sizes.items():
        state.handle(Added(name, Footprint(weight_bytes=size)), 0)
    return state


def use(state, name, now_s):
    """Want a model, carry out whatever that takes, and run one batch; return who left."""
    left = []
    actions = state.handle(Wanted(name), now_s)
    while actions:
        action = actions.pop(0)
        if isinstance(action, Load):
            actions += state.handle(Loaded(action.model), now_s)
        elif isinstance(action, Evict):
            left.append(action.model)
            actions += state.handle(Evicted(action.model), now_s)
    state.handle(Started(name), now_s)
    state.handle(Finished(name), now_s)
    return left


def resident(state, names):
    return {name for name in names if state.tier(name) is Tier.DEVICE}


@pytest.mark.parametrize(
    ("policy", "survivors"),
    [
        ("lru", {"a", "d", "e"}),
        ("fifo", {"c", "d", "e"}),
        ("lfu", {"a", "b", "e"}),
        ("gdsf", {"a", "b", "e"}),
    ],
)
def test_each_policy_keeps_its_survivors(policy, survivors):
    names = "abcde"
    state = device(dict.fromkeys(names, 10), capacity_bytes=30, policy=eviction.POLICIES[policy])
    for now_s, name in enumerate("aabbbcaade", start=1):
        use(state, name, now_s)
    assert resident(state, names) == survivors


def test_the_budget_counts_the_largest_activation_once():
    state = Residency(capacity_bytes=100)
    for name in "ab":
        state.handle(Added(name, Footprint(weight_bytes=20, activation_bytes=60)), 0)
    assert use(state, "a", 1) == []
    assert use(state, "b", 2) == []
    assert state.used_bytes == 100


def test_models_of_one_executor_share_its_context():
    state = Residency(capacity_bytes=100)
    for name, executor in (("a", "x"), ("b", "x"), ("c", "y")):
        state.handle(
            Added(name, Footprint(weight_bytes=20, executor=executor, context_bytes=25)), 0
        )
    use(state, "a", 1)
    use(state, "b", 2)
    assert state.used_bytes == 65
    assert use(state, "c", 3) == ["a"]


def test_a_model_leaves_only_after_its_work():
    state = device({"a": 10, "b": 10}, capacity_bytes=10)
    use(state, "a", 1)
    state.handle(Started("a"), 2)
    assert state.handle(Wanted("b"), 3) == []
    assert not state.may_start("a")
    assert state.handle(Finished("a"), 4) == [Evict("a", "room")]
    assert state.handle(Evicted("a"), 5) == [Load("b")]


def test_a_pinned_model_never_leaves_and_the_refusal_says_so():
    state = device({"b": 10}, capacity_bytes=12)
    state.handle(Added("a", Footprint(weight_bytes=10), pinned=True), 0)
    use(state, "a", 1)
    assert state.handle(Wanted("b"), 2) == [Refuse("b", 20, 12, 10, ("a",))]
    assert state.tier("a") is Tier.DEVICE


def test_a_model_larger_than_the_device_is_refused_and_nobody_leaves():
    state = device({"a": 10, "huge": 99}, capacity_bytes=50)
    use(state, "a", 1)
    assert state.handle(Wanted("huge"), 2) == [Refuse("huge", 99, 50, 0)]
    assert state.tier("a") is Tier.DEVICE


def test_max_models_evicts_by_policy():
    state = device(dict.fromkeys("abc", 1), capacity_bytes=100, max_models=2)
    for now_s, name in enumerate("aba", start=1):
        use(state, name, now_s)
    assert use(state, "c", 4) == ["b"]


def test_a_model_just_loaded_keeps_its_place_for_a_while():
    state = device({"a": 10, "b": 10}, capacity_bytes=10, min_residency_s=5)
    use(state, "a", 1)
    assert state.handle(Wanted("b"), 2) == []
    assert state.handle(Tick(), 5.9) == []
    assert state.handle(Tick(), 6) == [Evict("a", "room for b")]


def test_an_idle_model_leaves_after_its_time():
    state = Residency(capacity_bytes=100)
    state.handle(Added("a", Footprint(weight_bytes=1), idle_unload_s=10), 0)
    use(state, "a", 1)
    assert state.handle(Tick(), 10.9) == []
    assert state.handle(Tick(), 11) == [Evict("a", "idle for 10 s")]


def test_work_for_a_draining_model_keeps_it():
    state = device({"a": 10, "b": 10}, capacity_bytes=10)
    use(state, "a", 1)
    state.handle(Started("a"), 2)
    state.handle(Unwanted("a"), 2)
    state.handle(Wanted("a"), 3)
    assert state.may_start("a")


def test_a_large_model_is_not_starved_by_small_ones():
    state = device({"a": 6, "big": 10, "small": 2}, capacity_bytes=10)
    use(state, "a", 1)
    state.handle(Started("a"), 2)
    state.handle(Wanted("big"), 3)
    assert state.handle(Wanted("small"), 4) == []
    state.handle(Finished("a"), 5)
    assert state.handle(Evicted("a"), 6) == [Load("big")]


def test_no_room_takes_models_off_one_by_one_and_refuses_at_last():
    state = device({"a": 10, "b": 10, "new": 10}, capacity_bytes=100)
    use(state, "a", 1)
    use(state, "b", 2)
    assert state.handle(Wanted("new"), 3) == [Load("new")]
    assert state.handle(NoRoom("new"), 4) == [Evict("a", "room")]
    assert state.handle(Tick(), 5) == []
    assert state.handle(Evicted("a"), 6) == [Load("new")]
    assert state.handle(NoRoom("new"), 7) == [Evict("b", "room")]
    assert state.handle(Evicted("b"), 8) == [Load("new")]
    assert state.handle(NoRoom("new"), 9) == [Refuse("new", 10, 100, 0)]


def no_room_beside_a():
    """Model `a` runs, and is to leave for `new`, which found no room."""
    state = device({"a": 10, "new": 10}, capacity_bytes=100)
    use(state, "a", 1)
    state.handle(Started("a"), 2)
    state.handle(Wanted("new"), 3)
    assert state.handle(NoRoom("new"), 4) == []
    return state


def test_what_finds_no_room_gets_it_before_new_work_of_the_model_that_leaves_for_it():
    state = no_room_beside_a()
    assert state.handle(Wanted("a"), 5) == []
    assert state.handle(Finished("a"), 6) == [Evict("a", "room")]
    assert state.handle(Evicted("a"), 7) == [Load("new"), Load("a")]


def test_what_finds_no_room_does_not_wait_for_a_model_that_is_lost():
    assert no_room_beside_a().handle(Unwanted("a", is_lost=True), 5) == [Load("new")]


def test_a_model_that_fails_on_its_way_to_the_device_takes_no_room():
    state = device({"a": 10, "b": 10}, capacity_bytes=10)
    assert state.handle(Wanted("a"), 1) == [Load("a")]
    assert state.handle(Removed("a", is_lost=True), 2) == []
    assert not state.knows("a")
    assert state.handle(Wanted("b"), 3) == [Load("b")]


def test_what_comes_back_fast_leaves_first_by_its_measured_time():
    state = device({"slow": 10, "fast": 10, "new": 10}, capacity_bytes=20, policy=eviction.gdsf)
    for now_s, (name, took_s) in enumerate({"slow": 0.5, "fast": 0.01}.items(), 1):
        state.handle(Wanted(name), now_s)
        state.handle(Loaded(name, took_s), now_s)
    assert use(state, "new", 3) == ["fast"]


def test_a_call_without_room_takes_idle_models_off_and_never_those_that_run_or_itself():
    state = device({"a": 10, "b": 10, "c": 10}, capacity_bytes=100)
    for now_s, name in enumerate(("a", "b", "c"), 1):
        use(state, name, now_s)
    state.handle(Started("a"), 4)
    state.handle(Started("b"), 4)
    assert state.handle(Overran("a"), 5) == [Evict("c", "room for a call of a")]
    assert state.is_evicting
    assert state.handle(Overran("b"), 5) == [], "one at a time is enough to look again"
    state.handle(Evicted("c"), 6)
    assert state.handle(Overran("a"), 7) == []
    assert not state.is_evicting


def test_less_capacity_takes_models_off():
    state = device({"a": 10, "b": 10}, capacity_bytes=20)
    use(state, "a", 1)
    use(state, "b", 2)
    assert state.handle(CapacityChanged(15), 3) == [Evict("a", "capacity shrank")]


def test_a_removed_model_leaves_and_is_forgotten():
    state = device({"a": 10}, capacity_bytes=20)
    use(state, "a", 1)
    assert state.handle(Removed("a"), 2) == [Evict("a", "unloaded")]
    state.handle(Evicted("a"), 3)
    with pytest.raises(KeyError):
        state.tier("a")


def test_an_executors_death_frees_its_models_at_once():
    state = device({"a": 10}, capacity_bytes=20)
    use(state, "a", 1)
    state.handle(Started("a"), 2)
    state.handle(Unwanted("a", is_lost=True), 3)
    assert state.used_bytes == 0


NAMES = [f"m{index}" for index in range(6)]


class RandomTrace(RuleBasedStateMachine):
    """Any trace of events: the budget holds, nothing leaves while it runs, nothing waits for ever."""

    @initialize(
        sizes=st.lists(st.integers(1, 60), min_size=6, max_size=6),
        pinned=st.sampled_from([None, *NAMES]),
        policy=st.sampled_from(list(eviction.POLICIES)),
        max_models=st.none() | st.integers(1, 3),
    )
    def start(self, sizes, pinned, policy, max_models):
        self.now_s, self.todo, self.running, self.pinned = 0.0, [], [], pinned
        self.state = Residency(
            capacity_bytes=100, policy=eviction.POLICIES[policy], max_models=max_models
        )
        for name, size in zip(NAMES, sizes, strict=True):
            footprint = Footprint(weight_bytes=size, activation_bytes=size // 4)
            self.feed(Added(name, footprint, pinned=name == pinned))

    def feed(self, event):
        self.now_s += 1
        actions = self.state.handle(event, self.now_s)
        for action in actions:
            if isinstance(action, Evict):
                assert action.model not in self.running
                assert action.model != self.pinned
        self.todo += [action for action in actions if not isinstance(action, Refuse)]

    @rule(name=st.sampled_from(NAMES))
    def want(self, name):
        self.feed(Wanted(name))

    @rule(name=st.sampled_from(NAMES))
    def run(self, name):
        if self.state.may_start(name):
            self.running.append(name)
            self.feed(Started(name))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        name = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.feed(Finished(name))

    @precondition(lambda self: self.todo)
    @rule(data=st.data(), end=st.sampled_from([Loaded, Loaded, LoadFailed, NoRoom]))
    def carry_out(self, data, end):
        action = self.todo.pop(data.draw(st.integers(0, len(self.todo) - 1)))
        self.feed(Evicted(action.model) if isinstance(action, Evict) else end(action.model))

    @rule(name=st.sampled_from(NAMES), fails=st.booleans())
    def lose(self, name, fails):
        """Its executor died, and it may have failed by that."""
        self.running = [other for other in self.running if other != name]
        self.todo = [action for action in self.todo if action.model != name]
        if fails:
            self.feed(Removed(name, is_lost=True))
            assert not self.state.knows(name)
            self.feed(Added(name, Footprint(weight_bytes=20), pinned=name == self.pinned))
        else:
            self.feed(Unwanted(name, is_lost=True))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def overrun(self, data):
        self.feed(Overran(data.draw(st.sampled_from(self.running))))

    @rule()
    def tick(self):
        self.feed(Tick())

    @invariant()
    def budget_holds(self):
        if hasattr(self, "state"):
            assert self.state.used_bytes <= 100

    def teardown(self):
        """Once all work ends and all actions are carried out, nobody wants a model in vain."""
        if not hasattr(self, "state"):
            return
        while self.running or self.todo:
            while self.running:
                self.feed(Finished(self.running.pop()))
            while self.todo:
                action = self.todo.pop(0)
                done = Evicted if isinstance(action, Evict) else Loaded
                self.feed(done(action.model))
        assert not [n for n, m in self.state._models.items() if m.wanted_s is not None]


TestRandomTrace = RandomTrace.TestCase
TestRandomTrace.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
