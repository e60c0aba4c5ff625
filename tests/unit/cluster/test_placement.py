from __future__ import annotations

import pytest
from nos_backend.scheduling.placement import Needs, Refusal, Seats, WorkerLoad

CPU = WorkerLoad(address="cpu", device="cpu")
GPU = WorkerLoad(address="gpu", device="cuda:0", capacity_bytes=1000)


def load(address: str, **facts: object) -> WorkerLoad:
    return WorkerLoad(address=address, device="cpu", capacity_bytes=1000, **facts)  # type: ignore[arg-type]


def chosen(workers: list[WorkerLoad], device: str = "auto", need_bytes: int = 100) -> str:
    choice = Seats(workers).take("m@v1", Needs(device=device, weight_bytes=need_bytes))
    assert isinstance(choice, WorkerLoad)
    return choice.address


def test_the_worker_that_has_the_model_wins():
    busy = load("has", num_pending=9, num_models=5, keys=frozenset({"m@v1"}))
    assert chosen([load("idle"), busy]) == "has"


def test_a_worker_with_room_beats_an_idle_one_without():
    assert chosen([load("full", used_bytes=950), load("roomy", num_pending=3)]) == "roomy"


def test_room_is_what_it_took_where_it_was_measured_but_no_reason_to_refuse():
    workers = [load("short", used_bytes=700), load("roomy", num_pending=3)]
    needs = Needs(weight_bytes=100, profiled_bytes=400)
    assert Seats(workers).take("m@v1", needs) == workers[1]
    assert Seats(workers[:1]).take("m@v1", needs) == workers[0]
    assert Seats([load("small")]).take("m@v1", Needs(profiled_bytes=5000)) == load("small")


def test_the_least_loaded_of_those_with_room_wins():
    assert chosen([load("a", num_pending=2), load("b"), load("c", num_pending=1)]) == "b"
    assert chosen([load("a", num_models=2), load("b", num_models=1)]) == "b"


def test_a_full_worker_is_chosen_if_no_other_has_room():
    assert chosen([load("a", used_bytes=990), load("b", used_bytes=950)]) == "b"


def test_a_flapping_worker_is_the_last():
    assert chosen([load("flaps", is_flapping=True), load("busy", num_pending=9)]) == "busy"
    assert chosen([load("flaps", is_flapping=True)]) == "flaps"


def test_auto_prefers_cuda_and_a_device_is_kept():
    assert chosen([CPU, GPU]) == "gpu"
    assert chosen([CPU, GPU], "cpu") == "cpu"
    assert chosen([CPU, GPU], "cuda") == "gpu"


def test_each_choice_takes_room():
    seats = Seats([load("a"), load("b")])
    choices = [seats.take(f"m{number}@v1", Needs(weight_bytes=400)) for number in range(4)]
    assert [getattr(choice, "address", "") for choice in choices] == ["a", "b", "a", "b"]


def test_a_second_replica_gets_another_worker():
    seats = Seats([load("a"), load("b")])
    assert seats.take("m@v1", Needs(), {"a"}) == load("b")
    assert seats.take("m@v1", Needs(), {"a", "b"}) is Refusal.TAKEN


@pytest.mark.parametrize(
    ("workers", "device", "need_bytes", "refusal"),
    [
        ([], "auto", 1, Refusal.NO_WORKER),
        ([CPU], "cuda", 1, Refusal.NO_DEVICE),
        ([GPU], "auto", 1001, Refusal.NO_ROOM),
    ],
)
def test_refusals_say_why(workers, device, need_bytes, refusal):
    assert Seats(workers).take("m@v1", Needs(device=device, weight_bytes=need_bytes)) is refusal


def on(place: str, number: int, **facts: object) -> WorkerLoad:
    return load(f"{place}-{number}", place=place, **facts)


def placed(workers: list[WorkerLoad], count: int, needs: Needs) -> list[str]:
    seats, taken = Seats(workers), []
    for _ in range(count):
        choice = seats.take("m@v1", needs, taken)
        assert isinstance(choice, WorkerLoad)
        taken.append(choice.address)
    return taken


def test_replicas_are_spread_over_devices_or_packed_on_few():
    workers = [on(place, number) for place in ("x", "y") for number in (1, 2)]
    assert placed(workers, 4, Needs()) == ["x-1", "y-1", "x-2", "y-2"]
    assert placed(workers, 4, Needs(is_packed=True)) == ["x-1", "x-2", "y-1", "y-2"]


def test_replicas_share_a_device_only_where_they_fit():
    workers = [on("x", 1), on("x", 2, used_bytes=950), on("y", 1, num_pending=9)]
    assert placed(workers, 2, Needs(weight_bytes=100, is_packed=True)) == ["x-1", "y-1"]


def test_what_a_model_asks_for_decides_where_it_may_be():
    big = load("big", num_pending=9)
    small = WorkerLoad(address="small", device="cpu", capacity_bytes=500)
    bare = WorkerLoad(address="bare", device="cpu", installs=False)
    assert placed([big, small], 1, Needs(memory_bytes=600)) == ["big"]
    assert placed([bare, small], 1, Needs(has_packages=True)) == ["small"]
    assert Seats([bare]).take("m", Needs(has_packages=True)) is Refusal.NO_PACKAGES
    assert Seats([small]).take("m", Needs(memory_bytes=501)) is Refusal.NO_MEMORY
    assert Seats([small, GPU]).take("m", Needs(device="cuda", memory_bytes=1001)) is (
        Refusal.NO_MEMORY
    )
