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
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from google.protobuf.message import DecodeError
from nos.errors import InternalError, NosError, OutOfDeviceMemoryError
from nos.wire.v1 import models_pb2

from nos_backend.definition import LOAD_TIMEOUT_S
from nos_backend.scheduling import knee
from nos_backend.scheduling.batching import MAX_BATCH_ROWS
from nos_backend.scheduling.caps import Cap
from nos_backend.worker import samples
from nos_backend.worker.sweeps import Sweep, ask, ladder_of, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from nos_backend.worker.dispatch import Request
    from nos_backend.worker.entries import Entry
    from nos_backend.worker.launcher import Launcher
    from nos_backend.worker.samples import Sample

_logger = logging.getLogger(__name__)

ENGINE: Final = "eager"

#: A first call comes right behind its load: it is let pass.
_SETTLE_S: Final = 0.25
_POLL_S: Final = 0.02
#: After so long without a quiet moment the profile is given up, until the next load.
_PATIENCE_S: Final = 60.0
#: What a process takes on a device that is not the CPU before it has a model.
_CONTEXT_BYTES: Final = 1 << 30
_MAX_AGAIN_S: Final = 86_400.0
#: How often it is asked whether models are still what their profiles say.
_LOOK_S: Final = 1.0
#: Batches since a model was measured that say whether it is still the same.
_NEW_BATCHES: Final = 100
_DIGEST_CHARACTERS: Final = 12


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """Whether and how models are profiled."""

    product: str
    """What the device is, for people; figures of another one are not used."""
    budget_s: float = 2.0
    """How long measuring one model may keep a core or the device busy."""
    again_s: float = 60.0
    """How long after a profile the next one is made at the earliest, where batches do not take what it
    says, or do not fit; each time twice as long."""


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
    #: When it may be measured again, on the loop's clock, and how long after that the next time.
    again_at_s: float = 0.0
    again_s: float = 0.0
    #: How many of its batches had run when it was measured last.
    num_seen: int = 0


class Profiles:
    """Belongs to one event loop.

    Args:
        launcher: Starts executors.
        device: As torch writes it.
        options: What that is, and how long to measure; None measures nothing, and takes any
            product's figures.
        num_threads: Of one operation in an executor.
        is_quiet: Whether a batch more would keep nobody waiting.
        room_bytes: What the device's budget has left for the activations of a model.
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
        room_bytes: Callable[[str], int],
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
        if self._options and cap is not None and cap.wait_s < math.inf and self._is_due(record):
            self._measure(record, self._options, ())

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
        self._measure(record, self._options, known)

    def _measure(self, record: _Record, options: ProfileOptions, known: Collection[str]) -> None:
        """Profile the methods that are not known."""
        entry = record.entry
        record.samples.clear()
        record.wanting.clear()
        record.sampled.clear()
        for method in samples.methods_to_profile(entry.spec):
            if method.name in known:
                continue
            sample = samples.from_signature(method)
            if sample is None:
                record.wanting[method.name] = method
            else:
                record.samples.append(sample)
        record.again_s = min(2 * record.again_s or options.again_s, _MAX_AGAIN_S)
        record.again_at_s = self._loop.time() + record.again_s
        if record.samples:
            record.sampled.set()
        if record.samples or record.wanting:
            name = f"profile {entry.key}"
            record.task = asyncio.create_task(self._work(record, options), name=name)

    async def watch(self, recent: Callable[[str], tuple[int, float, float]]) -> None:
        """See again and again whether models are still what their profiles say; if not, measure them again.

        Args:
            recent: Says of a model how many batches ran, and the mean rows and seconds of the last of them.
        """
        while self._options is not None:
            await asyncio.sleep(_LOOK_S)
            for record in list(self._records.values()):
                self._look(record, self._options, *recent(record.entry.key))

    def _look(
        self,
        record: _Record,
        options: ProfileOptions,
        num_batches: int,
        rows: float,
        took_s: float,
    ) -> None:
        if not self._is_due(record) or num_batches < record.num_seen + _NEW_BATCHES:
            return
        if record.profile is None or len(record.entry.spec.methods) != 1:
            return  # nobody knows whose batches those were
        (method,) = record.profile.methods
        expected_s = method.t0_s + method.row_s * rows
        if expected_s and knee.is_off(expected_s, took_s):
            _logger.info(
                "%s is measured again: batches of %.1f rows take %.3g s, not %.3g s",
                *(record.entry.key, rows, took_s, expected_s),
            )
            record.num_seen = num_batches
            self._measure(record, options, ())

    def _is_due(self, record: _Record) -> bool:
        """Whether a model that was measured may be measured again."""
        is_busy = record.task is not None and not record.task.done()
        is_measured = record.profile is not None and bool(record.profile.methods)
        return is_measured and not is_busy and self._loop.time() >= record.again_at_s

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
        if self._room_bytes(entry.key) < needed_bytes:
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
            executor.mute()
            await executor.bind(entry.definition, weights, skeleton, LOAD_TIMEOUT_S)
            room_bytes = partial(self._room_bytes, entry.key)
            sweep = Sweep(executor, entry, self._quiet, room_bytes, budget_s)
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

    async def predict(self, entry: Entry, room_bytes: int) -> tuple[int, int]:
        """Say what a model needs beside its weights before they are on the device, on torch's meta device.

        It is asked where it was constructed, and only of methods whose signature says all sizes.

        Args:
            entry: The model.
            room_bytes: What the device has beside its weights.

        Returns:
            The rows that a batch may have for its activations to fit, 0 where all may, and the bytes of the
            largest; 0 where nothing is known.
        """
        rows, need_bytes = 0, 0
        if self._options is None or entry.scratch is None or not entry.is_movable:
            return rows, need_bytes
        for method in samples.methods_to_profile(entry.spec):
            sample = samples.from_signature(method)
            if sample is None:
                continue
            ladder = ladder_of(sample, method)
            sizes = sorted({ladder[0], ladder[-1]})
            try:
                points = await ask(entry.scratch, entry.key, sample, op="predict", sizes=sizes)
                fit = knee.fit_activations(
                    [(whole(raw.get("rows")), whole(raw.get("peak_bytes"))) for raw in points]
                )
            except (NosError, ValueError) as error:
                _logger.info("%s of %s cannot be predicted: %s", method.name, entry.key, error)
                continue
            fitting = fit.rows_within(room_bytes, sizes[-1])
            if fitting < sizes[-1]:
                rows = min(rows or fitting, fitting)
            need_bytes = max(need_bytes, fit.at(fitting))
        return rows, need_bytes

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


def advice(profile: models_pb2.Profile) -> tuple[int, list[tuple[int, float]]]:
    """Return the rows that batches may have, 0 where nothing is chosen, and (rows, seconds) of some."""
    batching = [method for method in profile.methods if method.chosen_rows]
    if not batching:
        return 0, []
    largest = max(batching, key=lambda method: method.chosen_rows)
    return largest.chosen_rows, [(it.rows, it.took_s) for it in largest.points if it.took_s]


def rows_within(profile: models_pb2.Profile, room_bytes: int) -> int:
    """Return how many rows one call may have for its activations to take no more than so many bytes."""
    most = MAX_BATCH_ROWS
    for method in profile.methods:
        points = [(it.rows, it.measured_bytes or it.predicted_bytes) for it in method.points]
        if points and method.chosen_rows:
            most = knee.fit_activations(points).rows_within(room_bytes, most)
    return most


def _version_of(distribution: str) -> str:
    """Return an installed version; empty where the code is used from its folder."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


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
