"""The models of one executor: constructed, packed, bound to their weights, evicted and reloaded.

A first load constructs a model in an executor where nobody else waits, and packs its weights and its
skeleton into memory of the worker's. From those any executor of the owner makes the model again,
without its source's constructor: `bind`. One that cannot be moved stays where it was constructed: `adopt`.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from nos_backend.executor import flat, loading, profiling, skeleton
from nos_backend.executor.devices import Device, is_out_of_memory, open_device, return_memory
from nos_backend.executor.failures import NoWireFormError, RefusedError
from nos_backend.executor.values import Inputs, Outputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from nos_backend.executor.residence import Residence

Reply = dict[str, Any]

#: A source that takes longer would hold up the other models of an executor that it is bound in.
_SOURCE_LIMIT_S: Final = 0.5
#: Loose tensors that a reply names.
_NUM_NAMED: Final = 8


@dataclass(slots=True)
class _Constructed:
    """A model that was made here and is not served from here yet."""

    model: loading.Model
    plan: flat.Plan
    #: None where it cannot be moved.
    skeleton: skeleton.Skeleton | None


@dataclass(slots=True)
class _Hosted:
    """A model that is served from here."""

    model: loading.Model
    #: None where it has no flat run: then it is always loaded.
    residence: Residence | None
    #: Buffers with what was written to them last, as its host copy knows nothing of that.
    versions: list[tuple[torch.Tensor, int]]
    #: Buffers that were written to, of a model that is evicted.
    saved: list[tuple[torch.Tensor, torch.Tensor]]


class Models:
    """Belongs to the executor's main thread.

    Args:
        device_name: As torch writes it.
        max_image_pixels: Of one encoded image in the arguments of a call.
    """

    def __init__(self, device_name: str, max_image_pixels: int) -> None:
        self._device_name = device_name
        self._max_image_pixels = max_image_pixels
        #: Opened once it is needed: on CUDA it costs hundreds of megabytes.
        self._device: Device | None = None
        self._constructed: dict[str, _Constructed] = {}
        self._hosted: dict[str, _Hosted] = {}
        self._operations: dict[str, Callable[[Reply, list[int]], Reply]] = {
            "load": self._load,
            "construct": self._construct,
            "try": self._try,
            "store": self._store,
            "adopt": self._adopt,
            "bind": self._bind,
            "evict": self._evict,
            "reload": self._reload,
            "predict": self._predict,
            "measure": self._measure,
        }

    def get(self, key: str) -> loading.Model:
        """Return a model that may run now.

        Raises:
            RefusedError: MODEL_NOT_FOUND if there is none; UNAVAILABLE if its weights are not here.
        """
        hosted = self._hosted.get(key)
        if hosted is None:
            raise RefusedError("MODEL_NOT_FOUND", "the model is not loaded", got=key)
        if hosted.residence is not None and not hosted.residence.is_loaded:
            raise RefusedError("UNAVAILABLE", "the model's weights are not on the device", got=key)
        return hosted.model

    def does(self, operation: str) -> bool:
        """Return whether `carry_out` knows an operation."""
        return operation in self._operations

    def carry_out(self, message: Reply, fds: list[int]) -> Reply:
        """Do what the worker asks for; takes the descriptors and closes them.

        Raises:
            RefusedError: If it cannot be done.
            BaseException: Whatever the model's code raises.
        """
        started_s = time.perf_counter()
        try:
            reply = self._operations[message["op"]](message, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return {**reply, "took_s": time.perf_counter() - started_s}

    def room_bytes(self) -> int | None:
        """Return what the device has free; None while it was not needed."""
        return self._device.room_bytes() if self._device is not None else None

    def drop(self, key: str) -> None:
        """Forget a model; one that is not here is no error."""
        self._constructed.pop(key, None)
        hosted = self._hosted.pop(key, None)
        if hosted is None:
            return
        loading.unload(hosted.model)
        residence = hosted.residence
        del hosted
        return_memory()
        if residence is not None:
            residence.close()

    def _load(self, message: Reply, _fds: list[int]) -> Reply:
        """Construct a model and serve it from here, its weights wherever its constructor put them."""
        model = loading.load(message["definition"], self._device_name)
        self._hosted[message["key"]] = _Hosted(model, None, [], [])
        return {"weight_bytes": model.weight_bytes}

    def _construct(self, message: Reply, _fds: list[int]) -> Reply:
        definition = message["definition"]
        device = torch.device(loading.device_of(definition, self._device_name))
        started_s = time.perf_counter()
        module = loading.run_source(definition)
        source_s = time.perf_counter() - started_s
        before = _contents(module)
        try:
            target, made_first = loading.construct(module, definition, str(device))
        except BaseException:
            sys.modules.pop(module.__name__, None)
            raise
        loading.freeze(target)
        parts, reason = None, ""
        if source_s > _SOURCE_LIMIT_S:
            reason = f"running its source takes {source_s:.1f} s"
        elif _contents(module) != before:
            reason = "its constructor changes globals of its module"
        else:
            try:
                parts = skeleton.write(target, device)
            except skeleton.ImmovableError as error:
                reason = f"its object cannot be moved: {error}"
        plan = parts.plan if parts else flat.make_plan(target)
        model = loading.Model(target, device, definition["source_name"], module)
        self._constructed[message["key"]] = _Constructed(model, plan, parts)
        return {
            "size_bytes": plan.size_bytes,
            "skeleton_bytes": len(parts.data) if parts else 0,
            "reason": reason,
            "made_first": made_first,
            "loose": list(plan.loose[:_NUM_NAMED]),
        }

    def _try(self, message: Reply, fds: list[int]) -> Reply:
        """Make one call of a model that was constructed here; its result has to travel."""
        model = self._made(message["key"]).model
        loading.move(model.target, model.device)
        block = bytearray(os.pread(fds[0], message["size_bytes"], 0) or b"\0")
        method = model.method(message["method"])
        arguments = [(name, node) for name, node in message["args"]]
        inputs = Inputs(memoryview(block), model.device, self._max_image_pixels)
        bound = method.bind(arguments, inputs)
        with torch.inference_mode():
            result = method.target(*bound.args, **bound.kwargs)
            if isinstance(result, types.GeneratorType):
                result = next(result, None)
            try:
                Outputs(result)
            except NoWireFormError as error:
                raise RefusedError("LOAD_FAILED", str(error), "example") from error
        return {}

    def _store(self, message: Reply, fds: list[int]) -> Reply:
        """Write a constructed model's weights, and its skeleton if there is one, to the worker's memory."""
        made = self._made(message["key"])
        if made.plan.size_bytes:
            others = made.skeleton.others if made.skeleton else ()
            with mmap.mmap(fds[0], made.plan.size_bytes) as memory:
                run = torch.frombuffer(memory, dtype=torch.uint8)
                flat.pack(made.plan, made.model.target, run, others)
                # The mapping cannot go before, and the memory not be sealed.
                del run
        if made.skeleton is not None:
            with mmap.mmap(fds[1], len(made.skeleton.data)) as memory:
                memory[:] = made.skeleton.data
        return {}

    def _adopt(self, message: Reply, fds: list[int]) -> Reply:
        """Serve a constructed model from here, its weights from the worker's memory if they are there."""
        made = self._made(message["key"])
        model, residence = made.model, None
        if fds:
            residence = self._reside(fds[0], made.plan.size_bytes)
            flat.bind(made.plan, model.target, residence.flat)
        else:
            loading.move(model.target, model.device)
        del self._constructed[message["key"]], made
        self._host(message["key"], model, residence)
        return_memory()
        return {}

    def _bind(self, message: Reply, fds: list[int]) -> Reply:
        """Serve a model from here that was constructed anywhere."""
        key, definition = message["key"], message["definition"]
        weights, bones = fds
        self.drop(key)
        with mmap.mmap(bones, message["skeleton_bytes"], prot=mmap.PROT_READ) as memory:
            data = bytes(memory)
        plan = skeleton.read_plan(data)
        if plan.size_bytes != message["size_bytes"]:
            raise RefusedError("LOAD_FAILED", "the model's parts do not fit together")
        module = loading.run_source(definition)
        residence = None
        try:
            residence = self._reside(weights, plan.size_bytes) if plan.size_bytes else None
            run = residence.flat if residence else torch.empty(0, dtype=torch.uint8)
            target = skeleton.read(data, run)
            device = torch.device(loading.device_of(definition, self._device_name))
            model = loading.Model(target, device, definition["source_name"], module)
        except BaseException:
            sys.modules.pop(module.__name__, None)
            if residence is not None:
                residence.close()
            raise
        self._host(key, model, residence)
        return {}

    def _evict(self, message: Reply, _fds: list[int]) -> Reply:
        hosted, residence = self._resident(message["key"])
        if residence.is_loaded:
            if not residence.keeps_writes:
                written = [t for t, version in hosted.versions if t._version != version]  # noqa: SLF001
                hosted.saved = [(t, t.detach().to("cpu", copy=True)) for t in written]
            residence.evict()
        return {}

    def _reload(self, message: Reply, _fds: list[int]) -> Reply:
        hosted, residence = self._resident(message["key"])
        if not residence.is_loaded:
            self._bring(residence)
            for tensor, kept in hosted.saved:
                tensor.detach().copy_(kept)
            hosted.saved = []
        return {}

    def _predict(self, message: Reply, fds: list[int]) -> Reply:
        """Say what a method needs, of a model that was constructed or is served here."""
        made = self._constructed.get(message["key"])
        model = made.model if made else self.get(message["key"])
        sample = profiling.read_sample(model, message, fds, self._max_image_pixels)
        return {"points": sample.predict(message["sizes"])}

    def _measure(self, message: Reply, fds: list[int]) -> Reply:
        """Run a method of a model that is served here."""
        profiling.give_way()
        model = self.get(message["key"])
        sample = profiling.read_sample(model, message, fds, self._max_image_pixels)
        return {"points": [sample.measure(message["rows"], message["limit_s"], self._device)]}

    def _host(self, key: str, model: loading.Model, residence: Residence | None) -> None:
        versions = []
        if residence is not None and not residence.keeps_writes:
            for _, module in flat.find_modules(model.target):
                versions += [(buffer, buffer._version) for buffer in module.buffers()]  # noqa: SLF001
        self._hosted[key] = _Hosted(model, residence, versions, [])

    def _reside(self, fd: int, size_bytes: int) -> Residence:
        residence = self._opened().reside(fd, size_bytes)
        try:
            self._bring(residence)
        except BaseException:
            residence.close()
            raise
        return residence

    def _bring(self, residence: Residence) -> None:
        """Load a run; where there is no room, once more after giving back what nobody uses."""
        try:
            residence.load()
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        self._opened().trim()
        residence.load()

    def _opened(self) -> Device:
        if self._device is None:
            self._device = open_device(self._device_name)
        return self._device

    def _made(self, key: str) -> _Constructed:
        made = self._constructed.get(key)
        if made is None:
            raise RefusedError("MODEL_NOT_FOUND", "the model was not constructed here", got=key)
        return made

    def _resident(self, key: str) -> tuple[_Hosted, Residence]:
        hosted = self._hosted.get(key)
        if hosted is None or hosted.residence is None:
            raise RefusedError("MODEL_NOT_FOUND", "the model has no run of weights here", got=key)
        return hosted, hosted.residence


def _contents(module: types.ModuleType) -> dict[str, tuple[int, int]]:
    """Return what can be seen of a module's globals: which objects they are, and the sizes of containers."""
    return {
        name: (id(value), len(value) if isinstance(value, dict | list | set) else 0)
        for name, value in vars(module).items()
        if name != "__builtins__"
    }
