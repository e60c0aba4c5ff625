"""Which request of a batch ends its executor: found by halves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from nos_backend.scheduling.actions import Batch, Request

#: An incident that costs more executors than this is given up: two requests of 64 rows cost 13.
_MAX_DEATHS: Final = 24


@dataclass(slots=True, eq=False)
class Incident:
    """One batch that ended its executor, and what became of its requests."""

    model: str
    #: Of that batch.
    rows: int
    #: Its requests, as long as they are not known to be harmless.
    suspects: set[int] = field(default_factory=set)
    num_deaths: int = 0
    has_culprit: bool = False


class Suspects:
    """Requests of batches that ended their executors. They run among themselves until they are cleared."""

    def __init__(self) -> None:
        self._incidents: dict[int, Incident] = {}
        self._keys = itertools.count(1)

    def __contains__(self, request_id: int) -> bool:
        """Return whether a request may be what ended an executor."""
        return request_id in self._incidents

    def died(self, batch: Batch, live: Sequence[Request]) -> list[Request]:
        """An executor died of a batch: return its requests without an end as they are to run again.

        Returns:
            Two halves, the requests of each with a key that only they have; nothing if there is nothing to
            be found out.
        """
        incident = self._incidents.get(batch.requests[0].id)
        if len(batch.requests) == 1 or not live:
            if incident is not None:
                incident.has_culprit = True
            return []
        if incident is None:
            incident = Incident(batch.model, batch.rows)
        incident.num_deaths += 1
        if incident.num_deaths > _MAX_DEATHS:
            incident.has_culprit = True
            return []
        incident.suspects = {item.id for item in live} | incident.suspects
        middle = (len(live) + 1) // 2
        again: list[Request] = []
        for half in (live[:middle], live[middle:]):
            key = ("suspects", next(self._keys)) if len(half) > 1 else None
            for request in half:
                self._incidents[request.id] = incident
                again.append(replace(request, key=key))
        return again

    def clear(self, requests: Iterable[Request], is_live: Callable[[int], bool]) -> list[Incident]:
        """Requests ran without harm, or ended; return the incidents that end with them without a culprit."""
        over: list[Incident] = []
        for request in requests:
            incident = self._incidents.pop(request.id, None)
            if incident is None:
                continue
            incident.suspects.discard(request.id)
            gone = {item for item in incident.suspects if not is_live(item)}
            incident.suspects -= gone
            for item in gone:
                self._incidents.pop(item, None)
            if not incident.suspects and not incident.has_culprit:
                over.append(incident)
        return over
