"""The executor: takes messages from its worker, one after the other, and runs models."""

from __future__ import annotations

import array
import contextlib
import gc
import inspect
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import torch

from nos_backend.executor import failures, loading
from nos_backend.executor.arena import Arena, ArenaFullError
from nos_backend.executor.devices import is_out_of_memory, is_sticky, return_memory, wait_for
from nos_backend.executor.failures import NoWireFormError, RefusedError
from nos_backend.executor.messages import (
    Decoder,
    MalformedError,
    ShortCall,
    ShortResult,
    encode,
    encode_node,
)
from nos_backend.executor.models import Models
from nos_backend.executor.process import Start, flush_lines, set_title
from nos_backend.executor.values import Inputs, Outputs

_RECEIVE_BYTES: Final = 1 << 16
_ANCILLARY_BYTES: Final = socket.CMSG_SPACE(4 * array.array("i").itemsize)
#: Of `recvmsg`; plain numbers, since combining an enum's members takes as long as the call.
_WAIT: Final = int(socket.MSG_CMSG_CLOEXEC)
_NO_WAIT: Final = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
#: A generator pauses when this many of its items were not released yet.
_ITEM_WINDOW: Final = 64
#: Inputs that models keep; above it, cycles are looked for.
_KEPT_BEFORE_GC: Final = 8

Message = dict[str, Any]


@dataclass(slots=True)
class _Call:
    """A call that has arrived."""

    id: int
    #: Its key, method and args are what it runs.
    form: Message
    #: Where its input is in the arena.
    offset: int
    size: int
    #: What its input is made of, instead of `offset`; see `Arena.gather`.
    pieces: list[list[int]] | None = None


class _CancelledError(Exception):
    """The worker asked to stop the call."""


class _WorkerGone(BaseException):
    """The executor has to end in the midst of a call; no model is meant to catch it."""


def run(start: Start) -> NoReturn:
    """Be an executor until the worker closes the socket, then end this process."""
    set_title(f"nos:{start.name}")
    flush_lines()
    torch.set_num_threads(start.num_threads)
    loading.install_stand_in()
    # Descriptors become the loop's; nothing that a model starts inherits them.
    peer = socket.socket(fileno=start.socket_fd)
    with contextlib.suppress(_WorkerGone):
        _Loop(start, peer).run()
    # Threads and destructors of models have no say in when this process ends.
    sys.stdout.flush()
    os._exit(0)


