"""Who uses what: added up over workers, and named to admins alone."""

from __future__ import annotations

from typing import Any

from nos_backend.control.usage import tenants


def worker(streams: dict[str, int], *models: dict[str, Any]) -> dict[str, Any]:
    return {"status": {"streams": streams, "models": list(models)}}


def model(owner: str, device_bytes: int, **device_s: float) -> dict[str, Any]:
    statistics = {"device_s": device_s}
    return {"owner": owner, "device_bytes": device_bytes, "statistics": statistics}


STATE = {
    "workers": [
        worker({"ada": 1, "ben": 1}, model("ada", 100, ada=1.0, ben=0.5)),
        worker({"ada": 2}, model("ada", 100, ben=3.0), model("nos", 7)),
    ]
}


def listed(tenant: str | None) -> list[tuple[str, float, int, int]]:
    found = tenants(STATE, tenant)
    return [(it.tenant, it.device_s, it.device_bytes, it.num_streams) for it in found]


def test_an_admin_sees_everybody() -> None:
    assert listed(None) == [("ben", 3.5, 0, 1), ("ada", 1.0, 200, 3), ("nos", 0.0, 7, 0)]


def test_a_user_sees_its_own_and_the_rest_together() -> None:
    assert listed("ada") == [("(others)", 3.5, 7, 1), ("ada", 1.0, 200, 3)]
