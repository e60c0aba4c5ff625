"""gRPC options of both sides, in one place so that they fit each other.

A client's keepalive interval must be at least the server's minimum, else the server answers GOAWAY
"too_many_pings"; and `ping_timeout_ms` must be set, else a frozen peer is noticed after 60 s whatever
the keepalive says.
"""

from __future__ import annotations

from typing import Final

from nos.wire.limits import MAX_STREAMS, MESSAGE_BYTES

_PING_TIMEOUT_MS: Final = 5_000
_SERVER_PING_INTERVAL_MS: Final = 5_000
_CLIENT_PING_INTERVAL_MS: Final = 5_000

#: For every server of ours. `so_reuseport=0`: a second bind of the port is refused rather than shared.
SERVER_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES + (64 << 10)),
    ("grpc.max_send_message_length", MESSAGE_BYTES + (64 << 10)),
    ("grpc.max_metadata_size", 16 << 10),
    # Of one connection, and the gateway has one to each worker; a stream above it would wait without a word.
    ("grpc.max_concurrent_streams", 2 * MAX_STREAMS),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Half the client's interval: timers are not exact, and two early pings would be two strikes.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _SERVER_PING_INTERVAL_MS // 2),
    ("grpc.http2.min_ping_interval_without_data_ms", _SERVER_PING_INTERVAL_MS),
)

#: For every channel of ours.
CHANNEL_OPTIONS: Final[tuple[tuple[str, int], ...]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES + (64 << 10)),
    ("grpc.max_send_message_length", MESSAGE_BYTES + (64 << 10)),
    ("grpc.keepalive_time_ms", _CLIENT_PING_INTERVAL_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # How long one attempt to connect may take: 200 ms would refuse every server behind a slow tunnel.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    # A gateway is back after 2 s, and a channel that waits longer would have streams wait for it.
    ("grpc.max_reconnect_backoff_ms", 500),
)
