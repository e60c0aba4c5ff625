# ruff: noqa: TRY300, TRY301, PLR0912
"""A small server of the whole contract in this process, for tests of clients: gateway, worker, one model.

The model is the class below, described by the real gateway's code and run right here, in the order of the
frames. It speaks the same wire as `nos serve`; `tests/integration/test_sdk.py` runs on both.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc
from nos.errors import (
    CancelledError,
    DeadlineExceededError,
    ModelError,
    ModelNotFoundError,
    NosError,
    UnauthenticatedError,
    UnimplementedError,
)
from nos.wire import frames, signature, status, values
from nos.wire.limits import CHUNK_BYTES, ERROR_KEY, MODEL_KEY, TICKET_KEY, TOKEN_KEY
from nos.wire.options import SERVER_OPTIONS
from nos.wire.v1 import cluster_pb2, inference_pb2, models_pb2
from nos_backend.control.describe import describe

NAME = "fake/contract"
TOKEN = "the-token"
SOURCE = '''
import hashlib
import time
from typing import Annotated, Iterator

import numpy as np


class Contract:
    """Does what a test of a client needs.

    More about it.
    """

    def __call__(self, x):
        """Return what came."""
        return x

    def digest(self, data: bytes) -> str:
        """Return the sha256 of some bytes."""
        return hashlib.sha256(data).hexdigest()

    def add(self, a: int, b: int = 2) -> int:
        """Add two numbers."""
        return a + b

    def rows(self, x: Annotated[np.ndarray, "float32[batch, 3]"]) -> int:
        """Count rows."""
        return len(x)

    def count(self, n: int) -> Iterator[int]:
        """Count from 0 to n - 1."""
        yield from range(n)

    def fail(self, text: str) -> None:
        """Raise ValueError."""
        raise ValueError(text)

    def wait(self, seconds: float) -> float:
        """Sleep."""
        time.sleep(seconds)
        return seconds

    def load(self) -> str:
        """Has the name of something that a handle has too."""
        return "loaded"
'''


class FakeServer:
    """Start it, point a client at `address`, look at what it counted.

    Args:
        is_direct: Whether Resolve names a worker.
        ticket_ttl_s: How long tickets are good.
    """

    def __init__(self, *, is_direct: bool = True, ticket_ttl_s: float = 60.0) -> None:
        self.spec = describe(SOURCE)[0].spec
        module: dict[str, Any] = {}
        exec(SOURCE, module)
        self.make_model = module["Contract"]
        self.spec.name, self.spec.version, self.spec.owner = NAME, 1, "nos"
        self.is_direct = is_direct
        self.ticket_ttl_s = ticket_ttl_s
        self.window_frames = 16
        #: Whether frames may take longer than they say.
        self.ignores_limits = False
        self.registered: list[models_pb2.RegisterModelRequest] = []
        #: Streams opened, by port: `gateway` or `worker`.
        self.num_streams = {"gateway": 0, "worker": 0}
        #: Frames that arrived, cancels and renewals.
        self.num_frames = self.num_cancels = self.num_renewals = 0
        self._streams: list[_FakeStream] = []
        self._gateway, self.address = self._listen("gateway")
        self._worker, self.worker_address = self._listen("worker")

    def _listen(self, role: str) -> tuple[grpc.Server, str]:
        server = grpc.server(futures.ThreadPoolExecutor(32), options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers((_Handlers(self, role),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return server, f"127.0.0.1:{port}"

    def drain(self) -> None:
        """Ask all clients to go elsewhere."""
        for stream in self._streams:
            draining = inference_pb2.Draining(grace_s=5.0)
            stream.out.put(inference_pb2.StreamResponse(draining=draining).SerializeToString())

    def kill_worker(self) -> None:
        """End the worker's port at once, with all that runs on it."""
        for stream in self._streams:
            stream.stopped.set()
        self._worker.stop(0).wait()

    def stop(self) -> None:
        for stream in self._streams:
            stream.stopped.set()
        self._gateway.stop(0).wait()
        self._worker.stop(0).wait()


