"""What a client owns that lives: the connection to the gateway, the streams to models, a timekeeper."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from concurrent.futures import Future, InvalidStateError
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from nos import _control, _fork, _tls
from nos._channel import Metadata, Transport, open_transport
from nos._link import Call, Flow, Link, Lost, Route
from nos._replicas import Replicas
from nos.errors import InternalError, NosError, StreamClosedError, UnavailableError
from nos.wire.host import host_id, is_loopback
from nos.wire.limits import MODEL_KEY, TICKET_KEY, TOKEN_KEY, WORKER_KEY
from nos.wire.local import WORKER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nos._address import Target
    from nos._channel import StreamCall
    from nos._control import Rpc
    from nos.wire.v1 import cluster_pb2

T = TypeVar("T")

#: A worker that did not answer is not tried again for so long; its calls are relayed.
_AVOID_S: Final = 30.0
#: A frame that was never sent goes to so many streams, one after the other.
_MAX_ATTEMPTS: Final = 2
#: Until the server said when to ask for replicas again.
_ASK_AGAIN_S: Final = 2.0
#: Until a link says when it wants attention.
_FIRST_LOOK_S: Final = 0.5

Via = Literal["auto", "local", "direct", "relay"]


class Engine:
    """Carries a client's calls; usable from any thread, never blocks except in `wait`.

    Args:
        target: The server.
        timeout_s: How long a call of the control plane may take.
        via: `auto` goes straight to the workers where they can be reached, through shared memory to those of
            this host, else through the gateway; `local`, `direct` and `relay` allow the one only.
    """

    def __init__(self, target: Target, timeout_s: float, via: Via) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self._via: Via = via
        self._reset()
        _fork.register(self)

    def _reset(self) -> None:
        self._lock = threading.Condition()
        # Everything below is read and written under the lock.
        #: By address and CA; the gateway's is among them.
        self._transports: dict[tuple[str, bytes], Transport] = {}
        #: Streams for everybody's calls, by `name@v3`; those that take no new frames are replaced.
        self._links: dict[str, Replicas[Link]] = {}
        #: Every stream that is not over, with what it leads to.
        self._all_links: dict[Link, str] = {}
        #: Workers that did not answer, and until when they are not tried.
        self._avoid: dict[str, float] = {}
        self._has_timekeeper = False
        self._is_closed = False
        self._aside: Engine | None = None

    def forget(self) -> list[object]:
        """See `nos._fork.Forgetful`."""
        held: list[object] = [
            self._lock,
            self._transports,
            self._links,
            self._all_links,
            self._aside,
        ]
        was_closed = self._is_closed
        self._reset()
        self._is_closed = was_closed
        return held

    @property
    def via(self) -> Via:
        """Which ways it may go."""
        return self._via

    def aside(self) -> Engine:
        """Return an engine for large jobs, with streams of its own; it is closed with this one."""
        with self._lock:
            self._check_open()
            if self._aside is None:
                self._aside = Engine(self.target, self.timeout_s, self._via)
            return self._aside

    def call(self, rpc: Rpc[T], timeout_s: float | None = None) -> Future[T]:
        """Start a call of the control plane."""
        limit_s = timeout_s or rpc.timeout_s or self.timeout_s
        raw = self._gateway().unary(
            rpc.path, rpc.request.SerializeToString(), self._token(), limit_s
        )
        answer: Future[T] = Future()

        def on_done(it: Future[bytes]) -> None:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                if it.cancelled():
                    answer.cancel()
                elif (error := it.exception()) is not None:
                    answer.set_exception(error)
                else:
                    try:
                        found = rpc.read(it.result())
                    except NosError as refusal:
                        answer.set_exception(refusal)
                    else:
                        answer.set_result(found)

        raw.add_done_callback(on_done)
        answer.add_done_callback(lambda it: raw.cancel() if it.cancelled() else None)
        return answer

    def wait(self, rpc: Rpc[T], timeout_s: float | None = None) -> T:
        """Make a call of the control plane and return its answer; leaving otherwise cancels it."""
        answer = self.call(rpc, timeout_s)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()
            raise

    def feed(self, rpc: Rpc[T]) -> Feed[T]:
        """Open a feed of the control plane."""
        request = rpc.request.SerializeToString()
        call = self._gateway().stream(rpc.path, iter((request,)), self._token())
        return Feed(call, rpc.read)

    def send(self, path: str, requests: Iterator[bytes]) -> bytes:
        """Stream requests of the control plane to the server and return its answer.

        Raises:
            NosError: If it refuses them, or the connection breaks.
        """
        for answer in self._gateway().stream(path, requests, self._token()):
            return answer
        raise InternalError("the server ended the stream without an answer")

    def submit(self, key: str, call: Call) -> None:
        """Send a call's frame over the shared stream of a model version that has the fewest frames."""
        call.num_attempts += 1
        while not self._shared_link(key).submit(call):
            pass

    def open_link(
        self,
        key: str,
        on_end: Callable[[Link, list[Call], NosError], None],
        *,
        is_shared: bool = False,
        flow: Flow | None = None,
        pause_s: float = 0.0,
        resumes: Lost | None = None,
    ) -> Link:
        """Open a stream of its own to a model version; see `Link`."""
        with self._lock:
            return self._open_link(
                key, on_end, is_shared=is_shared, flow=flow, pause_s=pause_s, resumes=resumes
            )

    def routes(self) -> dict[str, str]:
        """Return which way each open stream goes."""
        with self._lock:
            return {
                key: str(link.route)
                for link, key in self._all_links.items()
                if link.route is not None
            }

    def close(self) -> None:
        """End everything; idempotent. Calls without an answer fail."""
        with self._lock:
            self._is_closed = True
            links, transports = list(self._all_links), list(self._transports.values())
            self._links.clear()
            self._transports.clear()
            self._lock.notify_all()
            aside, self._aside = self._aside, None
        if aside is not None:
            aside.close()
        error = StreamClosedError("the client was closed")
        for link in links:
            link.close(error)
        for transport in transports:
            transport.close()

    def _token(self) -> Metadata:
        return ((TOKEN_KEY, f"Bearer {self.target.token}"),) if self.target.token else ()

    def _gateway(self) -> Transport:
        return self._transport(self.target.address, self.target.ca_certificate)

    def _transport(self, address: str, ca_certificate: bytes) -> Transport:
        with self._lock:
            self._check_open()
            found = self._transports.get((address, ca_certificate))
            if found is None:
                found = open_transport(address, ca_certificate)
                self._transports[address, ca_certificate] = found
            return found

    def _check_open(self) -> None:
        if self._is_closed:
            raise StreamClosedError("the client is closed", hint="Make another with nos.connect()")

    def _shared_link(self, key: str) -> Link:
        with self._lock:
            self._check_open()
            replicas = self._links.get(key)
            if replicas is None:
                replicas = self._links[key] = Replicas()
            now_s = time.monotonic()
            for worker in replicas.missing(now_s) if replicas else ("",):
                self._open_shared(key, replicas, worker)
            link = replicas.pick() or self._open_shared(key, replicas, "")
            is_due = replicas.is_due(now_s)
            if is_due:
                replicas.ask_at_s = now_s + _ASK_AGAIN_S
        if is_due:
            self._ask_replicas(key)
        return link

    def _open_shared(self, key: str, replicas: Replicas[Link], worker: str) -> Link:
        link = self._open_link(key, self._on_shared_end, is_shared=True, worker=worker)
        replicas[link] = worker
        return link

    def _ask_replicas(self, key: str) -> None:
        """Ask which replicas there are by now; nobody waits for the answer."""

        def on_answer(answer: Future[cluster_pb2.ResolveResponse]) -> None:
            if not answer.cancelled() and answer.exception() is None:
                self._hear(key, answer.result())

        with contextlib.suppress(NosError):  # closed meanwhile
            self.call(_control.resolve(key)).add_done_callback(on_answer)

    def _hear(self, key: str, answer: cluster_pb2.ResolveResponse) -> None:
        with self._lock:
            replicas = self._links.get(key)
            if replicas is None:
                return
            workers = [endpoint.worker for endpoint in answer.endpoints]
            gone = replicas.heard(workers, answer.refresh_s, time.monotonic())
        for link in gone:
            link.half_close()

    def _open_link(
        self,
        key: str,
        on_end: Callable[[Link, list[Call], NosError], None],
        *,
        is_shared: bool,
        flow: Flow | None = None,
        pause_s: float = 0.0,
        worker: str = "",
        resumes: Lost | None = None,
    ) -> Link:
        self._check_open()
        if resumes is not None:
            worker = resumes.worker

        def ended(link: Link, unsent: list[Call], error: NosError) -> None:
            with self._lock:
                self._all_links.pop(link, None)
                replicas = self._links.get(key)
                if replicas is not None and link in replicas:
                    replicas.ended(link, time.monotonic(), is_failure=not link.was_welcomed)
                    if not replicas:
                        del self._links[key]
            on_end(link, unsent, error)

        def find_route(failed: Route | None) -> Route:
            route = self._find_route(key, failed, worker)
            with self._lock:
                replicas = self._links.get(key)
                if replicas is not None and link in replicas:
                    replicas[link] = route.worker
            return route

        link = Link(
            key,
            find_route,
            ended,
            is_shared=is_shared,
            flow=flow,
            pause_s=pause_s,
            resumes=resumes,
        )
        self._all_links[link] = key
        link.start()
        if not self._has_timekeeper:
            self._has_timekeeper = True
            threading.Thread(target=self._keep_time, name="nos-timekeeper", daemon=True).start()
        self._lock.notify_all()
        return link

    def _on_shared_end(self, link: Link, unsent: list[Call], error: NosError) -> None:
        key = link.name
        for call in unsent:
            may_retry = error.retryable and call.num_attempts < _MAX_ATTEMPTS
            if not may_retry and not link.left_in_peace:
                call.fail(error)
                continue
            try:
                self.submit(key, call)
            except NosError as failure:
                call.fail(failure)

    def _find_route(self, key: str, failed: Route | None, worker: str) -> Route:
        """Ask the gateway for the way; called in a link's thread.

        Args:
            key: The model version.
            failed: The way that was just tried in vain.
            worker: Whose replica it should lead to, if that is there; empty for the least loaded.
        """
        now_s = time.monotonic()
        if failed is not None and failed.worker_address:
            with self._lock:
                self._avoid[failed.worker_address] = now_s + _AVOID_S
        answer = self.wait(_control.resolve(key))
        self._hear(key, answer)
        endpoints = self._in_order(answer, worker)
        if self._via == "relay":
            return self._relay(key, endpoints)
        for route in self._direct_routes(key, answer, endpoints):
            with self._lock:
                is_avoided = self._avoid.get(route.worker_address, 0.0) > now_s
            if not is_avoided or self._via != "auto":
                return route
        if self._via != "auto":
            kind = "through shared memory" if self._via == "local" else "directly"
            raise UnavailableError(f"no worker can be reached {kind}", "via", "auto or relay")
        return self._relay(key, endpoints)

    def _in_order(
        self, answer: cluster_pb2.ResolveResponse, worker: str
    ) -> list[cluster_pb2.Endpoint]:
        """Return the replica that is wanted, if it is there, else all, the least loaded first."""
        wanted = [endpoint for endpoint in answer.endpoints if endpoint.worker == worker]
        if wanted:
            return wanted
        with self._lock:
            own = Counter(link.route.worker for link in self._all_links if link.route is not None)
        # Clients that come at the same time do not all go the same way.
        shuffled = random.sample(list(answer.endpoints), len(answer.endpoints))
        return sorted(shuffled, key=lambda it: own[it.worker] + it.num_pending)

    def _direct_routes(
        self,
        key: str,
        answer: cluster_pb2.ResolveResponse,
        endpoints: list[cluster_pb2.Endpoint],
    ) -> Iterator[Route]:
        """Yield the ways to the workers, the fastest first."""
        spec, here = answer.spec, host_id()
        metadata: Metadata = (
            (MODEL_KEY, f"{spec.name}@v{spec.version}" if spec.name else key),
            (TICKET_KEY, answer.ticket),
        )
        if self._via != "direct":
            for endpoint in endpoints:
                if endpoint.unix_socket and endpoint.host_id == here:
                    yield Route(
                        transport=None,
                        metadata=metadata,
                        worker=endpoint.worker,
                        worker_address=endpoint.unix_socket,
                        ticket_ttl_s=answer.ticket_ttl_s,
                    )
        if self._via != "local":
            ca_certificate = _tls.named(WORKER_NAME, answer.ca_certificate)
            for endpoint in endpoints:
                is_elsewhere = endpoint.host_id not in {"", here}
                if is_elsewhere and is_loopback(endpoint.address.rpartition(":")[0].strip("[]")):
                    continue  # it is the worker's own, and here it would be somebody else
                shown = ca_certificate if endpoint.is_encrypted else b""
                yield Route(
                    transport=self._transport(endpoint.address, shown),
                    metadata=metadata,
                    worker=endpoint.worker,
                    worker_address=endpoint.address,
                    ticket_ttl_s=answer.ticket_ttl_s,
                )

    def _relay(self, key: str, endpoints: list[cluster_pb2.Endpoint]) -> Route:
        worker = endpoints[0].worker if endpoints else ""
        metadata: Metadata = ((MODEL_KEY, key), (WORKER_KEY, worker), *self._token())
        return Route(transport=self._gateway(), metadata=metadata, worker=worker)

    def _renew(self, link: Link) -> None:
        with self._lock:
            key = self._all_links.get(link)
        if key is None:
            return

        def on_answer(answer: Future[Any]) -> None:
            # A failure is no news: the link asks again, and its stream tells when the ticket is over.
            if not answer.cancelled() and answer.exception() is None:
                response = answer.result()
                link.renew(response.ticket, response.ticket_ttl_s)

        try:
            self.call(_control.resolve(key)).add_done_callback(on_answer)
        except NosError:  # closed meanwhile
            return

    def _keep_time(self) -> None:
        """Look after the links until there is none."""
        while True:
            with self._lock:
                links = list(self._all_links)
                if not links or self._is_closed:
                    self._has_timekeeper = False
                    return
            now_s = time.monotonic()
            due = [
                due_s for link in links if (due_s := link.on_time(now_s, self._renew)) is not None
            ]
            with self._lock:
                if len(self._all_links) == len(links) and not self._is_closed:
                    wake_s = min(due, default=now_s + _AVOID_S) - time.monotonic()
                    self._lock.wait(max(wake_s, 0.05))


class Feed(Generic[T]):
    """News from the server, as they come; iterate over it in one thread.

    Raises, while iterating:
        NosError: As what it ended. It does not reconnect by itself.
    """

    def __init__(self, call: StreamCall, parse: Callable[[bytes], T]) -> None:
        self._call = call
        self._messages = iter(call)
        self._parse = parse
        self._is_closed = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._parse(next(self._messages))
        except NosError:
            if self._is_closed:
                raise StopIteration from None
            raise

    def close(self) -> None:
        """End it, from any thread; whoever iterates is told by the end of the iteration."""
        self._is_closed = True
        self._call.cancel()

    def __enter__(self) -> Feed[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
