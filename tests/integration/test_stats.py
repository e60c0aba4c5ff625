"""What became of requests, as clients and the command line see it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import nos
import numpy as np
import pytest
from nos import errors
from nos.cli import app
from typer.testing import CliRunner

from tests.servers import Server, wait_for


def rows(number: int) -> np.ndarray:
    return np.full((1, 4), float(number), np.float32)


def settled(
    client: nos.Client, name: str, is_there: Callable[[nos.ModelStats], bool]
) -> nos.ModelStats:
    """Workers report once a second."""
    end_s = time.monotonic() + 30
    while not is_there(found := client.stats(name)) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert is_there(found), str(found)
    return found


def test_stats_count_what_became_of_requests(client: nos.Client) -> None:
    client.unload("fake/batch")
    model = client.model("fake/batch")
    model.seen()
    futures = [model.submit(rows(number)) for number in range(32)]
    failing = [model.poisoned.submit(rows(-1)) for _ in range(2)]
    for future in futures:
        future.result()
    for future in failing:
        assert isinstance(future.exception(), errors.ModelError)
    cancelled = model.submit(rows(1))
    cancelled.cancel()
    found = settled(client, "fake/batch", lambda it: it.num_answered >= 33 and not it.num_pending)
    assert found.model == "fake/batch@v1"
    assert found.num_failed == 2
    assert sum(size * count for size, count in found.batches.items()) >= 35
    assert max(found.batches) > 1
    assert found.mean_batch > 1
    assert 0 < found.p50_s <= found.p99_s
    assert found.mean_queue_s > 0
    assert found.device_s > 0.04
    assert found.tenants == {"local": pytest.approx(found.device_s)}


def test_all_models_are_in_one_table(client: nos.Client) -> None:
    client.model("nos/echo")(np.zeros(3, np.float32))
    settled(client, "nos/echo", lambda it: it.num_answered > 0)
    every = client.stats()
    assert [item.model for item in every] == sorted(item.model for item in every)
    assert "nos/echo@v1" in str(every)


def test_a_model_on_no_worker_has_no_stats(client: nos.Client) -> None:
    client.unload("fake/batch-four")
    assert client.stats("fake/batch-four").num_answered == 0
    with pytest.raises(errors.ModelNotFoundError):
        client.stats("no/such")


def test_only_admins_see_who_else_used_a_model(server: Server, client: nos.Client) -> None:
    client.model("nos/echo")(np.zeros(3, np.float32))
    settled(client, "nos/echo", lambda it: "local" in it.tenants)
    made = client.create_token("ann", role="user")
    with nos.connect(server.address, token=made.secret) as ann:
        ann.model("nos/echo")(np.zeros(3, np.float32))
        found = settled(ann, "nos/echo", lambda it: "ann" in it.tenants)
        assert set(found.tenants) == {"ann", "(others)"}
    assert {"ann", "local"} <= set(client.stats("nos/echo").tenants)


def test_the_command_line_shows_stats(server: Server, client: nos.Client) -> None:
    client.model("nos/echo")(np.zeros(3, np.float32))
    settled(client, "nos/echo", lambda it: it.num_answered > 0)
    environment = {"NOS_TOKEN_FILE": str(server.token_file)}
    place = ["--address", server.address, "stats"]
    one = CliRunner().invoke(app, [*place, "nos/echo", "--json"], env=environment)
    plain = json.loads(one.stdout)
    assert plain["model"] == "nos/echo@v1"
    assert plain["num_answered"] > 0
    every = CliRunner().invoke(app, place, env=environment)
    assert every.exit_code == 0
    assert "nos/echo@v1" in every.stdout


def test_the_status_says_what_there_should_be_and_why_and_who_uses_what(
    client: nos.Client,
) -> None:
    model = client.model("fake/batch")
    client.scale("fake/batch", replicas=1)
    with model.stream() as stream:
        stream.send(np.ones((1, 4), np.float32))
        next(stream)

        def found() -> nos.Status | None:
            status = client.status()
            mine = {it.tenant: it for it in status.tenants}.get("local")
            return status if mine and mine.num_streams and mine.device_s > 0.01 else None

        status = wait_for(found, "the worker has told")
    [placed] = [it for it in status.models if it.model == model.spec.key]
    assert (placed.num_serving, placed.scaling.target_replicas) == (1, 1)
    assert placed.scaling.reason
    kinds = {(event.kind, event.model) for event in status.events}
    assert ("scaled", model.spec.key) in kinds
    shown = str(status)
    assert f"{model.spec.key}" in shown
    assert "1 serving, 1 wanted" in shown
    assert "tenant local" in shown
    assert json.loads(json.dumps(status.to_dict()))["tenants"][0]["device_s"] > 0
