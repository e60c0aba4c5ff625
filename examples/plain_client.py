"""A client without the SDK: what any language with gRPC can do, from `proto/nos/v1/*.proto` alone.

    python examples/plain_client.py localhost:50051 ~/.local/state/nos/token

It asks the server for the protocol by reflection, so not even generated code is needed. Frames have two
tensors each, one after the other in `data`; `nos/echo` gives them back.
"""

from __future__ import annotations

import queue
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

METHOD = "/nos.v1.InferenceService/Stream"
NAMES = (
    "StreamRequest",
    "StreamResponse",
    "Hello",
    "Frame",
    "Chunk",
    "Argument",
    "Value",
    "Fields",
)
CHUNK_BYTES = 1 << 20
NUM_FRAMES = 8


class WithToken(grpc.StreamStreamClientInterceptor):
    """Shows the token with every call, those of reflection too."""

    def __init__(self, token: str) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)

    def intercept_stream_stream(self, proceed: Any, details: Any, requests: Any) -> Any:
        metadata = (*(details.metadata or ()), *self._metadata)
        return proceed(details._replace(metadata=metadata), requests)


class Messages:
    """The protocol's messages, as the server describes them."""

    def __init__(self, channel: grpc.Channel) -> None:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        # All of them now: the server is asked by the thread that looks, and the stream has several.
        self._classes = {
            name: GetMessageClass(pool.FindMessageTypeByName(f"nos.v1.{name}")) for name in NAMES
        }
        self._dtypes = pool.FindEnumTypeByName("nos.v1.Dtype")

    def __getattr__(self, name: str) -> Any:
        return self._classes[name]

    def dtype(self, name: str) -> int:
        """Return the number of a dtype."""
        return self._dtypes.values_by_name[f"DTYPE_{name.upper()}"].number

    def dtype_name(self, number: int) -> str:
        """Return numpy's name of a dtype."""
        return self._dtypes.values_by_number[number].name.removeprefix("DTYPE_").lower()


def requests(messages: Messages, frames: list[dict[str, np.ndarray]], window: queue.Queue) -> Any:
    """Yield what the client says: hello, then each frame as soon as the window has room for it."""
    yield messages.StreamRequest(hello=messages.Hello(versions=[1], client_version="plain"))
    for seq, frame in enumerate(frames, 1):
        window.get()
        data, fields = b"", messages.Fields()
        for key, array in frame.items():
            node = fields.fields.add(key=key).value.tensor
            node.dtype = messages.dtype(array.dtype.name)
            node.shape.extend(array.shape)
            node.offset_bytes = len(data)
            data += array.tobytes()
        argument = messages.Argument(value=messages.Value(fields=fields))
        header = messages.Frame(arguments=[argument], data_bytes=len(data))
        yield messages.StreamRequest(seq=seq, frame=header, data=data[:CHUNK_BYTES])
        for start in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
            piece = data[start : start + CHUNK_BYTES]
            yield messages.StreamRequest(seq=seq, chunk=messages.Chunk(), data=piece)


def results(messages: Messages, responses: Any, window: queue.Queue) -> Any:
    """Yield each frame's number and what came back for it."""
    for response in responses:
        kind = response.WhichOneof("event")
        if kind == "welcome":
            for _ in range(response.welcome.window_frames):
                window.put(None)
        elif kind == "error":
            raise RuntimeError(f"frame {response.seq}: {response.error}")
        elif kind == "result":
            result, data = response.result, response.data
            while len(data) < result.data_bytes:
                data += next(responses).data
            window.put(None)
            yield (
                response.seq,
                {
                    field.key: read(messages, field.value.tensor, data)
                    for field in result.value.fields.fields
                },
            )


def read(messages: Messages, tensor: Any, data: bytes) -> np.ndarray:
    """Return a tensor's array."""
    dtype = np.dtype(messages.dtype_name(tensor.dtype))
    shape = tuple(tensor.shape)
    array = np.frombuffer(data, dtype, int(np.prod(shape)), tensor.offset_bytes)
    return array.reshape(shape)


def main(address: str, token_file: str) -> None:
    """Stream some frames, and compare what comes back."""
    random = np.random.default_rng(0)
    frames = [
        {
            "image": random.integers(0, 255, (480, 640 + seq, 3), np.uint8),
            "weights": random.random((3, 100_000 * seq), np.float32),
        }
        for seq in range(NUM_FRAMES)
    ]
    token = Path(token_file).read_text().strip()
    with grpc.insecure_channel(address) as plain_channel:
        channel = grpc.intercept_channel(plain_channel, WithToken(token))
        messages = Messages(channel)
        stream = channel.stream_stream(
            METHOD,
            request_serializer=lambda it: it.SerializeToString(),
            response_deserializer=messages.StreamResponse.FromString,
        )
        window: queue.Queue = queue.Queue()
        responses = stream(
            requests(messages, frames, window), metadata=(("nos-model", "nos/echo"),)
        )
        num_equal = 0
        for seq, back in results(messages, responses, window):
            sent = frames[seq - 1]
            num_equal += list(back) == list(sent) and all(
                np.array_equal(back[key], sent[key]) for key in sent
            )
    print(f"{num_equal} of {NUM_FRAMES} frames came back as they were")


if __name__ == "__main__":
    main(*sys.argv[1:])
