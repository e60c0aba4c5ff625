"""What a stream leaves behind whose connection is lost, for the one that takes its place. No I/O, no clock.

Until its client has acknowledged them, a stream keeps the ends of its frames. When it is lost, frames that
wait are withdrawn, which is as if they had never come; one that runs goes on, and its end is kept too. So
a frame that is sent again on the next stream runs there only if it never did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from nos.wire import frames
from nos.wire.limits import RESUMABLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

#: A frame's last message without its number, and its data.
Last: TypeAlias = "tuple[bytes, bytes]"
#: Told what a frame ended with; None where that is not known any more.
Wait: TypeAlias = "Callable[[Last | None], None]"

#: Of ends of one stream that are not acknowledged; the oldest above it are forgotten.
_MAX_BYTES: Final = 32 << 20
#: Frames whose ends are remembered to be forgotten; far more than a window.
_MAX_FORGOTTEN: Final = 1024


class Remains:
    """The ends of one stream's frames that its client may not have."""

    def __init__(self, model: str, tenant: str) -> None:
        self.model = model
        self.tenant = tenant
        #: By number, in the order in which they ended: the messages, as they go to the client.
        self._ends: dict[int, list[bytes]] = {}
        #: Of all messages in `_ends`.
        self.num_bytes = 0
        #: Frames that ended, or began to answer, of which nothing is kept.
        self._forgotten: dict[int, None] = {}
        #: Frames that run although the stream is lost, and who waits for their ends.
        self._running: dict[int, Wait | None] = {}

    def keep(self, seq: int, header: bytes, data: memoryview) -> list[bytes] | None:
        """Keep the end of a frame; return its messages, or None if it is too large to be kept."""
        if data.nbytes > RESUMABLE_BYTES:
            self.forget(seq)
            self._tell(seq, None)
            return None
        messages = list(frames.pack(seq, header, [data], data.nbytes))
        wait = self._running.pop(seq, None)
        if wait is not None:
            wait(_last(messages))
            self.forget(seq)
            return messages
        self._ends[seq] = messages
        self.num_bytes += sum(map(len, messages))
        while self.num_bytes > _MAX_BYTES and len(self._ends) > 1:
            self.forget(next(iter(self._ends)))
        return messages

    def forget(self, seq: int) -> None:
        """Note that a frame has answered, and keep nothing of it."""
        self._drop(seq)
        self._forgotten[seq] = None
        if len(self._forgotten) > _MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]

    def acknowledge(self, seq: int) -> None:
        """The client has the ends of all frames up to this one."""
        for known in (self._ends, self._forgotten):
            for item in [it for it in known if it <= seq]:
                self._drop(item)
                self._forgotten.pop(item, None)

    def runs_on(self, seq: int) -> None:
        """A frame runs although the stream is lost; `keep` or `forget` follows."""
        self._running[seq] = None

    def claim(self, seq: int, wait: Wait) -> bool:
        """Ask for the end of a frame of the lost stream, once; `wait` may be called before this returns.

        Returns:
            False if the frame never ran, and `wait` is not called.
        """
        if seq in self._running:
            self._running[seq] = wait
        elif seq in self._ends:
            messages = self._ends[seq]
            self.forget(seq)
            wait(_last(messages))
        elif seq in self._forgotten:
            wait(None)
        else:
            return False
        return True

    def _tell(self, seq: int, last: Last | None) -> None:
        wait = self._running.pop(seq, None)
        if wait is not None:
            wait(last)

    def _drop(self, seq: int) -> None:
        self.num_bytes -= sum(map(len, self._ends.pop(seq, ())))


def _last(messages: list[bytes]) -> Last:
    header, first = frames.cut(messages[0])
    rest = [frames.cut(message)[1] for message in messages[1:]]
    return frames.split_seq(header)[2], b"".join((first, *rest))
