"""Who may use the data plane, and how much of an error they may see."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nos.errors import (
    InternalError,
    LoadError,
    ModelError,
    NosError,
    PermissionDeniedError,
    QuarantinedError,
)
from nos.wire.limits import MODEL_KEY
from nos.wire.v1 import access_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Access:
    """What a verified ticket opens."""

    ticket: access_pb2.Ticket

    @property
    def model(self) -> str:
        """The one version that it opens, as `name@v3`."""
        return self.ticket.model

    @property
    def weight(self) -> float:
        """The tenant's share of a device, against those of others."""
        return self.ticket.weight or 1.0

    def visible(self, error: NosError, owner: str) -> NosError:
        """Return `error` as this caller may see it.

        What a model's code says, in text or traceback, is for its owner and for admins. Others get the
        class name and an id, under which the log has the rest.
        """
        if self.ticket.tenant == owner or self.ticket.role == access_pb2.ROLE_ADMIN:
            return error
        if isinstance(error, ModelError):
            error_id = new_error_id()
            _logger.warning("error id %s, of %s: %s", error_id, self.model, error.remote_traceback)
            text = f"the model raised {error.type_name}"
            return ModelError(text, error.type_name, error_id=error_id)
        if isinstance(error, LoadError) and not isinstance(error, QuarantinedError):
            error_id = new_error_id()
            _logger.warning("error id %s, of %s: %s", error_id, self.model, error)
            return LoadError(f"{self.model} cannot be loaded", error_id=error_id)
        return error


def authorize(ticket: access_pb2.Ticket, metadata: Mapping[str, str | bytes]) -> Access:
    """Return what a verified ticket opens.

    Raises:
        PermissionDeniedError: If it is not for running models, or for another model than the call's.
    """
    if ticket.role < access_pb2.ROLE_USER:
        raise PermissionDeniedError(
            "the ticket does not allow running models",
            "role",
            "user or more",
            access_pb2.Role.Name(ticket.role) if ticket.role in access_pb2.Role.values() else "?",
        )
    wanted = metadata.get(MODEL_KEY, ticket.model)
    if wanted not in {ticket.model, ticket.model.rpartition("@")[0]}:
        raise PermissionDeniedError(
            "the ticket is for another model", MODEL_KEY, ticket.model, str(wanted)[:200]
        )
    return Access(ticket=ticket)


def new_error_id() -> str:
    """Return a name for a failure in the log."""
    return secrets.token_hex(6)


def unexpected(error: BaseException, what: str) -> InternalError:
    """Log a defect once, and return what its caller may know of it."""
    error_id = new_error_id()
    _logger.error("error id %s, while %s", error_id, what, exc_info=error)
    return InternalError("the worker failed", error_id=error_id)
