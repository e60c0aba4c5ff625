"""What a model needs, as users see it, and the call that asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nos import _tables
from nos._control import LOAD_TIMEOUT_S, Rpc
from nos.types import _Table
from nos.wire.v1 import models_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

_HEADER: Final = ("method", "batch", "ms", "items/s", "activations", "predicted", "GFLOP", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilePoint:
    """What a method takes at one batch size."""

    rows: int
    """Items in the batch."""
    took_s: float
    """Seconds in the method, the least of a few runs; 0 if it was not run at this size."""
    measured_bytes: int
    """The most that was alive at once, inputs and weights excluded; 0 if it was not run."""
    predicted_bytes: int
    """The same as predicted beforehand; 0 if it was not predicted."""
    flops: int
    """Multiply-adds counted twice."""

    @property
    def rate_hz(self) -> float:
        """Items per second; 0 if it was not run."""
        return self.rows / self.took_s if self.took_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleUse:
    """One module's part of a pass."""

    path: str
    """As in `named_modules`; empty for the model itself."""
    kind: str
    """Its class."""
    weight_bytes: int
    """Of its own parameters and buffers, children's excluded."""
    activation_bytes: int
    """Alive after it ran and not before: its outputs, and what it keeps."""
    workspace_bytes: int
    """What it needed beyond that while it ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodProfile:
    """What one method needs."""

    method: str
    points: tuple[ProfilePoint, ...] = ()
    """In order of rows; one point where it does not batch."""
    chosen_rows: int = 0
    """The batch that was chosen for it; 0 if none was."""
    why: str = ""
    """Why that one."""
    t0_s: float = 0.0
    """Seconds of a batch whatever its size, by the line through the points."""
    row_s: float = 0.0
    """Seconds of each row."""
    module_rows: int = 0
    """Rows of the batch that `modules` describes."""
    modules: tuple[ModuleUse, ...] = ()
    """In the order in which they first ended."""
    sample: str = ""
    """What it ran on: `signature` or `first call`."""
    note: str = ""
    """What is missing and why; empty if nothing is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(_Table):
    """What a model version needs on one kind of device."""

    model: str
    """The version, `name@v3`."""
    device: str
    """As torch writes it."""
    product: str = ""
    """What that is, for people."""
    engine: str = "eager"
    versions: dict[str, str]
    """Of the libraries that figures depend on, and the number of threads."""
    time_s: float = 0.0
    """When it was made, in seconds since 1970."""
    weight_bytes: int = 0
    activation_bytes: int = 0
    """Of the largest batch; what the device's budget counts beside the weights."""
    methods: tuple[MethodProfile, ...] = ()

    def method(self, name: str = "__call__") -> MethodProfile:
        """Return one method's profile.

        Raises:
            KeyError: If it has none.
        """
        for method in self.methods:
            if method.method == name:
                return method
        raise KeyError(f"{self.model} has no profile of {name}")

    def series(self, name: str = "") -> dict[str, list[float]]:
        """Return the curve of a method in columns, for a plot or a data frame.

        Args:
            name: The method; by default the first.

        Returns:
            `rows`, `took_s`, `rate_hz`, `measured_bytes`, `predicted_bytes`, `flops`: a number per size each.

        Raises:
            KeyError: If it has no profile.
        """
        points = (self.method(name) if name else self.methods[0]).points if self.methods else ()
        names = ("rows", "took_s", "rate_hz", "measured_bytes", "predicted_bytes", "flops")
        return {name: [getattr(point, name) for point in points] for name in names}

    def columns(self) -> tuple[Sequence[str], Sequence[Sequence[str]], str]:
        """Return header, rows and caption."""
        rows = [
            (
                "" if index else method.method,
                str(point.rows),
                f"{point.took_s * 1e3:.3g}" if point.took_s else "",
                f"{point.rate_hz:,.0f}" if point.took_s else "",
                _bytes(point.measured_bytes),
                _bytes(point.predicted_bytes),
                f"{point.flops / 1e9:.3g}",
                "chosen" if point.rows == method.chosen_rows else "",
            )
            for method in self.methods
            for index, point in enumerate(method.points)
        ]
        caption = (
            f"{self.model} on {self.device} ({self.product}):"
            f" {_tables.format_bytes(self.weight_bytes)} of weights,"
            f" {_tables.format_bytes(self.activation_bytes)} of activations at most"
        )
        return _HEADER, rows, caption

    def reasons(self) -> list[str]:
        """Return a sentence for each method: what was chosen and why, and what is missing."""
        found = []
        for method in self.methods:
            if method.chosen_rows:
                found.append(f"{method.method}: batches of {method.chosen_rows}: {method.why}")
            elif method.why:
                found.append(f"{method.method}: {method.why}")
            if method.note:
                found.append(f"{method.method} {method.note}")
        return found

    def __str__(self) -> str:
        return "\n".join((_tables.to_text(*self.columns()), *self.reasons()))

    def _repr_html_(self) -> str:
        reasons = _tables.to_html((), [(reason,) for reason in self.reasons()])
        return _tables.to_html(*self.columns()) + (reasons if self.reasons() else "")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain containers, for JSON."""
        return _Table.to_dict(self)


def get(model: str) -> Rpc[Profile]:
    """Ask what a model needs; loads and measures it if that is not known."""
    return Rpc(
        "/nos.v1.ModelService/GetProfile",
        models_pb2.GetProfileRequest(model=model),
        lambda raw: _to_profile(models_pb2.GetProfileResponse.FromString(raw).profile),
        LOAD_TIMEOUT_S,
    )


def _bytes(count: int) -> str:
    return _tables.format_bytes(count) if count else ""


def _to_profile(message: models_pb2.Profile) -> Profile:
    return Profile(
        model=message.model,
        device=message.device,
        product=message.product,
        engine=message.engine,
        versions=dict(sorted(message.versions.items())),
        time_s=message.time_s,
        weight_bytes=message.weight_bytes,
        activation_bytes=message.activation_bytes,
        methods=tuple(_to_method(method) for method in message.methods),
    )


def _to_method(message: models_pb2.MethodProfile) -> MethodProfile:
    return MethodProfile(
        method=message.method,
        points=tuple(
            ProfilePoint(
                rows=it.rows,
                took_s=it.took_s,
                measured_bytes=it.measured_bytes,
                predicted_bytes=it.predicted_bytes,
                flops=it.flops,
            )
            for it in message.points
        ),
        chosen_rows=message.chosen_rows,
        why=message.why,
        t0_s=message.t0_s,
        row_s=message.row_s,
        module_rows=message.module_rows,
        modules=tuple(
            ModuleUse(
                path=it.path,
                kind=it.kind,
                weight_bytes=it.weight_bytes,
                activation_bytes=it.activation_bytes,
                workspace_bytes=it.workspace_bytes,
            )
            for it in message.modules
        ),
        sample=message.sample,
        note=message.note,
    )
