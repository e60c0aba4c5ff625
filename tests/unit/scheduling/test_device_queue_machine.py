"""The device queue under any order of events keeps its promises."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from nos.errors import LoadError
from nos_backend.scheduling.device_queue import (
    Action,
    Batch,
    BatchLimits,
    DeviceQueue,
    End,
    KillExecutor,
    Refuse,
    Request,
    Start,
)

MODELS = {"a": "x", "b": "x", "c": "y", "d": "z"}
GRANTS = 2
MAX_ROWS = 6


class DeviceQueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = DeviceQueue(max_concurrent_batches=GRANTS, max_queued=3)
        self.now_s = 0.0
        self.next_id = 1
        self.open: set[str] = set()
        self.admitted: set[int] = set()
        self.ended: set[int] = set()
        self.running: dict[str, Batch] = {}
        self.started: set[int] = set()

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, End):
                assert action.request_id in self.admitted, "an end without admission"
                assert action.request_id not in self.ended, "two ends"
                assert action.error is not None or action.request_id in self.started
                self.ended.add(action.request_id)
            elif isinstance(action, Refuse):
                assert action.request_id in self.admitted
                self.admitted.discard(action.request_id)
            elif isinstance(action, Start):
                assert action.batch.executor not in self.running, "two batches on one executor"
                assert all(item.id not in self.ended for item in action.batch.requests)
                is_alone = len(action.batch.requests) == 1
                assert is_alone or action.batch.is_train or action.batch.rows <= MAX_ROWS
                assert len({(item.model, item.key) for item in action.batch.requests}) == 1
                self.running[action.batch.executor] = action.batch
                self.started |= {item.id for item in action.batch.requests}
            elif isinstance(action, KillExecutor):
                assert action.executor in self.running

    @rule(model=st.sampled_from(sorted(MODELS)))
    def open_model(self, model: str) -> None:
        self.open.add(model)
        actions = self.queue.open_model(
            model,
            MODELS[model],
            now_s=self.now_s,
            call_timeout_s=5.0,
            limits=BatchLimits(max_rows=MAX_ROWS, queue_delay_s=0.5 if model == "d" else None),
        )
        self.apply(actions)

    @rule(model=st.sampled_from(sorted(MODELS)))
    def close_model(self, model: str) -> None:
        self.open.discard(model)
        self.apply(self.queue.close_model(model, LoadError("closed"), now_s=self.now_s))

    @rule(
        model=st.sampled_from(sorted(MODELS)),
        tenant=st.sampled_from("tu"),
        ttl_s=st.none() | st.floats(0, 8),
        key=st.sampled_from([None, "k", "l"]),
        rows=st.integers(1, 5),
        sender=st.integers(0, 2),
    )
    def arrive(
        self, model: str, tenant: str, ttl_s: float | None, key: str | None, rows: int, sender: int
    ) -> None:
        deadline_s = None if ttl_s is None else self.now_s + ttl_s
        request = Request(
            id=self.next_id,
            model=model,
            tenant=tenant,
            deadline_s=deadline_s,
            key=key,
            rows=rows,
            sender=sender,
        )
        self.next_id += 1
        self.admitted.add(request.id)
        self.apply(self.queue.arrive(request, now_s=self.now_s))

    @precondition(lambda self: self.next_id > 1)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(1, self.next_id - 1))
        self.apply(self.queue.cancel(request_id, now_s=self.now_s))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        executor = data.draw(st.sampled_from(sorted(self.running)))
        batch = self.running.pop(executor)
        self.apply(self.queue.finish(batch.id, executor, now_s=self.now_s))

    @precondition(lambda self: any(batch.is_train for batch in self.running.values()))
    @rule(data=st.data())
    def answer_one_of_a_train(self, data: st.DataObject) -> None:
        trains = [name for name, batch in self.running.items() if batch.is_train]
        executor = data.draw(st.sampled_from(sorted(trains)))
        batch = self.running[executor]
        request = data.draw(st.sampled_from(batch.requests))
        self.apply(self.queue.answered(batch.id, executor, request.id, now_s=self.now_s))

    @rule(executor=st.sampled_from("xyz"))
    def lose(self, executor: str) -> None:
        self.running.pop(executor, None)
        self.open -= {model for model, home in MODELS.items() if home == executor}
        self.apply(self.queue.executor_lost(executor, "signal 9", now_s=self.now_s))

    @rule(executor=st.sampled_from("xyz"), is_held=st.booleans())
    def hold(self, executor: str, is_held: bool) -> None:
        change = self.queue.hold if is_held else self.queue.release
        self.apply(change(executor, now_s=self.now_s))

    @rule(step_s=st.floats(0, 4))
    def pass_time(self, step_s: float) -> None:
        self.now_s += step_s
        self.apply(self.queue.tick(now_s=self.now_s))

    @invariant()
    def grants_are_not_exceeded(self) -> None:
        assert len(self.running) == self.queue.num_running <= GRANTS

    @invariant()
    def what_has_no_end_is_live(self) -> None:
        for request_id in self.admitted | self.ended:
            is_open = request_id in self.admitted and request_id not in self.ended
            assert self.queue.is_live(request_id) == is_open

    @invariant()
    def the_queue_is_bounded(self) -> None:
        assert self.queue.num_queued <= 3 * len(MODELS)

    def teardown(self) -> None:
        """Once every model is open and every batch ends, nothing waits and all have their end."""
        for executor in "xyz":
            self.apply(self.queue.release(executor, now_s=self.now_s))
        for model in MODELS:
            self.open_model(model)
        self.pass_time(1.0)  # longer than the queue delay
        while self.running:
            executor = min(self.running)
            batch = self.running.pop(executor)
            self.apply(self.queue.finish(batch.id, executor, now_s=self.now_s))
            self.pass_time(1.0)
        assert self.queue.num_queued == 0, "starved"
        assert self.ended == self.admitted


TestDeviceQueueMachine = DeviceQueueMachine.TestCase
TestDeviceQueueMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
