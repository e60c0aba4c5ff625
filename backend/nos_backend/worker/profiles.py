"""What a device's models need: measured beside the one that serves, once, where it disturbs nobody.

A model that answers is bound a second time, in an executor of its own that gives way to others and ends
afterwards; its calls are a sample's, made up from the signature or like the first real one. On the CPU the
weights are the same pages. A constructor does not run for it, and what a sample breaks, it breaks alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import os
import platform
import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError
from nos.errors import InternalError, NosError, OutOfDeviceMemoryError
from nos.wire.v1 import models_pb2

from nos_backend.definition import LOAD_TIMEOUT_S
from nos_backend.scheduling import knee
from nos_backend.scheduling.batching import MAX_BATCH_BYTES, MAX_BATCH_ROWS
from nos_backend.scheduling.caps import Cap
from nos_backend.worker import samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.worker.dispatch import Request
    from nos_backend.worker.entries import Entry
    from nos_backend.worker.executors import Executor
    from nos_backend.worker.launcher import Launcher
    from nos_backend.worker.samples import Sample

_logger = logging.getLogger(__name__)

ENGINE: Final = "eager"

#: One size, or a prediction, which imports much of torch first.
_PASS_S: Final = 60.0
#: Passes of one size are repeated for so long.
_SIZE_S: Final = 0.06
#: What measuring one size costs, in passes of twice the rows of the size before.
_COST: Final = 3.0
#: A first call comes right behind its load: it is let pass.
_SETTLE_S: Final = 0.25
_POLL_S: Final = 0.02
#: After so long without a quiet moment the profile is given up, until the next load.
_PATIENCE_S: Final = 60.0
#: What a process takes on a device that is not the CPU before it has a model.
_CONTEXT_BYTES: Final = 1 << 30
_DIGEST_CHARACTERS: Final = 12
_NONSENSE: Final = "an executor told nonsense about a model"


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """Whether and how models are profiled."""

    product: str
    """What the device is, for people; figures of another one are not used."""
    budget_s: float = 2.0
    """How long measuring one model may keep a core or the device busy."""


@dataclass(slots=True, eq=False)
class _Record:
    entry: Entry
    #: Those that are to be profiled and have no sample yet, by name.
    wanting: dict[str, models_pb2.Method]
    #: Not measured yet.
    samples: list[Sample] = field(default_factory=list)
    #: Set when a sample came.
    sampled: asyncio.Event = field(default_factory=asyncio.Event)
    profile: models_pb2.Profile | None = None
    #: Why there is none; empty where nothing went wrong.
    note: str = ""
    task: asyncio.Task[None] | None = None


class Profiles:
    """Belongs to one event loop.

    Args:
        launcher: Starts executors.
        device: As torch writes it.
        options: What that is, and how long to measure; None measures nothing, and takes any
            product's figures.
        num_threads: Of one operation in an executor.
        is_quiet: Whether a batch more would keep nobody waiting.
        room_bytes: What the device's budget has left.
        on_profile: Called with a model and its profile, new or known from before.
        on_cap: Called with the key of a model and what its batches taught before.
        on_measured: Called with the key of a model whose profile is new, or says something new.
    """

    def __init__(
        self,
        launcher: Launcher,
        *,
        device: str,
        options: ProfileOptions | None,
        num_threads: int,
        is_quiet: Callable[[], bool],
        room_bytes: Callable[[], int],
        on_profile: Callable[[Entry, models_pb2.Profile], None],
        on_cap: Callable[[str, Cap], None],
        on_measured: Callable[[str], None],
    ) -> None:
        self._launcher = launcher
        self._device = device
        self._options = options
        self._versions = {
            "nos": _version_of("nos-inference"),
            "torch": _version_of("torch"),
            "python": platform.python_version(),
            "threads": str(num_threads),
        }
        self._is_quiet = is_quiet
        self._room_bytes = room_bytes
        self._on_profile = on_profile
        self._on_cap = on_cap
        self._on_measured = on_measured
        self._loop = asyncio.get_running_loop()
        self._records: dict[str, _Record] = {}
        #: One at a time.
        self._turn = asyncio.Semaphore(1)

    def recall(self, entry: Entry) -> None:
        """Take what is known of a model from before its load, so that its first batches keep to it."""
        for raw in entry.definition.profiles:
            with contextlib.suppress(DecodeError):
                profile = models_pb2.Profile.FromString(raw)
                if self._is_ours(profile, entry):
                    self._records[entry.key] = _Record(entry, {}, profile=profile)
                    self._on_profile(entry, profile)
                    if profile.HasField("cap"):
                        self._on_cap(entry.key, self._to_cap(profile.cap))

    def keep_cap(self, entry: Entry, cap: Cap | None) -> None:
        """Keep what a model's batches taught, measured or not; None: all goes well again."""
        record = self._records.setdefault(entry.key, _Record(entry, {}))
        profile = self._bare_profile(entry)
        if record.profile is not None:
            profile.CopyFrom(record.profile)
        profile.ClearField("cap")
        if cap is not None:
            profile.cap.CopyFrom(self._from_cap(cap))
        record.profile = profile
        self._on_measured(entry.key)

    def begin(self, entry: Entry) -> None:
        """Profile a model that answers now, as soon as it can be; one that is known is left alone."""
        record = self._records.get(entry.key)
        if record is not None and record.profile is not None:
            self._on_profile(entry, record.profile)  # its queue is open by now
        if self._options is None or (record is not None and record.task is not None):
            return
        if record is None:
            record = self._records[entry.key] = _Record(entry, {})
        if not entry.is_movable:
            record.note = "not profiled: it cannot be measured beside itself"
            return
        known = {method.method for method in record.profile.methods} if record.profile else set()
        for method in samples.methods_to_profile(entry.spec):
            if method.name in known:
                continue
            sample = samples.from_signature(method)
            if sample is None:
                record.wanting[method.name] = method
            else:
                record.samples.append(sample)
        if record.samples:
            record.sampled.set()
        if record.samples or record.wanting:
            name = f"profile {entry.key}"
            record.task = asyncio.create_task(self._work(record, self._options), name=name)

    def saw(self, request: Request) -> None:
        """A call is about to be queued: keep it if its signature says too little."""
        record = self._records.get(request.model)
        if record is None or request.method not in record.wanting:
            return
        method = record.wanting.pop(request.method)
        view = request.input.view if request.input is not None else None
        sample = samples.from_call(method, request.arguments, view)
        if sample is None:
            record.note = f"not profiled: the first call of {method.name} was too large to keep"
            return
        record.samples.append(sample)
        record.sampled.set()

    def get(self, key: str) -> dict[str, Any]:
        """Return how far a model's profile is, in plain types.

        ::

            {"state": "none" | "waits for a call" | "pending" | "ready",
             "profile": bytes (a nos.v1.Profile, without methods unless ready, or empty),
             "note": why there is none}
        """
        record = self._records.get(key)
        profile = record.profile if record else None
        return {
            "state": self._state(record),
            "profile": profile.SerializeToString() if profile else b"",
            "note": record.note if record else "",
        }

    def note(self, key: str) -> str:
        """Return why a model has no profile, or how its profile fell short; empty if it did not."""
        record = self._records.get(key)
        return record.note if record else ""

    @staticmethod
    def _state(record: _Record | None) -> str:
        if record is not None and record.profile is not None and record.profile.methods:
            return "ready"
        if record is None or record.task is None or record.task.done():
            return "none"
        return "pending" if record.samples else "waits for a call"

    def forget(self, key: str) -> None:
        """A model is gone."""
        record = self._records.pop(key, None)
        if record is not None and record.task is not None:
            record.task.cancel()

    async def close(self) -> None:
        """Stop."""
        tasks = [record.task for record in self._records.values() if record.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _versions_of(self, entry: Entry) -> dict[str, str]:
        """Return what figures depend on, the source included: a file's has always the same number."""
        source = hashlib.sha256(entry.definition.source.encode()).hexdigest()
        return {**self._versions, "source": source[:_DIGEST_CHARACTERS]}

    def _is_ours(self, profile: models_pb2.Profile, entry: Entry) -> bool:
        return (
            profile.model == entry.key
            and profile.device.partition(":")[0] == self._device.partition(":")[0]
            and (self._options is None or profile.product == self._options.product)
            and profile.engine == ENGINE
            and dict(profile.versions) == self._versions_of(entry)
        )

    async def _work(self, record: _Record, options: ProfileOptions) -> None:
        while record.samples or record.wanting:
            await record.sampled.wait()
            record.sampled.clear()
            await asyncio.sleep(_SETTLE_S)
            async with self._turn:
                taken = list(record.samples)
                try:
                    methods = await self._profile(record, taken, options.budget_s)
                except NosError as error:
                    record.note = f"not profiled: {error}"
                    _logger.info("%s: %s", record.entry.key, record.note)
                    return
                except Exception:  # the top level of this task
                    _logger.exception("profiling %s failed by a defect", record.entry.key)
                    record.note = "not profiled: the server has a defect"
                    return
                del record.samples[: len(taken)]
            if methods:
                self._publish(record, methods)

    async def _profile(
        self, record: _Record, taken: list[Sample], budget_s: float
    ) -> list[models_pb2.MethodProfile]:
        """Measure what the samples call, in an executor for that alone.

        Raises:
            NosError: If nothing could be measured.
        """
        entry, copy = record.entry, record.entry.copy
        if not await self._quiet() or copy is None or not copy.is_in_memory:
            raise InternalError("there was no quiet moment")
        on_cpu = entry.slot.device == "cpu"
        needed_bytes = 0 if on_cpu else copy.size_bytes + _CONTEXT_BYTES
        if self._room_bytes() < needed_bytes:
            raise OutOfDeviceMemoryError("the device has no room for a second copy")
        weights = (os.dup(copy.weights_fd), copy.size_bytes)
        skeleton = (os.dup(copy.skeleton_fd), copy.skeleton_bytes)
        executor = None
        try:
            executor = await self._launcher.start(
                f"{entry.definition.owner}/profile",
                entry.definition.owner,
                entry.slot.device,
                entry.slot.requirements,
            )
            await executor.bind(entry.definition, weights, skeleton, LOAD_TIMEOUT_S)
            sweep = _Sweep(executor, entry, self._quiet, self._room_bytes, budget_s)
            specs = {method.name: method for method in entry.spec.methods}
            found = [await sweep.run(sample, specs[sample.method]) for sample in taken]
            if sweep.error is not None and not any(method.points for method in found):
                raise sweep.error
            return found
        finally:
            os.close(weights[0])
            os.close(skeleton[0])
            if executor is not None:
                executor.kill("its profile is done")
                await asyncio.shield(executor.closed)

    async def _quiet(self) -> bool:
        """Wait until nobody would wait for a batch more; return False if that does not come."""
        deadline_s = self._loop.time() + _PATIENCE_S
        while not self._is_quiet():
            if self._loop.time() > deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _bare_profile(self, entry: Entry) -> models_pb2.Profile:
        return models_pb2.Profile(
            model=entry.key,
            device=self._device,
            product=self._options.product if self._options else "",
            engine=ENGINE,
            versions=self._versions_of(entry),
            time_s=time.time(),
            weight_bytes=entry.weight_bytes,
        )

    def _to_cap(self, kept: models_pb2.BatchCap) -> Cap:
        age_s = max(0.0, time.time() - kept.time_s)
        return Cap(
            rows=max(1, kept.rows),
            failed_rows=kept.failed_rows,
            since_s=self._loop.time() - age_s,
            wait_s=kept.wait_s,
            is_trial=kept.is_trial,
        )

    def _from_cap(self, cap: Cap) -> models_pb2.BatchCap:
        return models_pb2.BatchCap(
            rows=cap.rows,
            failed_rows=cap.failed_rows,
            time_s=time.time() - (self._loop.time() - cap.since_s),
            wait_s=cap.wait_s,
            is_trial=cap.is_trial,
        )

    def _publish(self, record: _Record, methods: list[models_pb2.MethodProfile]) -> None:
        entry = record.entry
        known = (
            {method.method: method for method in record.profile.methods} if record.profile else {}
        )
        known.update({method.method: method for method in methods})
        profile = self._bare_profile(entry)
        profile.methods.extend(
            known[item.name] for item in entry.spec.methods if item.name in known
        )
        profile.activation_bytes = _activation_bytes(profile)
        if record.profile is not None and record.profile.HasField("cap"):
            profile.cap.CopyFrom(record.profile.cap)
        record.profile = profile
        record.note = "; ".join(f"{it.method} {it.note}" for it in methods if it.note)
        _logger.info("%s is profiled%s", entry.key, f": {record.note}" if record.note else "")
        self._on_profile(entry, profile)
        self._on_measured(entry.key)


class _Sweep:
    """Measures methods at growing sizes until the time is up."""

    def __init__(
        self,
        executor: Executor,
        entry: Entry,
        quiet: Callable[[], Any],
        room_bytes: Callable[[], int],
        budget_s: float,
    ) -> None:
        self._executor = executor
        self._key = entry.key
        self._quiet = quiet
        self._room_bytes = room_bytes
        self._left_s = self._budget_s = budget_s
        #: Of the method that is measured, by rows.
        self._modules: dict[int, list[models_pb2.ModuleUse]] = {}
        #: What ended the last one early, if not the time.
        self.error: NosError | None = None

    async def run(self, sample: Sample, method: models_pb2.Method) -> models_pb2.MethodProfile:
        """Measure one method; what goes wrong is in its note."""
        found = models_pb2.MethodProfile(method=method.name, sample=sample.origin)
        ladder = _ladder(sample, method)
        self._modules.clear()
        found.note = await self._measure(sample, ladder, found)
        if method.HasField("batching") and not method.batching.is_each:
            _choose(found, method.batching.max_rows, ladder if self.error is None else [])
        if isinstance(self.error, OutOfDeviceMemoryError):
            await self._predict(sample, ladder[len(found.points) :], found)
        if self._modules:
            found.module_rows = found.chosen_rows or max(self._modules)
            if found.module_rows not in self._modules:
                found.module_rows = max(self._modules)
            found.modules.extend(self._modules[found.module_rows])
        return found

    async def _measure(
        self, sample: Sample, ladder: list[int], found: models_pb2.MethodProfile
    ) -> str:
        """Add a point for each size; returns why it stopped before the last one."""
        self.error = None
        for rows in ladder:
            predicted_bytes = 0
            if found.points:
                last = found.points[-1]
                if _COST * rows / last.rows * last.took_s > self._left_s:
                    return f"was not tried with {rows} rows: {self._budget_s:g} s were up"
                seen = [(point.rows, point.measured_bytes) for point in found.points]
                predicted_bytes = knee.fit_activations(seen).at(rows) if len(seen) > 1 else 0
            if not await self._quiet():
                return f"was not tried with {rows} rows: there was no quiet moment"
            try:
                if predicted_bytes > self._room_bytes():
                    raise OutOfDeviceMemoryError("the budget has no room")
                (raw,) = await self._ask(sample, op="measure", rows=rows, limit_s=_SIZE_S)
                self._left_s -= _seconds(raw.get("spent_s"))
                point = _point(raw, rows)
                point.predicted_bytes = predicted_bytes
                found.points.append(point)
                self._modules[rows] = _modules(raw)
            except NosError as error:
                self.error = error
                return f"failed with {rows} rows: {error}"
        return ""

    async def _predict(
        self, sample: Sample, sizes: list[int], found: models_pb2.MethodProfile
    ) -> None:
        """Say what sizes need for which there was no room, without running them."""
        try:
            for raw in await self._ask(sample, op="predict", sizes=sizes):
                found.points.add(
                    rows=_whole(raw.get("rows")),
                    predicted_bytes=_whole(raw.get("peak_bytes")),
                    flops=_whole(raw.get("flops")),
                )
        except NosError as error:
            found.note += f"; cannot be predicted: {error}"

    async def _ask(self, sample: Sample, **fields: Any) -> list[dict[str, Any]]:
        """Have the executor do something; its answer is a list of dicts, and no more is known of it.

        Raises:
            NosError: What the model raised, or that it took too long.
        """
        message = {
            **fields,
            "key": self._key,
            "method": sample.method,
            "args": sample.arguments,
            "joined": sample.joined,
        }
        try:
            async with asyncio.timeout(_PASS_S):
                points = await self._executor.profile(message, sample.data)
        except TimeoutError:
            self._executor.kill("its profile takes too long")
            raise InternalError(f"it took over {_PASS_S:g} s") from None
        if not isinstance(points, list) or not all(isinstance(point, dict) for point in points):
            raise InternalError(_NONSENSE)
        return points


def advice(profile: models_pb2.Profile) -> tuple[int, list[tuple[int, float]]]:
    """Return the rows that batches may have, 0 where nothing is chosen, and (rows, seconds) of some."""
    batching = [method for method in profile.methods if method.chosen_rows]
    if not batching:
        return 0, []
    largest = max(batching, key=lambda method: method.chosen_rows)
    return largest.chosen_rows, [(it.rows, it.took_s) for it in largest.points if it.took_s]


def _version_of(distribution: str) -> str:
    """Return an installed version; empty where the code is used from its folder."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _ladder(sample: Sample, method: models_pb2.Method) -> list[int]:
    """Return the sizes to try: powers of two up to the author's limit or the usual one."""
    if not sample.joined:
        return [1]
    most = method.batching.max_rows or MAX_BATCH_ROWS
    most = max(1, min(most, MAX_BATCH_BYTES // max(1, len(sample.data))))
    sizes = [1 << power for power in range(int(math.log2(most)) + 1)]
    return sizes if sizes[-1] == most else [*sizes, most]


def _choose(found: models_pb2.MethodProfile, limit: int, ladder: list[int]) -> None:
    """Choose a batch among the sizes measured, and those of `ladder` on the line through them."""
    times_of = [(point.rows, point.took_s) for point in found.points if point.took_s]
    if not times_of:
        return
    choice = knee.choose(times_of)
    found.t0_s, found.row_s = choice.t0_s, choice.row_s
    if len(times_of) == 1 and len(ladder) > 1:
        found.why = "nothing is chosen: one size was measured"
        return
    beyond = [(rows, choice.t0_s + choice.row_s * rows) for rows in ladder[len(times_of) :]]
    if beyond:
        choice = knee.choose([*times_of, *beyond])
    found.chosen_rows, found.why = choice.rows, choice.why
    if beyond:
        found.why += f", by the line beyond {times_of[-1][0]} rows"
    if limit:
        found.chosen_rows = limit
        found.why = f"its author's limit; by these figures {choice.rows}: {choice.why}"


def _activation_bytes(profile: models_pb2.Profile) -> int:
    """Return the most bytes of the largest batch; of a method that does not batch, of one call."""
    rows, _ = advice(profile)
    most = 0
    for method in profile.methods:
        points = [(it.rows, it.measured_bytes or it.predicted_bytes) for it in method.points]
        if points:
            size = (rows or MAX_BATCH_ROWS) if method.t0_s or method.row_s else 1
            most = max(most, knee.fit_activations(points).at(size))
    return most


def _point(raw: dict[str, Any], rows: int) -> models_pb2.ProfilePoint:
    return models_pb2.ProfilePoint(
        rows=rows,
        took_s=_seconds(raw.get("took_s")),
        measured_bytes=_whole(raw.get("peak_bytes")),
        flops=_whole(raw.get("flops")),
    )


def _modules(raw: dict[str, Any]) -> list[models_pb2.ModuleUse]:
    try:
        return [
            models_pb2.ModuleUse(
                path=str(path),
                kind=str(kind),
                weight_bytes=_whole(weight),
                activation_bytes=_whole(activation),
                workspace_bytes=_whole(workspace),
            )
            for path, kind, weight, activation, workspace in raw["modules"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InternalError(_NONSENSE, got=repr(error)[:100]) from None


def _seconds(value: Any) -> float:
    if type(value) is not float or not 0 < value < math.inf:
        raise InternalError(_NONSENSE, got=repr(value)[:100])
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise InternalError(_NONSENSE, got=repr(value)[:100])
    return value