class _Handlers(grpc.GenericRpcHandler):
    def __init__(self, owner: FakeServer, role: str) -> None:
        self._owner = owner
        self._role = role

    def service(self, details: Any) -> Any:
        metadata = dict(details.invocation_metadata)
        service, method = details.method.rsplit("/", 1)
        if details.method == "/nos.v1.InferenceService/Stream":
            return grpc.stream_stream_rpc_method_handler(
                lambda requests, context: self._stream(requests, context, metadata)
            )
        run: Callable[[bytes], Any] | None = getattr(self, f"_{method}", None)
        if service.startswith("/grpc") or self._role != "gateway":
            return None

        def unary(raw: bytes, context: Any) -> bytes:
            try:
                self._check_token(metadata)
                if run is None:
                    raise UnimplementedError(f"{method} is not offered")
                answer: bytes = run(raw).SerializeToString()
                return answer
            except NosError as error:
                return _abort(context, error)

        def feed(raw: bytes, context: Any) -> Iterator[bytes]:
            try:
                self._check_token(metadata)
            except NosError as error:
                _abort(context, error)
            assert run is not None
            for message in run(raw):
                yield message.SerializeToString()
                if not context.is_active():
                    return

        if method.startswith("Watch"):
            return grpc.unary_stream_rpc_method_handler(feed)
        return grpc.unary_unary_rpc_method_handler(unary)

    def _check_token(self, metadata: dict[str, Any]) -> None:
        if metadata.get(TOKEN_KEY) != f"Bearer {TOKEN}":
            raise UnauthenticatedError("the token is missing or wrong", "token", hint="Get one")

    def _info(self) -> models_pb2.ModelInfo:
        return models_pb2.ModelInfo(spec=self._owner.spec, state=models_pb2.MODEL_STATE_DEVICE)

    def _find(self, name: str) -> models_pb2.ModelInfo:
        if name not in {NAME, f"{NAME}@v1"}:
            raise ModelNotFoundError(f"there is no model {name!r}", "model", NAME, name)
        return self._info()

    def _ListModels(self, raw: bytes) -> Any:
        request = models_pb2.ListModelsRequest.FromString(raw)
        found = [self._info()] if request.pattern in NAME else []
        return models_pb2.ListModelsResponse(models=found)

    def _GetModelInfo(self, raw: bytes) -> Any:
        request = models_pb2.GetModelInfoRequest.FromString(raw)
        return models_pb2.GetModelInfoResponse(model=self._find(request.model))

    def _LoadModel(self, raw: bytes) -> Any:
        request = models_pb2.LoadModelRequest.FromString(raw)
        return models_pb2.LoadModelResponse(model=self._find(request.model))

    def _UnloadModel(self, raw: bytes) -> Any:
        request = models_pb2.UnloadModelRequest.FromString(raw)
        return models_pb2.UnloadModelResponse(model=self._find(request.model))

    def _RegisterModel(self, raw: bytes) -> Any:
        request = models_pb2.RegisterModelRequest.FromString(raw)
        self._owner.registered.append(request)
        info = self._info()
        info.spec.CopyFrom(describe(request.source, class_name=request.class_name)[0].spec)
        info.spec.name, info.spec.version = request.name or info.spec.name, 1
        return models_pb2.RegisterModelResponse(model=info)

    def _DeleteModel(self, raw: bytes) -> Any:
        self._find(models_pb2.DeleteModelRequest.FromString(raw).model)
        return models_pb2.DeleteModelResponse()

    def _GetStatus(self, raw: bytes = b"") -> Any:
        device = cluster_pb2.Device(name="cpu", product="a CPU", capacity_bytes=1 << 30)
        device.models.add(model=NAME, device_bytes=1 << 20)
        worker = cluster_pb2.Worker(name="cpu-0", address=self._owner.worker_address, device=device)
        return cluster_pb2.GetStatusResponse(
            version="0.0", state="ready", workers=[worker], num_models=1
        )

    def _Resolve(self, raw: bytes) -> Any:
        owner = self._owner
        self._find(cluster_pb2.ResolveRequest.FromString(raw).model)
        endpoint = cluster_pb2.Endpoint(worker="cpu-0", address=owner.worker_address)
        return cluster_pb2.ResolveResponse(
            endpoints=[endpoint] if owner.is_direct else [],
            ticket=b"ticket",
            ticket_ttl_s=owner.ticket_ttl_s,
            spec=owner.spec,
        )

    def _WatchModels(self, raw: bytes) -> Iterator[Any]:
        yield models_pb2.WatchModelsResponse(model=self._info())

    def _WatchEvents(self, raw: bytes) -> Iterator[Any]:
        interval_s = cluster_pb2.WatchEventsRequest.FromString(raw).status_interval_s
        yield cluster_pb2.WatchEventsResponse(time_s=time.time(), kind="loaded", model=NAME)
        while interval_s:
            yield cluster_pb2.WatchEventsResponse(
                time_s=time.time(), kind="status", status=self._GetStatus()
            )
            time.sleep(interval_s)

    def _stream(self, requests: Iterator[bytes], context: Any, metadata: dict[str, Any]) -> Any:
        owner = self._owner
        owner.num_streams[self._role] += 1
        try:
            if self._role == "gateway":
                self._check_token(metadata)
            elif metadata.get(TICKET_KEY) != b"ticket":
                raise UnauthenticatedError("the ticket is missing or wrong", "ticket")
            self._find(str(metadata.get(MODEL_KEY, "")))
        except NosError as error:
            _abort(context, error)
        stream = _FakeStream(owner)
        owner._streams.append(stream)
        context.add_callback(stream.stop)
        threading.Thread(target=stream.read, args=(requests,), daemon=True).start()
        threading.Thread(target=stream.run, daemon=True).start()
        yield from iter(stream.out.get, None)


