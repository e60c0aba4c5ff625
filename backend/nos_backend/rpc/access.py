"""Who may call what: one line per RPC. A method that is served and not declared stops the server's start."""

from __future__ import annotations

from typing import Final

from nos.errors import ConfigError, PermissionDeniedError
from nos.wire.v1 import access_pb2

from nos_backend.control.tokens import role_name

_VIEWER = access_pb2.ROLE_VIEWER
_USER = access_pb2.ROLE_USER
_AUTHOR = access_pb2.ROLE_AUTHOR
_ADMIN = access_pb2.ROLE_ADMIN

#: The least role that may call each method; None is for everybody, without a token.
LEAST_ROLE: Final[dict[str, access_pb2.Role.ValueType | None]] = {
    "/nos.v1.InferenceService/Run": _USER,
    "/nos.v1.InferenceService/Stream": _USER,
    "/nos.v1.ModelService/ListModels": _VIEWER,
    "/nos.v1.ModelService/GetModelInfo": _VIEWER,
    "/nos.v1.ModelService/RegisterModel": _AUTHOR,
    "/nos.v1.ModelService/LoadModel": _USER,
    "/nos.v1.ModelService/UnloadModel": _AUTHOR,
    "/nos.v1.ModelService/DeleteModel": _AUTHOR,
    "/nos.v1.ModelService/ScaleModel": _AUTHOR,
    "/nos.v1.ModelService/GetProfile": _USER,
    "/nos.v1.ModelService/GetLogs": _AUTHOR,
    "/nos.v1.ModelService/GetStats": _VIEWER,
    "/nos.v1.ModelService/WatchModels": _VIEWER,
    "/nos.v1.ClusterService/GetStatus": _VIEWER,
    "/nos.v1.ClusterService/WatchEvents": _VIEWER,
    "/nos.v1.ClusterService/GetMemoryHistory": _VIEWER,
    "/nos.v1.ClusterService/Resolve": _USER,
    "/nos.v1.ClusterService/ScaleWorkers": _ADMIN,
    "/nos.v1.BlobService/Stat": _AUTHOR,
    "/nos.v1.BlobService/Upload": _AUTHOR,
    "/nos.v1.BlobService/Fetch": _AUTHOR,
    "/nos.v1.AccessService/CreateToken": _ADMIN,
    "/nos.v1.AccessService/ListTokens": _ADMIN,
    "/nos.v1.AccessService/RevokeToken": _ADMIN,
    "/nos.v1.AccessService/WhoAmI": _VIEWER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _VIEWER,
    "/grpc.health.v1.Health/Check": None,
    "/grpc.health.v1.Health/List": None,
    "/grpc.health.v1.Health/Watch": None,
}


def least_role(method: str) -> access_pb2.Role.ValueType | None:
    """Return the least role that may call a method; None is for everybody.

    Raises:
        ConfigError: If the method is not declared.
    """
    try:
        return LEAST_ROLE[method]
    except KeyError:
        raise ConfigError(
            "a served method declares no permission",
            method,
            hint="Add it to nos_backend.rpc.access.LEAST_ROLE",
        ) from None


def check_role(role: access_pb2.Role.ValueType, least: access_pb2.Role.ValueType) -> None:
    """Accept a role that is at least `least`.

    Raises:
        PermissionDeniedError: If it is less.
    """
    if role < least:
        raise PermissionDeniedError(
            "this token may not do that",
            "role",
            f"{role_name(least)} or more",
            role_name(role),
            "Ask an admin of this server for another token",
        )
