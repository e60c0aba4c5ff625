"""A cluster of one worker without Dask, and a worker without executors; both can fail."""

from __future__ import annotations

import asyncio
import time

import grpc
from nos.errors import InvalidRequestError, NosError
from nos.wire import status
from nos.wire.limits import MODEL_KEY, TICKET_KEY
from nos.wire.options import SERVER_OPTIONS
from nos.wire.v1 import inference_pb2, values_pb2
from nos_backend.cluster.link import ClusterEvent, Placement
from nos_backend.control.tickets import TicketVerifier


class FakeCluster:
    """What `ClusterLink` does, in this process."""

    def __init__(self, address=""):
        self.on_reconnected = None
        self.address = "tls://fake:1"
        self.dashboard_url = "http://fake/"
        self.worker_address = address
        #: Keys in the order in which they were asked for.
        self.loads = []
        self.loaded = {}
        self.revoked = []
        #: Serialized profiles by key.
        self.profiled = {}
        #: Limits by key.
        self.scaled = {}
        self.retired = []
        #: Key, call and data of models that were to be tried.
        self.attempts = []
        self.load_s = 0.0
        #: Raised by every load while set.
        self.failure: NosError | None = None
        self._callbacks = []

    async def load(self, definition):
        self.loads.append(definition.key)
        self.tell("loading", definition.key)
        await asyncio.sleep(self.load_s)
        if self.failure is not None:
            self.tell("failed", definition.key)
            raise self.failure
        self.loaded[definition.key] = definition
        self.tell("loaded", definition.key)
        return [Placement(worker="fake-0", address=self.worker_address)]

    async def attempt(self, definition, call, data):
        self.attempts.append((definition.key, call, data))
        if self.failure is not None:
            raise self.failure

    async def scale(self, definition, min_replicas, max_replicas):
        self.scaled[definition.key] = min_replicas, max_replicas

    async def retire(self, names):
        self.retired += names

    async def revoke(self, token_id):
        self.revoked.append(token_id)

    async def unload(self, key):
        self.loaded.pop(key, None)
        self.tell("unloaded", key)

    async def memory_history(self):
        return [("fake-0", "cpu", [{"time_s": 1.0, "used_bytes": 2, "models": {"x@v1": 1}}])]

    async def profiles(self, key):
        raw = self.profiled.get(key, b"")
        return [{"state": "ready" if raw else "none", "profile": raw, "note": ""}]

    async def logs(self, key, max_lines):
        return {}

    async def state(self):
        models = [
            {
                "key": key,
                "name": definition.name,
                "owner": definition.owner,
                "state": "device",
                "device_bytes": 1000,
                "num_pending": 0,
                "num_answered": 3,
                "load_s": 0.5,
                "error": "",
            }
            for key, definition in self.loaded.items()
        ]
        worker = {
            "name": "fake-0",
            "address": self.worker_address,
            "pid": 1,
            "device": "cpu",
            "product": "fake",
            "capacity_bytes": 1 << 30,
            "status": {"used_bytes": 1000 * len(models), "models": models},
        }
        placed = {
            key: {
                "state": "loaded",
                "replicas": {"fake-0": "serving"},
                "min_replicas": self.scaled.get(key, (0, 1))[0],
                "max_replicas": self.scaled.get(key, (0, 1))[1],
                "target": 1,
                "why": "a request came",
                "pending": "",
            }
            for key in self.loaded
        }
        return {"workers": [worker], "models": placed, "num_wanted_workers": 1}

    def subscribe(self, callback):
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def tell(self, kind, model="", worker="fake-0"):
        event = ClusterEvent(time_s=time.time(), kind=kind, model=model, worker=worker)
        for callback in list(self._callbacks):
            callback(event)


class FakeWorker:
    """The data plane of a worker: checks tickets, returns the arguments of every frame.

    Methods: `flood` answers one frame with results without end, `refuse` with a typed status, `mute`
    with nothing, `hang` with nothing ever again.
    """

    def __init__(self, public_key):
        self._verifier = TicketVerifier(public_key)
        self.address = ""
        #: Everything that streams got, in order: "renewal", "hello", "frame", ...
        self.heard = []
        self.num_sent = 0
        self.num_cancelled = 0
        self.num_open = 0

    async def start(self):
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handlers = {
            "Run": grpc.unary_unary_rpc_method_handler(self._run),
            "Stream": grpc.stream_stream_rpc_method_handler(self._stream),
        }
        handler = grpc.method_handlers_generic_handler("nos.v1.InferenceService", handlers)
        self._server.add_generic_rpc_handlers((handler,))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self):
        await self._server.stop(None)

    async def _check(self, context):
        metadata = dict(context.invocation_metadata())
        assert "authorization" not in metadata
        try:
            ticket = self._verifier.verify(metadata.get(TICKET_KEY, b""), time.time())
        except NosError as error:
            await self._abort(context, error)
        assert ticket.model == metadata[MODEL_KEY]

    async def _abort(self, context, error):
        detail = (("nos-error-bin", status.to_message(error).SerializeToString()),)
        await context.abort(status.code_of(error), str(error), detail)

    async def _run(self, raw, context):
        await self._check(context)
        request = inference_pb2.RunRequest.FromString(raw)
        if request.method == "refuse":
            await self._abort(context, FAILURE)
        response = inference_pb2.RunResponse(value=request.arguments[0].value, data=request.data)
        return response.SerializeToString()

    async def _stream(self, requests, context):
        self.num_open += 1
        try:
            await self._check(context)
            async for raw in requests:
                message = inference_pb2.StreamRequest.FromString(raw)
                self.heard.append(message.WhichOneof("event"))
                if message.HasField("hello"):
                    await self._send(context, welcome=inference_pb2.Welcome(version=1))
                if not message.HasField("frame"):
                    continue
                if message.frame.method == "refuse":
                    await self._abort(context, FAILURE)
                if message.frame.method == "hang":
                    await asyncio.Event().wait()
                result = inference_pb2.Result(value=values_pb2.Value(integer=message.seq))
                while message.frame.method != "mute":
                    await self._send(context, seq=message.seq, result=result, data=message.data)
                    if message.frame.method != "flood":
                        break
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1

    async def _send(self, context, **fields):
        self.num_sent += 1
        await context.write(inference_pb2.StreamResponse(**fields).SerializeToString())


FAILURE = InvalidRequestError("the argument is wrong", "x", "float32", "float64", "Convert it")