class _FakeStream:
    def __init__(self, owner: FakeServer) -> None:
        self._owner = owner
        self._model = owner.make_model()
        self.out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self._todo: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._frames: dict[int, tuple[inference_pb2.Frame, bytearray]] = {}
        self._cancelled: set[int] = set()

    def stop(self) -> None:
        """End its threads: the call is over."""
        self.stopped.set()
        self._todo.put(None)
        self.out.put(None)

    def read(self, requests: Iterator[bytes]) -> None:
        last_seq = 0
        try:
            for raw in requests:
                message, data = frames.split(inference_pb2.StreamRequest, raw)
                match message.WhichOneof("event"):
                    case "hello":
                        welcome = inference_pb2.Welcome(
                            version=1,
                            stream_id="s",
                            model_version=1,
                            window_frames=self._owner.window_frames,
                            window_bytes=64 << 20,
                        )
                        response = inference_pb2.StreamResponse(welcome=welcome)
                        self.out.put(response.SerializeToString())
                    case "frame":
                        last_seq += 1
                        assert message.seq == last_seq, "sequence numbers rise by one"
                        self._owner.num_frames += 1
                        self._frames[message.seq] = (message.frame, bytearray(data))
                    case "chunk":
                        self._frames[message.seq][1].extend(data)
                    case "cancel":
                        self._owner.num_cancels += 1
                        self._cancelled.add(message.seq)
                    case "renewal":
                        assert message.renewal.ticket == b"ticket"
                        self._owner.num_renewals += 1
                waiting = self._frames.get(message.seq)
                if message.WhichOneof("event") in {"frame", "chunk"} and waiting:
                    assert len(self._frames) <= self._owner.window_frames, "the window is kept"
                    if len(waiting[1]) == waiting[0].data_bytes:
                        self._todo.put(message.seq)
            self._todo.put(None)
        except grpc.RpcError:
            self.stop()

    def run(self) -> None:
        for seq in iter(self._todo.get, None):
            frame, data = self._frames[seq]
            try:
                self._run(seq, frame, data)
            except NosError as error:
                response = inference_pb2.StreamResponse(seq=seq, error=status.to_message(error))
                del self._frames[seq]
                self.out.put(response.SerializeToString())
            if self.stopped.is_set():
                return
        self.out.put(None)

    def _run(self, seq: int, frame: inference_pb2.Frame, data: bytearray) -> None:
        method = signature.find_method(self._owner.spec, frame.method)
        signature.check_call(method, frame.arguments)
        view = memoryview(bytes(data))
        args, kwargs = [], {}
        for argument in frame.arguments:
            values.check(argument.value, view.nbytes, argument.name)
            value = values.read(argument.value, view)
            if argument.name:
                kwargs[argument.name] = value
            else:
                args.append(value)
        begun_s = time.monotonic()
        if method.name == "wait":
            deadline = begun_s + kwargs["seconds"]
            while time.monotonic() < deadline and seq not in self._cancelled:
                late = frame.timeout_s and time.monotonic() - begun_s > frame.timeout_s
                if late and not self._owner.ignores_limits:
                    raise DeadlineExceededError("the deadline passed")
                if self.stopped.wait(0.01):
                    return
            kwargs["seconds"] = 0.0
        if seq in self._cancelled:
            raise CancelledError("the frame was cancelled")
        try:
            value = getattr(self._model, method.name)(*args, **kwargs)
            if method.is_generator:
                for item in value:
                    if seq in self._cancelled:
                        raise CancelledError("the frame was cancelled")
                    self._put(seq, item, more=True)
                value = None
        except NosError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(error).__name__}: {error}",
                type(error).__name__,
                str(error),
                f"Traceback: {error!r}",
            ) from error
        timings = inference_pb2.Timings(compute_s=time.monotonic() - begun_s, batch_size=1)
        self._put(seq, value, timings=timings)

    def _put(self, seq: int, value: Any, *, more: bool = False, timings: Any = None) -> None:
        payload = values.Payload()
        result = inference_pb2.Result(more=more, timings=timings)
        values.write(value, result.value, payload, "result")
        result.data_bytes = payload.size
        if not more:
            del self._frames[seq]
        header = inference_pb2.StreamResponse(seq=seq, result=result)
        if payload.size <= CHUNK_BYTES:
            self.out.put(frames.join(header, payload.buffers, payload.size))
            return
        for group in frames.chunked(payload.buffers):
            size = sum(piece.nbytes for piece in group)
            self.out.put(frames.join(header, group, size))
            header = inference_pb2.StreamResponse(seq=seq, chunk=inference_pb2.Chunk())


def _abort(context: Any, error: NosError) -> Any:
    context.set_trailing_metadata(((ERROR_KEY, status.to_message(error).SerializeToString()),))
    context.abort(status.code_of(error), str(error))


__all__ = ["NAME", "SOURCE", "TOKEN", "FakeServer"]
