"""A call with more rows than a batch may have: it runs in pieces, and their results are its result."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nos_backend.worker import shares
from nos_backend.worker.inputs import Input
from nos_backend.worker.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from nos_backend.worker.batches import Part, Plan
    from nos_backend.worker.replies import Reply


class Division:
    """One such call. Its error is the first one of a piece."""

    def __init__(
        self,
        request: Request,
        plan: Plan,
        part: Part,
        sizes: Sequence[int],
        on_end: Callable[[Division, Reply | None], None],
    ) -> None:
        """Divide a call.

        Args:
            request: The call, whose input is kept until it ends.
            plan: Of its method.
            part: What it is to a batch.
            sizes: Rows of each piece.
            on_end: Called once, with its last reply; None if the results cannot be joined, so that the call
                has to run as a whole.
        """
        self.request = request
        self._part = part
        self._on_end = on_end
        self._replies: list[Reply | None] = [None] * len(sizes)
        self._num_open = len(sizes)
        self.is_over = False
        data = request.input.view if request.input is not None else memoryview(b"")
        joined = [plan.is_joined(at, given) for at, (given, _) in enumerate(request.arguments)]
        cut = shares.pieces(request.arguments, joined, part, data, sizes)
        last = len(cut) - 1
        #: To be submitted in this order.
        self.pieces = [
            Request(
                model=request.model,
                method=request.method,
                tenant=request.tenant,
                weight=request.weight,
                arguments=arguments,
                sink=partial(self._on_reply, index),
                input=Input.copy_of(block) if block.nbytes else None,
                deadline_s=request.deadline_s,
                # What was admitted with the first of them is not refused halfway.
                may_wait=request.may_wait or index > 0,
                # The sender is back after the last of them.
                sender=request.sender if index == last else 0,
                is_bulk=request.is_bulk,
                is_piece=True,
            )
            for index, (arguments, block) in enumerate(cut)
        ]

    def _on_reply(self, index: int, reply: Reply) -> None:
        if self.is_over:
            reply.release()
            return
        if reply.error is not None:
            self._end(reply)
            return
        self._replies[index] = reply
        self._num_open -= 1
        if self._num_open:
            return
        replies = [found for found in self._replies if found is not None]
        try:
            joined = shares.whole(replies, self._part)
        except shares.WrongRowsError:
            self._end(None)
        else:
            self._replies.clear()
            self._end(joined)

    def _end(self, reply: Reply | None) -> None:
        self.is_over = True
        for found in self._replies:
            if found is not None:
                found.release()
        self._replies.clear()
        granted = [piece for piece in self.pieces if piece.granted_s]
        if granted:
            first = min(granted, key=lambda piece: piece.granted_s)
            self.request.granted_s = first.granted_s
            self.request.batch_wait_s = first.batch_wait_s
        self._on_end(self, reply)