class _Loop:
    def __init__(self, start: Start, peer: socket.socket) -> None:
        self._device = start.device
        self._peer = peer
        self._decoder = Decoder()
        #: Arrived and not yet acted on: everything but cancel and free.
        self._waiting: deque[Message | _Call] = deque()
        #: Calls that others are like, by the number that the worker gave them.
        self._forms: dict[int, Message] = {}
        #: The call that runs now.
        self._running: int | None = None
        #: Calls to stop; each is running or waiting.
        self._cancelled: set[int] = set()
        self._models = Models(start.device, start.max_image_pixels)
        self._max_image_pixels = start.max_image_pixels
        #: Descriptors that came ahead of the messages that they belong to.
        self._fds: deque[int] = deque()
        self._input = Arena(start.input_fd)
        self._output = Arena(start.output_fd)
        #: Inputs of ended calls that a model still refers to, by call.
        self._kept: dict[int, Inputs] = {}
        #: Items of the running call that the worker has not released.
        self._num_items_out = 0
        #: Entered around one call after the other.
        self._inference = torch.inference_mode()

    def run(self) -> None:
        self._send({"op": "ready"})
        while True:
            while not self._waiting:
                if not self._receive():
                    return
            message = self._waiting.popleft()
            if isinstance(message, _Call):
                self._running = message.id
                # What arrived behind it may cancel it.
                if not self._receive(wait=False):
                    return
                self._call(message)
                self._running = None
                continue
            match message["op"]:
                case "unload":
                    self._models.drop(message["key"])
                    return_memory()
                    self._let_go()
                case _:
                    self._manage(message)

    def _receive(self, *, wait: bool = True) -> bool:
        """Take in what has arrived; return False when the worker is gone."""
        try:
            # Not socket.recv_fds: Python 3.11's ignores the flags.
            data, ancillary, _, _ = self._peer.recvmsg(
                _RECEIVE_BYTES, _ANCILLARY_BYTES, _WAIT if wait else _NO_WAIT
            )
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not data:
            return False
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._fds.extend(array.array("i", raw))
        for message in self._decoder.feed(data):
            match message:
                case ShortCall(call_id, form, offset, size, freed):
                    for block in freed:
                        self._output.free(block)
                    self._waiting.append(_Call(call_id, self._forms[form], offset, size))
                case dict():
                    self._take(message)
                case _:
                    raise MalformedError("a message that only an executor sends")
        return True

    def _take(self, message: Message) -> None:
        if "num_fds" in message:
            message["fds"] = [self._fds.popleft() for _ in range(message["num_fds"])]
        for offset in message.get("free", ()):
            self._output.free(offset)
        self._num_items_out -= message.get("released", ()).count(self._running)
        match message["op"]:
            case "call":
                offset, size = message["block"] or (0, 0)
                pieces = message.get("pieces")
                self._waiting.append(_Call(message["id"], message, offset, size, pieces))
                if "form" in message:
                    self._forms[message["form"]] = message
            case "forget":
                self._forms.clear()
            case "cancel":
                self._cancel(message["id"])
            case "free" | "fds":
                pass
            case _:
                self._waiting.append(message)

    def _cancel(self, call_id: int) -> None:
        is_waiting = any(isinstance(it, _Call) and it.id == call_id for it in self._waiting)
        if is_waiting or call_id == self._running:
            self._cancelled.add(call_id)

    def _send(self, message: Message) -> None:
        self._peer.sendall(encode(message))

    def _manage(self, message: Message) -> None:
        """Load, move or evict a model."""
        source_name = message.get("definition", {}).get("source_name", "")
        reply: Message = {"op": "done", "id": message["id"]}
        try:
            reply.update(self._models.carry_out(message, message.get("fds", [])))
        except RefusedError as error:
            reply.update(op="failed", error=error.facts)
        except BaseException as error:  # noqa: BLE001 - a source may raise anything, SystemExit too
            reply.update(op="failed", error=self._facts(error, source_name))
            self._end_if_doomed(error, reply)
        if reply["op"] == "failed":
            return_memory()
        self._send(reply)

    def _call(self, call: _Call) -> None:
        call_id = call.id
        reply: Message = {"op": "error", "id": call_id}
        inputs = None
        source_name = ""
        clock = _Clock()
        self._num_items_out = 0
        try:
            self._check_cancelled(call_id)
            model = self._models.get(call.form["key"])
            source_name = model.source_name
            if call.pieces is not None:
                block = self._input.gather(call.pieces, call.size)
            else:
                block = self._input.view[call.offset : call.offset + call.size]
            inputs = Inputs(block, model.device, self._max_image_pixels)
            with self._inference:
                reply = self._answer(call, model, inputs, clock)
            if "in_place" in reply and inputs.kept:
                # The model holds it, and may change it while it is sent.
                self._copy_out(reply, call_id)
        except RefusedError as error:
            reply["error"] = error.facts
        except NoWireFormError as error:
            reply["error"] = failures.no_wire_form(error)
        except _CancelledError:
            reply["error"] = RefusedError("CANCELLED", "cancelled").facts
        except _WorkerGone:
            raise
        except BaseException as error:  # noqa: BLE001 - as above
            reply["error"] = self._facts(error, source_name)
            self._end_if_doomed(error, reply)
        self._cancelled.discard(call_id)
        reply["compute_s"] = clock.total_s
        if inputs is not None and inputs.kept:
            self._kept[call_id] = inputs
            reply["kept"] = True
        self._send_result(reply)
        if self._kept:
            self._let_go()

    def _end_if_doomed(self, error: BaseException, reply: Message) -> None:
        """Tell the worker that nothing this process computes may be trusted, if so; it starts another."""
        if is_sticky(error):
            self._send({"op": "doomed", "reason": reply["error"]["message"]})
            raise _WorkerGone from error

    def _send_result(self, reply: Message) -> None:
        block = reply.get("block")
        if reply["op"] != "result" or block is None:
            self._send(reply)
            return
        node = encode_node(reply["node"])
        is_kept, is_in_place = "kept" in reply, "in_place" in reply
        offset, size = block
        result = ShortResult(
            reply["id"], offset, size, reply["compute_s"], is_kept, is_in_place, node
        )
        self._peer.sendall(result.encode())

    def _facts(self, error: BaseException, source_name: str) -> dict[str, Any]:
        if not is_out_of_memory(error):
            return failures.raised(error, source_name)
        room_bytes = self._models.room_bytes()
        return failures.raised(error, source_name, out_of_memory=True, room_bytes=room_bytes)

    def _answer(
        self,
        call: _Call,
        model: loading.Model,
        inputs: Inputs,
        clock: _Clock,
    ) -> Message:
        call_id = call.id
        method = model.method(call.form["method"])
        if call.form.get("each"):
            bounds = [method.bind(arguments, inputs) for arguments in call.form["args"]]
            values = [self._run(method.target, it, clock, model.device) for it in bounds]
            return {"op": "result", "id": call_id, **self._place(values, call_id)}
        bound = method.bind(call.form["args"], inputs)
        value = self._run(method.target, bound, clock, model.device)
        if not isinstance(value, Iterator):
            placed = self._place(value, call_id, inputs if call.pieces is None else None)
            if "in_place" in placed:
                placed["block"][0] += call.offset
            return {"op": "result", "id": call_id, **placed}
        del bound
        try:
            while True:
                with clock.running(model.device):
                    try:
                        item = next(value)
                    except StopIteration:
                        return {"op": "end", "id": call_id}
                placed = self._place(item, call_id)
                self._num_items_out += 1
                self._send({"op": "item", "id": call_id, "compute_s": clock.lap_s, **placed})
                self._pause(call_id)
        finally:
            if inspect.isgenerator(value):
                value.close()

    def _run(
        self, target: Any, bound: inspect.BoundArguments, clock: _Clock, device: torch.device
    ) -> Any:
        """Call a method; when the device has no room, once more after giving back what nobody uses."""
        try:
            with clock.running(device):
                return target(*bound.args, **bound.kwargs)
        except BaseException as error:
            if not is_out_of_memory(error):
                raise
        # Not before the except block ends: its traceback holds every tensor of the failed attempt.
        return_memory()
        with clock.running(device):
            return target(*bound.args, **bound.kwargs)

    def _place(self, value: Any, call_id: int, inputs: Inputs | None = None) -> Message:
        """Copy a result to the output arena, where it does not lie in `inputs`; waits for room."""
        outputs = Outputs(value, self._output.size_bytes)
        if not outputs.size:
            return {"node": outputs.node, "block": None}
        if inputs is not None and (at := outputs.find_in(inputs)) is not None:
            return {"node": outputs.node, "block": [at, outputs.size], "in_place": True}
        if outputs.size > self._output.size_bytes:
            raise RefusedError(
                "LIMIT_EXCEEDED",
                "the result is too large",
                expected=f"at most {self._output.size_bytes} bytes",
                got=str(outputs.size),
            )
        offset = self._find_room(outputs.size, call_id)
        outputs.copy_to(self._output.view[offset : offset + outputs.size])
        return {"node": outputs.node, "block": [offset, outputs.size]}

    def _copy_out(self, reply: Message, call_id: int) -> None:
        """Copy a result that lies in its call's input to the output arena; waits for room."""
        start, size = reply["block"]
        offset = self._find_room(size, call_id)
        self._output.view[offset : offset + size] = self._input.view[start : start + size]
        reply["block"] = [offset, size]
        del reply["in_place"]

    def _find_room(self, size: int, call_id: int) -> int:
        asked = False
        while True:
            try:
                return self._output.allocate(size)
            except ArenaFullError:
                self._wait_for_free(call_id, asked=asked)
                asked = True

    def _pause(self, call_id: int) -> None:
        """Between items: see whether the caller left, and let a slow one catch up."""
        self._receive_or_exit(wait=False)
        asked = False
        while self._num_items_out >= _ITEM_WINDOW:
            self._wait_for_free(call_id, asked=asked)
            asked = True
        self._check_cancelled(call_id)

    def _wait_for_free(self, call_id: int, *, asked: bool) -> None:
        if not asked:
            self._send({"op": "need"})
        self._receive_or_exit(wait=True)
        self._check_cancelled(call_id)

    def _receive_or_exit(self, *, wait: bool) -> None:
        if not self._receive(wait=wait):
            raise _WorkerGone

    def _check_cancelled(self, call_id: int) -> None:
        if call_id in self._cancelled:
            raise _CancelledError

    def _let_go(self) -> None:
        """Tell the worker which kept inputs are free by now."""
        if len(self._kept) > _KEPT_BEFORE_GC:
            gc.collect()
        done = [call_id for call_id, inputs in self._kept.items() if not inputs.kept]
        for call_id in done:
            del self._kept[call_id]
        if done:
            self._send({"op": "unkept", "ids": done})


class _Clock:
    """Adds up the time in the model's method."""

    def __init__(self) -> None:
        self.total_s = 0.0
        #: Of the last run alone.
        self.lap_s = 0.0

    def running(self, device: torch.device) -> _Lap:
        return _Lap(self, device)


class _Lap:
    __slots__ = ("_clock", "_device", "_started_s")

    def __init__(self, clock: _Clock, device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self._started_s = time.perf_counter()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        wait_for(self._device)  # only what is done counts
        self._clock.lap_s = time.perf_counter() - self._started_s
        self._clock.total_s += self._clock.lap_s
