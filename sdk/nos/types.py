"""Value types that the SDK hands out; frozen, and free of gRPC."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nos import _tables
from nos.errors import InvalidTensorError, NosError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


@dataclass(frozen=True, slots=True)
class Media:
    """Encoded content, sent as it is and decoded beside the model."""

    mime_type: str
    """`image/jpeg` or `image/png`."""

    data: bytes
    """The file's bytes."""

    @classmethod
    def from_bytes(cls, data: bytes) -> Media:
        """Recognise an image by its first bytes.

        Raises:
            InvalidTensorError: If it is neither JPEG nor PNG.
        """
        for magic, mime_type in _MAGIC.items():
            if data.startswith(magic):
                return cls(mime_type, data)
        raise InvalidTensorError(
            "not an encoded image", expected="JPEG or PNG bytes", got=f"bytes starting {data[:8]!r}"
        )

    @classmethod
    def open(cls, path: str | Path) -> Media:
        """Read an image file.

        Raises:
            OSError: If it cannot be read.
            InvalidTensorError: If it is neither JPEG nor PNG.
        """
        return cls.from_bytes(Path(path).read_bytes())

    def _repr_mimebundle_(self, **_: object) -> dict[str, object]:
        return {
            self.mime_type: self.data,
            "text/plain": f"<{self.mime_type}, {len(self.data)} bytes>",
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of one frame went, in seconds."""

    queue_s: float = 0.0
    """From arrival at the worker until the device was granted."""
    batch_wait_s: float = 0.0
    """Waiting for companions of a batch."""
    compute_s: float = 0.0
    """In the model's method."""
    server_s: float = 0.0
    """From arrival at the worker until the result was handed to its transport."""
    batch_size: int = 1
    """Requests in the forward pass."""
    total_s: float = 0.0
    """From `send` until the result was here; measured by the client."""

    @property
    def transport_s(self) -> float:
        """What neither queue, batch nor model explains: encoding, network, relay, hand-over."""
        return max(0.0, self.total_s - self.queue_s - self.batch_wait_s - self.compute_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One frame's outcome on a stream."""

    seq: int
    """The number that `send` returned."""
    _value: Any = field(default=None, repr=False)
    error: NosError | None = None
    """Why the frame failed; None if it did not."""
    timings: Timings = field(default_factory=Timings)
    """Where the time went; of a generator, set on its end only."""
    more: bool = False
    """Whether it is an item of a generator, and more or the end will follow."""

    @property
    def value(self) -> Any:
        """What the method returned.

        Raises:
            NosError: `error`, if the frame failed.
        """
        if self.error is not None:
            raise self.error
        return self._value

    def __repr__(self) -> str:
        """Say how it ended, without dumping an array."""
        if self.error is not None:
            return f"<Result {self.seq}: {type(self.error).__name__}: {self.error}>"
        shape = getattr(self._value, "shape", None)
        what = type(self._value).__name__ if shape is None else f"{self._value.dtype} array {shape}"
        return f"<Result {self.seq}: {what}, {self.timings.total_s * 1e3:.2f} ms>"


class _Table:
    """A value that shows itself as a table, in a terminal and in a notebook."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        # IPython asks the first class that has either this or a __repr__, and each dataclass has the latter.
        type.__setattr__(cls, "_repr_pretty_", _Table._repr_pretty_)

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        raise NotImplementedError

    def __str__(self) -> str:
        return _tables.to_text(*self.columns())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        return _tables.to_html(*self.columns())

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain containers, for JSON."""
        fields: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """One parameter of a model's method."""

    name: str
    annotation: str = ""
    """As its author wrote it; empty if there is none."""
    wants: str = "anything"
    """What it takes, in words."""
    has_default: bool = False
    default_text: str = ""
    """The default as its author wrote it."""
    is_variadic: bool = False
    """Whether it is `*args`."""
    is_keywords: bool = False
    """Whether it is `**kwargs`."""
    kind: str = "anything"
    """The broad type: `anything`, `tensor`, `image`, `text`, `bytes`, `integer`, `real`, `flag`, `list`,
    `dict` or `none`."""
    item_kind: str = "anything"
    """Of a list or dict: the broad type of what it holds."""
    dtype: str = ""
    """Of a tensor: its element type; empty for any."""
    shape: tuple[int | str, ...] | None = None
    """Of a tensor: its declared sizes and names of sizes; None if not declared."""
    choices: tuple[Any, ...] = ()
    """The only values allowed; empty for no such limit."""
    is_optional: bool = False
    """Whether None is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodInfo:
    """One method of a model."""

    name: str
    """`__call__` is what calling the model runs."""
    doc: str = ""
    parameters: tuple[ParameterInfo, ...] = ()
    returns: str = ""
    """Its annotation; of a generator, the items'."""
    is_generator: bool = False
    batches: tuple[str, ...] = ()
    """The parameters along which concurrent calls are joined and run as one; empty: they are not joined."""
    takes_turns: bool = False
    """Whether concurrent calls, of single items, run one after the other in one round to the model."""
    padded: str = ""
    """The dimension whose length may differ within a batch; empty: none."""
    max_batch: int = 0
    """The most rows of such a batch; 0: the server's choice."""
    queue_delay_s: float | None = None
    """How long a call waits for others to run with; None: as short as pays."""

    def __str__(self) -> str:
        """Return its signature as source."""
        parts = []
        for it in self.parameters:
            stars = "*" if it.is_variadic else "**" if it.is_keywords else ""
            text = f"{stars}{it.name}" + (f": {it.annotation}" if it.annotation else "")
            if it.has_default:
                text += (" = " if it.annotation else "=") + (it.default_text or "...")
            parts.append(text)
        returns = f"Iterator[{self.returns or 'Any'}]" if self.is_generator else self.returns
        arrow = f" -> {returns}" if returns else ""
        return f"{self.name}({', '.join(parts)}){arrow}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec(_Table):
    """What one version of a model is."""

    name: str
    version: int
    owner: str = ""
    doc: str = ""
    methods: tuple[MethodInfo, ...] = ()
    device: str = "auto"
    isolation: str = "shared"
    environment: tuple[str, ...] = ()
    """Packages that it needs besides the server's; channels and packages of conda come first."""
    source_sha256: str = ""
    weight_bytes: int = 0
    """Bytes of its weight files; 0 if it has none or they are not known before loading."""
    call_timeout_s: float = 0.0
    """The longest that one call may run; 0 means no limit."""
    memory_bytes: int = 0
    """The least that models may use of a device's memory where it runs; 0 for any."""
    placement: str = "spread"
    """Whether its replicas go to as many devices as can be (`spread`) or as few (`pack`)."""
    is_pinned: bool = False
    """Whether it stays on its device whatever else wants the room."""
    idle_unload_s: float | None = None
    """After how long without use it leaves the device; 0: never, None: as the server does with all."""

    @property
    def key(self) -> str:
        """Names this version: `name@v3`."""
        return f"{self.name}@v{self.version}"

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [(str(method), method.doc.partition("\n")[0]) for method in self.methods]
        title = self.key + (f": {self.doc.partition(chr(10))[0]}" if self.doc else "")
        return ("method", ""), rows, title


#: Of the last events, in a table.
_EVENTS_SHOWN = 5
#: Of a model's moves, in a table.
_MOVES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One move of a model between the tiers of a worker's memory."""

    time_s: float
    """When it ended, in seconds since 1970."""
    source: str
    """`none`, `device`, `host` or `disk`."""
    target: str
    """As well."""
    reason: str
    moved_bytes: int = 0
    """Bytes that were copied for it; 0 where a mapping was enough."""
    took_s: float = 0.0

    def __str__(self) -> str:
        """Return it as a line."""
        when = datetime.fromtimestamp(self.time_s).astimezone().strftime("%H:%M:%S")
        moved = _tables.format_bytes(self.moved_bytes)
        took = f"{self.took_s * 1e3:.3g} ms"
        return f"{when} {self.source} -> {self.target}: {self.reason} ({moved} copied, {took})"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line that a model printed."""

    time_s: float
    """When it was read, in seconds since 1970."""
    worker: str
    text: str

    def __str__(self) -> str:
        """Return it with its time."""
        when = datetime.fromtimestamp(self.time_s).astimezone().strftime("%H:%M:%S")
        return f"{when} {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaInfo:
    """One loaded copy of a model."""

    worker: str
    device: str
    state: str
    device_bytes: int = 0
    num_pending: int = 0
    num_answered: int = 0
    load_s: float = 0.0
    history: tuple[Transition, ...] = ()
    """Its last moves, the oldest first."""
    host_bytes: int = 0
    """Of its copy in main memory."""
    note: str = ""
    """What is unusual about it, for instance why it has an executor of its own."""
    phase: str = ""
    """What the cluster makes of it: `loading`, `serving`, `draining`, or empty if it is about to go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """How many replicas of a model there may be and should be."""

    min_replicas: int
    max_replicas: int
    target_replicas: int
    """How many are wanted at the moment."""
    reason: str = ""
    """Why so many."""
    pending: str = ""
    """Why some are missing; empty if none is, or all are on their way."""

    def __str__(self) -> str:
        """Return it as a line."""
        wanted = f"{self.target_replicas} wanted"
        if self.min_replicas != self.max_replicas:
            wanted += f" of {self.min_replicas} to {self.max_replicas}"
        missing = f"; some are missing: {self.pending}" if self.pending else ""
        return f"{wanted} ({self.reason}){missing}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo(_Table):
    """A model as it stood when the server was asked."""

    spec: ModelSpec
    state: str = "registered"
    """`registered`, `loading`, `device`, `host`, `disk` or `failed`."""
    replicas: tuple[ReplicaInfo, ...] = ()
    error: str = ""
    """Why it failed, when it did."""
    scaling: Scaling | None = None
    """None until anybody asked for it."""
    collected: tuple[str, ...] = ()
    """What `register` found that its source needs and sent along: imports, constants, functions, files."""

    @property
    def name(self) -> str:
        """Its name."""
        return self.spec.name

    @property
    def version(self) -> int:
        """Its newest version."""
        return self.spec.version

    @property
    def device_bytes(self) -> int:
        """Bytes of its weights in device memory, over all replicas."""
        return sum(replica.device_bytes for replica in self.replicas)

    @property
    def history(self) -> tuple[Transition, ...]:
        """The last moves of all replicas, the oldest first."""
        moves = [move for replica in self.replicas for move in replica.history]
        return tuple(sorted(moves, key=lambda move: move.time_s))

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        where = ", ".join(f"{it.device} on {it.worker}" for it in self.replicas) or "nowhere"
        rows = [
            ("state", f"{self.state}: {self.error}" if self.error else self.state),
            ("loaded", where),
            *([("replicas", str(self.scaling))] if self.scaling else []),
            ("device memory", _tables.format_bytes(self.device_bytes)),
            ("owner", self.spec.owner),
            ("takes", f"device {self.spec.device}, isolation {self.spec.isolation}"),
            ("stays", _stays(self.spec)),
            *(("packages", text) for text in self.spec.environment),
            ("batches", _batches(self.spec.methods)),
        ]
        rows += [
            ("method", f"{method}  {method.doc.partition(chr(10))[0]}".rstrip())
            for method in self.spec.methods
        ]
        rows += [("note", replica.note) for replica in self.replicas if replica.note]
        rows += [("came along", line) for line in self.collected]
        rows += [("moved", str(move)) for move in self.history[-_MOVES_SHOWN:]]
        doc = self.spec.doc.partition("\n")[0]
        return (), rows, f"{self.spec.key}: {doc}" if doc else self.spec.key


def _stays(spec: ModelSpec) -> str:
    """Return how long a model stays on a device, in words."""
    if spec.is_pinned:
        return "on its device: pinned"
    if spec.idle_unload_s:
        return f"until the room is needed, or {spec.idle_unload_s:g} s without use"
    return "until the room is needed"


def _batches(methods: Sequence[MethodInfo]) -> str:
    """Say which methods run many calls as one, and how."""
    found = []
    for method in methods:
        if method.takes_turns:
            found.append(f"{method.name} item by item")
        if method.batches:
            limit = f", at most {method.max_batch} rows" if method.max_batch else ""
            delay_s = method.queue_delay_s
            delay = "" if delay_s is None else f", waits up to {delay_s * 1e3:g} ms"
            padded = f", {method.padded} padded" if method.padded else ""
            found.append(f"{method.name} along {', '.join(method.batches)}{limit}{delay}{padded}")
    return "; ".join(found) or "no: each call runs alone"


class ModelList(tuple[ModelInfo, ...]):
    """The models of a server, in order of names; shows itself as a table."""

    __slots__ = ()

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            (
                info.name,
                f"v{info.version}",
                info.state,
                _tables.format_bytes(info.device_bytes) if info.replicas else "",
                info.error or info.spec.doc.partition("\n")[0],
            )
            for info in self
        ]
        return ("model", "version", "state", "device memory", "about"), rows, ""

    __str__ = _Table.__str__
    _repr_pretty_ = _Table._repr_pretty_
    _repr_html_ = _Table._repr_html_


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelMemory:
    """One model's part of a device."""

    model: str
    owner: str = ""
    device_bytes: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device of a worker."""

    name: str
    """As torch writes it: `cpu`, `cuda:0`."""
    product: str = ""
    capacity_bytes: int = 0
    used_bytes: int = 0
    models: tuple[ModelMemory, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """How code of models is held on a worker's machine."""

    tier: str = ""
    """What holds it, for instance `own user + landlock`; empty if the server does not say."""
    covers: tuple[str, ...] = ()
    """What that keeps from happening, one sentence each."""
    lacks: str = ""
    """Why it is not stronger; empty if there is nothing stronger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """One worker process."""

    name: str
    address: str
    pid: int
    device: Device
    num_queued: int = 0
    num_running: int = 0
    num_streams: int = 0
    num_executors: int = 0
    is_retiring: bool = False
    """Whether it leaves once what it serves is served elsewhere."""
    note: str = ""
    """Why it is given no models; empty if it is."""
    confinement: Confinement = field(default_factory=Confinement)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPart:
    """What one model holds in one tier of one worker's memory."""

    worker: str
    device: str
    """As torch writes it."""
    model: str
    owner: str
    tier: str
    """`device` or `host`."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(_Table):
    """Who holds how much memory, as it stood when the server was asked."""

    parts: tuple[MemoryPart, ...] = ()
    """The largest first. On the CPU a model's device part is a mapping of its host part."""

    def total_bytes(self, **wanted: str) -> int:
        """Add up the parts with these fields, for instance `tier="device", owner="ann"`."""
        return sum(
            part.size_bytes
            for part in self.parts
            if all(getattr(part, name) == value for name, value in wanted.items())
        )

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            (it.worker, it.device, it.tier, _tables.format_bytes(it.size_bytes), it.model, it.owner)
            for it in self.parts
        ]
        return ("worker", "device", "tier", "bytes", "model", "owner"), rows, ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelReplicas:
    """How many replicas a model has, and should have."""

    model: str
    """The version, as `name@v3`."""
    num_serving: int
    scaling: Scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """What one tenant uses."""

    tenant: str
    """`(others)` are all whose names are not told."""
    device_s: float = 0.0
    """Seconds of devices, since each model was loaded."""
    device_bytes: int = 0
    """Bytes of the weights, on devices, of models that it owns."""
    num_streams: int = 0
    """Streams that it has open."""

    def __str__(self) -> str:
        """Return it as a line."""
        held = _tables.format_bytes(self.device_bytes)
        return f"{self.device_s:.3g} s of devices, {self.num_streams} streams, {held} of its models"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status(_Table):
    """The server as it stood when asked, and this client's way to it."""

    version: str
    state: str
    """`ready`, `starting` (no worker yet) or `draining`."""
    uptime_s: float = 0.0
    workers: tuple[Worker, ...] = ()
    num_models: int = 0
    dashboard_url: str = ""
    scheduler_address: str = ""
    address: str = ""
    """The gateway's address, as this client uses it."""
    source: str = ""
    """Where the client found that address: an argument, a variable, a file, or the local default."""
    routes: dict[str, str] = field(default_factory=dict)
    """For each open stream of this client, `name@v3`: which way it goes."""
    notices: tuple[str, ...] = ()
    """What an admin has to know, one sentence each."""
    models: tuple[ModelReplicas, ...] = ()
    """The models that were asked of the workers: how many replicas there are, should be, and why."""
    tenants: tuple[TenantUsage, ...] = ()
    """Who uses what, the most device-seconds first; only admins see the names of others."""
    events: tuple[Event, ...] = ()
    """The last things that happened, the oldest first."""

    @property
    def memory(self) -> Memory:
        """Who holds how much memory."""
        parts = [
            MemoryPart(
                worker=worker.name,
                device=worker.device.name,
                model=part.model,
                owner=part.owner,
                tier=tier,
                size_bytes=size_bytes,
            )
            for worker in self.workers
            for part in worker.device.models
            for tier, size_bytes in (("device", part.device_bytes), ("host", part.host_bytes))
            if size_bytes
        ]
        return Memory(parts=tuple(sorted(parts, key=lambda part: -part.size_bytes)))

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            ("server", f"{self.address} ({self.source})" if self.source else self.address),
            ("state", f"{self.state}, version {self.version}, up {self.uptime_s:.0f} s"),
            ("models", str(self.num_models)),
        ]
        for worker in self.workers:
            device = worker.device
            rows.append(
                (
                    worker.name,
                    f"{device.name} {device.product}".rstrip()
                    + f", {_tables.format_bytes(device.used_bytes)}"
                    + f" of {_tables.format_bytes(device.capacity_bytes)}"
                    + f", {worker.num_running} running, {worker.num_queued} waiting"
                    + (f"; gets no models: {worker.note}" if worker.note else ""),
                )
            )
        for tier in dict.fromkeys(worker.confinement.tier for worker in self.workers):
            rows += [("models run as", tier)] if tier else []
        if self.dashboard_url:
            rows.append(("dashboard", self.dashboard_url))
        rows += [(it.model, f"{it.num_serving} serving, {it.scaling}") for it in self.models]
        rows += [(f"tenant {it.tenant}", str(it)) for it in self.tenants]
        rows += [(f"way to {key}", way) for key, way in self.routes.items()]
        rows += [("event", str(event)) for event in self.events[-_EVENTS_SHOWN:]]
        rows += [("notice", notice) for notice in self.notices]
        return (), rows, ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened on the server."""

    time_s: float
    """In seconds since 1970, by the server's clock."""
    kind: str
    """For instance `worker-joined`, `loaded`, `failed`; `status` for a snapshot."""
    model: str = ""
    worker: str = ""
    message: str = ""
    status: Status | None = None
    """Set for `status`."""

    def __str__(self) -> str:
        """Return it as a line."""
        when = time.strftime("%H:%M:%S", time.localtime(self.time_s))
        where = " ".join(filter(None, (self.model, self.worker)))
        return f"{when} {self.kind} {where}".rstrip() + (
            f": {self.message}" if self.message else ""
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChange:
    """A model as it is now, or that it is gone."""

    model: ModelInfo
    is_deleted: bool = False
