"""Limits of the wire, with their reasons; both sides read them here."""

from __future__ import annotations

#: The protocol version that this code speaks.
PROTOCOL_VERSION = 1

#: Data bytes per message when we write. Below it one message carries the frame; above it chunks follow,
#: so that no frame is too large and none holds up the messages of its neighbours for long.
CHUNK_BYTES = 1 << 20

#: The largest message that either side accepts. Other writers may use larger chunks than ours.
MESSAGE_BYTES = 16 << 20

#: Data up to this goes through the socket of a local stream rather than through its shared memory: a copy
#: of so little costs less than the bookkeeping.
INLINE_BYTES = 4 << 10

#: Shared memory of a local stream, for requests and for results each; it costs what is in use. Room for the
#: usual window of bytes.
SHARED_BYTES = 64 << 20

#: The most that a worker maps for one direction of a local stream.
MAX_SHARED_BYTES = 1 << 30

#: Streams of one worker; the next is refused at once. An idle one costs some 80 KiB in all.
MAX_STREAMS = 4000

#: Dimensions of a tensor.
MAX_RANK = 8

#: Bytes of all tensors and media of one frame.
FRAME_BYTES = 2 << 30

#: Depth of nested lists and dicts.
MAX_DEPTH = 32

#: Tensors start at multiples of this in `data`: what CUDA kernels and AVX-512 loads like.
ALIGNMENT_BYTES = 64

#: A feature of streams: results are written as they are there, not in the order of their frames.
UNORDERED: str = "unordered"

#: A feature of streams: when the connection is lost, another stream takes its place and no end is lost.
RESUME: str = "resume"

#: Of a frame or result that is kept for that; more is lost with the connection.
RESUMABLE_BYTES = 16 << 20

#: Metadata keys.
MODEL_KEY = "nos-model"
TICKET_KEY = "nos-ticket-bin"
#: On a relayed stream: the worker that the client would like it to go to.
WORKER_KEY = "nos-worker"
ERROR_KEY = "nos-error-bin"
TOKEN_KEY = "authorization"  # noqa: S105 - the key, not a token
