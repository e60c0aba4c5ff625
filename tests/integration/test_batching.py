"""Batches on a real server: they happen, keep their limits, and one bad request fails alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import nos
import numpy as np
import pytest
from nos import errors

from tests.accept import Accept
from tests.servers import Server, wait_for

T0_S, ROW_S = 5e-3, 0.2e-3


@pytest.fixture
def batch(client: nos.Client) -> Iterator[Any]:
    model = client.model("fake/batch")
    model.seen()
    yield model
    model.seen()


def rows(number: int, num_rows: int = 1) -> np.ndarray[Any, Any]:
    return np.full((num_rows, 4), float(number), np.float32)


def answers(futures: list[Future[Any]]) -> list[Any]:
    wait(futures)
    return [future.exception() or future.result() for future in futures]


@pytest.mark.accept("C1")
def test_concurrent_single_requests_run_in_few_calls(batch: Any, accept: Accept) -> None:
    futures = [batch.submit(rows(number)) for number in range(64)]
    for number, answer in enumerate(answers(futures)):
        np.testing.assert_array_equal(answer, rows(number))
    sizes = batch.seen()
    assert sum(sizes) == 64
    accept.figure(len(sizes), 8, "calls for 64 requests")


@pytest.mark.accept("C1")
def test_digits_answers_alike_in_a_batch_and_alone(client: nos.Client, accept: Accept) -> None:
    model, rng = client.model("nos/digits"), np.random.default_rng(1)
    shapes = [(), (1,), (3,), (2, 2)] * 16
    images = [rng.uniform(0, 16, (*shape, 8, 8)).astype(np.float32) for shape in shapes]
    alone = [model(image) for image in images]
    with model.stream() as stream:
        for image in images:
            stream.send(image)
        results = [next(stream) for _ in images]
    worst = 0.0
    for expected, result, shape in zip(alone, results, shapes, strict=True):
        assert result.value.shape == (*shape, 10)
        worst = max(worst, float(np.abs(result.value - expected).max()))
    assert max(result.timings.batch_size for result in results) > 1
    accept.figure(worst, 1e-5, "away from the answer alone")


@pytest.mark.accept("C1")
def test_sentences_of_many_calls_are_embedded_as_one(client: nos.Client, accept: Accept) -> None:
    model = client.model("sentence-transformers/all-MiniLM-L6-v2")
    calls = [
        [f"sentence {number}", "a longer one about cats"][: 1 + number % 2] for number in range(12)
    ]
    alone = [model(call) for call in calls]
    with model.stream() as stream:
        for call in calls:
            stream.send(call)
        results = [next(stream) for _ in calls]
    worst = max(
        float(np.abs(result.value - expected).max())
        for expected, result in zip(alone, results, strict=True)
    )
    assert [result.value.shape for result in results] == [(len(call), 384) for call in calls]
    assert max(result.timings.batch_size for result in results) > 1
    accept.figure(worst, 1e-5, "away from the answer alone")


@pytest.mark.accept("C2")
def test_no_batch_is_over_its_declared_size(client: nos.Client) -> None:
    model = client.model("fake/batch-four")
    model.seen()
    futures = [model.submit(rows(number, 1 + number % 3)) for number in range(30)]
    for number, answer in enumerate(answers(futures)):
        np.testing.assert_array_equal(answer, rows(number, 1 + number % 3))
    assert max(model.seen()) == 4


@pytest.mark.accept("C2")
def test_a_lone_request_waits_for_its_queue_delay_and_no_longer(
    client: nos.Client, accept: Accept
) -> None:
    model = client.model("fake/batch-four")
    with model.stream() as stream:
        stream.send(rows(1))
        timings = next(stream).timings
    assert timings.batch_size == 1
    assert timings.batch_wait_s >= 0.099
    accept.figure(timings.batch_wait_s, 0.12, "s in the queue, of 0.1 s delay")


@pytest.mark.accept("C2")
def test_a_lone_request_without_a_queue_delay_does_not_wait(batch: Any, accept: Accept) -> None:
    with batch.stream() as stream:
        waits = []
        for number in range(20):
            stream.send(rows(number))
            waits.append(next(stream).timings.batch_wait_s)
    accept.figure(max(waits), 2e-3, "s waited for companions")
    assert max(waits) == 0


@pytest.mark.accept("C2")
def test_a_deadline_in_the_queue_is_kept(client: nos.Client, accept: Accept) -> None:
    batch = client.model("fake/batch")
    batch.seen()
    start = time.monotonic()
    futures = [batch.submit(rows(number)) for number in range(8)]
    # In the queue, or at its door where it is known to be too long.
    with pytest.raises((errors.DeadlineExceededError, errors.OverloadedError)):
        batch(rows(9), timeout_s=0.01)
    accept.figure(time.monotonic() - start, 0.2, "s until told")
    assert all(isinstance(answer, np.ndarray) for answer in answers(futures))


@pytest.mark.accept("C3")
def test_one_bad_request_fails_alone(batch: Any) -> None:
    futures = [batch.poisoned.submit(rows(-1 if number == 17 else number)) for number in range(32)]
    found = answers(futures)
    assert isinstance(found.pop(17), errors.ModelError)
    for answer, number in zip(found, [*range(17), *range(18, 32)], strict=True):
        np.testing.assert_array_equal(answer, rows(number))
    assert max(batch.seen()) > 1


@pytest.mark.accept("C3")
def test_a_result_with_fewer_rows_fails_only_whose_rows_are_missing(batch: Any) -> None:
    futures = [batch.filtered.submit(rows(-1 if number == 3 else number)) for number in range(16)]
    found = answers(futures)
    assert isinstance(found[3], errors.ModelError)
    assert [answer.shape for answer in found if isinstance(answer, np.ndarray)] == [(1, 4)] * 15


def test_a_result_with_more_rows_is_an_error_of_the_model(batch: Any) -> None:
    found = answers([batch.doubled.submit(rows(number)) for number in range(6)])
    assert all(isinstance(answer, errors.ModelError) for answer in found)
    assert "another number of rows" in str(found[0])
    np.testing.assert_array_equal(batch(rows(3)), rows(3))


@pytest.mark.accept("C4")
def test_images_of_mixed_sizes_in_concurrent_calls_are_all_right(batch: Any) -> None:
    rng = np.random.default_rng(2)
    sizes = [(1, 1), (7, 5), (64, 48), (7, 5), (480, 640)]
    images = [
        rng.integers(0, 256, (1 + number % 2, *sizes[number % 5], 3), np.uint8)
        for number in range(40)
    ]
    found = answers([batch.pixels.submit(image) for image in images])
    for image, answer in zip(images, found, strict=True):
        np.testing.assert_array_equal(answer, image.astype(np.int64).sum((1, 2)))
    assert len(batch.seen()) < 40


def test_only_calls_with_equal_other_arguments_share_a_batch(batch: Any) -> None:
    futures = [batch.submit(rows(number), scale=float(number % 2)) for number in range(16)]
    for number, answer in enumerate(answers(futures)):
        np.testing.assert_array_equal(answer, rows(number * (number % 2)))


def test_lists_dicts_and_tuples_are_split(client: nos.Client) -> None:
    model = client.model("fake/batch-lists")
    model.seen()
    texts = [[f"a{number}", "b"][: 1 + number % 2] for number in range(12)]
    found = answers([model.upper.submit(text) for text in texts])
    assert found == [[item.upper() for item in text] for text in texts]
    for number, answer in enumerate(
        answers([model.both.submit(rows(number, 2)) for number in range(12)])
    ):
        np.testing.assert_array_equal(answer["x"], rows(number, 2))
        for sums in answer["sums"]:
            np.testing.assert_array_equal(sums, [4 * number] * 2)
    assert len(model.seen()) < 24


def test_results_that_cannot_be_split_turn_batching_off_and_stay_right(client: nos.Client) -> None:
    model = client.model("fake/batch-lists")
    model.seen()
    for _ in range(6):
        for number, answer in enumerate(
            answers([model.labelled.submit(rows(number)) for number in range(8)])
        ):
            assert answer["version"] == 3
            np.testing.assert_array_equal(answer["x"], rows(number))
    model.seen()
    assert all(
        not isinstance(item, Exception) for item in answers([model.labelled.submit(rows(1))])
    )
    client.unload("fake/batch-lists")


def test_batching_can_be_turned_off(client: nos.Client) -> None:
    model = client.model("fake/batch-off")
    model.seen()
    answers([model.submit(rows(number)) for number in range(8)])
    assert model.seen() == [1] * 8


def test_a_model_says_how_it_batches(client: nos.Client) -> None:
    methods = {method.name: method for method in client.info("fake/batch-four").spec.methods}
    assert methods["__call__"].batches == ("x",)
    assert methods["__call__"].max_batch == 4
    assert methods["__call__"].queue_delay_s == 0.1
    assert methods["seen"].batches == ()
    assert "at most 4 rows" in str(client.info("fake/batch-four"))


def test_cancelled_members_leave_a_batch_and_the_rest_is_answered(batch: Any) -> None:
    first = batch.submit(rows(0))
    futures = [batch.submit(rows(number)) for number in range(1, 12)]
    for future in futures[::2]:
        future.cancel()
    assert isinstance(first.result(), np.ndarray)
    for number, future in enumerate(futures, start=1):
        if not future.cancelled():
            np.testing.assert_array_equal(future.result(), rows(number))


def test_every_run_of_an_exact_model_has_the_same_number_of_rows(client: nos.Client) -> None:
    model = client.model("fake/batch-exact")
    model.seen()
    np.testing.assert_array_equal(model(rows(3, 2)), rows(3, 2))
    futures = [model.submit(rows(number, 1 + number % 3)) for number in range(12)]
    for number, answer in enumerate(answers(futures)):
        np.testing.assert_array_equal(answer, rows(number, 1 + number % 3))
    assert model.upper(["a", "b"]) == ["A", "B"]
    assert set(model.seen()) == {8}


def test_a_call_of_an_exact_model_with_more_rows_runs_in_several(client: nos.Client) -> None:
    model = client.model("fake/batch-exact")
    model.seen()
    many = np.arange(76, dtype=np.float32).reshape(19, 4)
    np.testing.assert_array_equal(model(many), many)
    assert model.seen() == [8, 8, 8]


def test_an_exact_model_says_what_is_missing(client: nos.Client) -> None:
    model = client.model("fake/batch-exact")
    with pytest.raises(errors.ModelError, match="another number of rows"):
        model.short(rows(1))
    futures = [model.poisoned.submit(rows(-1 if number == 2 else number)) for number in range(4)]
    found = answers(futures)
    assert isinstance(found.pop(2), errors.ModelError)
    for answer, number in zip(found, [0, 1, 3], strict=True):
        np.testing.assert_array_equal(answer, rows(number))


def test_a_model_that_mixes_rows_is_found_out_when_asked(client: nos.Client) -> None:
    client.unload("fake/batch-mixed")
    model = client.model("fake/batch-mixed")
    model.seen()
    for _ in range(3):
        for answer in answers([model.submit(rows(number)) for number in range(8)]):
            np.testing.assert_array_equal(answer, rows(0))
    sizes = model.seen()
    assert sum(size > 1 for size in sizes) == 1, "only the batch that was checked"
    wait_for(
        lambda: "at most 1 row" in client.info("fake/batch-mixed").replicas[0].note, "its note"
    )
    client.unload("fake/batch-mixed")


def test_a_model_that_passes_its_check_goes_on_in_batches(client: nos.Client) -> None:
    model = client.model("fake/batch-checked")
    model.seen()
    for _ in range(4):
        for number, answer in enumerate(answers([model.submit(rows(it)) for it in range(8)])):
            np.testing.assert_array_equal(answer, rows(number))
    assert sum(size > 1 for size in model.seen()) > 1
    client.unload("fake/batch-checked")


def test_a_call_with_more_rows_than_a_batch_runs_in_pieces(client: nos.Client) -> None:
    model = client.model("fake/batch-four")
    model.seen()
    many = np.arange(44, dtype=np.float32).reshape(11, 4)
    small = [model.submit(rows(number)) for number in range(3)]
    with model.stream() as stream:
        stream.send(many)
        result = next(stream)
    np.testing.assert_array_equal(result.value, many)
    assert result.timings.compute_s > 0
    for number, answer in enumerate(answers(small)):
        np.testing.assert_array_equal(answer, rows(number))
    sizes = model.seen()
    assert max(sizes) == 4
    assert sum(sizes) == 14


def test_the_error_of_a_piece_is_that_of_its_call(client: nos.Client) -> None:
    model = client.model("fake/batch-four")
    many = np.ones((11, 4), np.float32)
    many[6, 2] = -1
    with pytest.raises(errors.ModelError, match="negative"):
        model.poisoned(many)
    np.testing.assert_array_equal(model.poisoned(np.abs(many)), np.abs(many))
    future = model.submit(np.ones((40, 4), np.float32))
    future.cancel()
    np.testing.assert_array_equal(model(rows(5)), rows(5))


def test_a_call_whose_pieces_cannot_be_joined_runs_as_a_whole(client: nos.Client) -> None:
    model = client.model("fake/batch-labelled")
    model.seen()
    many = np.ones((100, 4), np.float32)
    assert model.labelled(many)["version"] == 3
    *pieces, whole = model.seen()
    assert (sum(pieces), whole) == (100, 100)
    assert max(pieces) <= 32
    assert model.labelled(many)["version"] == 3
    assert model.seen() == [100]
    assert model.upper(["a"] * 70) == ["A"] * 70
    sizes = model.seen()
    assert (sum(sizes), len(sizes) > 1, max(sizes) <= 32) == (70, True, True)


@pytest.mark.accept("C4")
def test_rows_of_different_lengths_share_a_batch_where_a_model_pads(client: nos.Client) -> None:
    model, rng = client.model("fake/batch-padded"), np.random.default_rng(3)
    waves = [rng.random((1 + n % 2, 5 + n % 4), np.float32) for n in range(16)]
    with model.stream() as stream:
        for wave in waves:
            stream.send(wave)
        results = [next(stream) for _ in waves]
    for wave, result in zip(waves, results, strict=True):
        expected = wave - wave.mean(-1, keepdims=True)
        np.testing.assert_allclose(result.value, expected, atol=1e-6)
    assert max(result.timings.batch_size for result in results) > 1
    mask = np.array([[True, True, False]])
    alone = model(np.array([[1, 3, 9]], np.float32), mask=mask)
    np.testing.assert_array_equal(alone, [[-1, 1, np.nan]])
    assert "length padded" in str(client.info("fake/batch-padded"))


def test_pixels_travel_as_they_are_and_are_normalized_where_the_model_runs(
    client: nos.Client,
) -> None:
    model, rng = client.model("fake/batch-pixels"), np.random.default_rng(5)
    images = [rng.integers(0, 256, (1, 7, 3), np.uint8) for _ in range(16)]
    with model.stream() as stream:
        for image in images:
            stream.send(image)
        results = [next(stream) for _ in images]
    for image, result in zip(images, results, strict=True):
        expected = (image / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.1, 0.5]
        assert result.value.dtype == np.float32
        np.testing.assert_allclose(result.value, expected, atol=1e-5)
    assert max(result.timings.batch_size for result in results) > 1
    with pytest.raises(errors.InvalidTensorError, match="uint8"):
        model(np.zeros((1, 7, 3), np.float32))
    with pytest.raises(errors.InvalidTensorError, match="3"):
        model(np.zeros((1, 7, 1), np.uint8))


@pytest.mark.accept("C3", "C4")
def test_single_items_of_any_size_run_in_one_round(client: nos.Client) -> None:
    model, rng = client.model("fake/batch-items"), np.random.default_rng(4)
    images = [rng.integers(14, 256, (1 + n % 3, 2 + n % 5), np.uint8) for n in range(16)]
    images[5][0, 0] = 13
    with model.stream() as stream:
        for number, image in enumerate(images):
            stream.send(image, plus=number)
        results = [next(stream) for _ in images]
    assert isinstance(results[5].error, errors.ModelError)
    for number, (image, result) in enumerate(zip(images, results, strict=True)):
        if number != 5:
            assert result.value["sum"] == image.sum() + number
            np.testing.assert_array_equal(result.value["image"], image)
    with model.stream() as stream:
        for image in images[6:]:
            stream.send(image)
        sizes = [next(stream).timings.batch_size for _ in images[6:]]
    assert max(sizes) > 1
    assert "item by item" in str(client.info("fake/batch-items"))


class Crowd:
    """Clients that send again as soon as they are answered, each on a stream of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def run(self, model: str, num_clients: int, seconds: float) -> Load:
        """Measure for so long, after half a second to settle."""
        token_file = str(self._server.token_file)
        load, image = Load(), np.zeros((1, 16), np.float32)
        async with await nos.AsyncClient.connect(
            self._server.address, token_file=token_file
        ) as client:
            handle = await client.model(model)
            await handle(image)
            begin_s = time.perf_counter() + 0.5
            end_s = begin_s + seconds

            async def one() -> None:
                async with handle.stream() as stream:
                    while (sent_s := time.perf_counter()) < end_s:
                        await stream.send(image)
                        result = await anext(stream)
                        if begin_s <= sent_s:
                            load.times_s.append(time.perf_counter() - sent_s)
                            load.sizes.append(result.timings.batch_size)

            await asyncio.gather(*(one() for _ in range(num_clients)))
        load.rate_hz = len(load.times_s) / seconds
        return load


@dataclass
class Load:
    times_s: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    rate_hz: float = 0.0


@pytest.mark.accept("C6")
def test_one_client_of_an_emulated_device_is_close_to_its_limit(
    client: nos.Client, accept: Accept
) -> None:
    """Call by call in turn with a model that takes no time, so that a busy machine slows both alike.

    The round trip is that of a caller with the same pace: all processes sleep as long before it as they
    do while the device works, for a processor that slept is slower at first.
    """
    image, ratios = np.zeros((1, 16), np.float32), []
    with client.model("fake/device").stream() as device, client.model("nos/echo").stream() as echo:
        for _ in range(200):
            sent_s = time.perf_counter()
            device.send(image)
            timings = next(device).timings
            took_s = time.perf_counter() - sent_s
            time.sleep(timings.compute_s)
            sent_s = time.perf_counter()
            echo.send(image)
            next(echo)
            round_trip_s = time.perf_counter() - sent_s
            ratios.append((timings.compute_s + round_trip_s) / took_s)
            assert timings.compute_s >= T0_S + ROW_S
    accept.figure(float(np.median(ratios)), 0.95, "of 1 / (tau(1) + rtt)", at_least=True)


@pytest.mark.accept("C6")
def test_many_clients_of_an_emulated_device_are_close_to_its_limit(
    server: Server, accept: Accept
) -> None:
    """The round trip is that of as many clients of a model that takes no time, in turn."""
    crowd, num_clients, ratios, sizes = Crowd(server), 64, [], []
    for _ in range(3):
        echo = asyncio.run(crowd.run("nos/echo", num_clients, 1.0))
        device = asyncio.run(crowd.run("fake/device", num_clients, 1.5))
        limit_s = T0_S + ROW_S * num_clients + float(np.median(echo.times_s))
        ratios.append(device.rate_hz * limit_s / num_clients)
        sizes.append(float(np.mean(device.sizes)))
    what = f"of n / (tau(n) + rtt) at n = {num_clients}, mean batch {np.median(sizes):.0f}"
    accept.figure(float(np.median(ratios)), 0.90, what, at_least=True)


@pytest.mark.accept("A6")
def test_every_request_of_a_batch_has_one_end_when_its_executor_dies(client: nos.Client) -> None:
    model = client.model("fake/batch-deadly")
    model(rows(1))
    futures = [model.submit(rows(-1 if number == 5 else number)) for number in range(16)]
    found = answers(futures)
    assert isinstance(found[5], errors.ExecutorLostError)
    for number, answer in enumerate(found):
        if number != 5:
            np.testing.assert_array_equal(answer, rows(number))
    client.unload("fake/batch-deadly")


@pytest.mark.accept("B9")
def test_a_request_that_ended_an_executor_in_a_batch_is_refused_from_then_on(
    client: nos.Client,
) -> None:
    model = client.model("fake/batch-deadly")
    model(rows(1))
    answers([model.submit(rows(-1 if number == 3 else number)) for number in range(8)])
    for _ in range(4):  # more than crashes quarantine a model
        with pytest.raises(
            errors.InvalidRequestError, match="ended its executor before"
        ) as refusal:
            model(rows(-1))
    assert "digest" in refusal.value.got
    np.testing.assert_array_equal(model(rows(2)), rows(2))
    client.unload("fake/batch-deadly")
    with pytest.raises(errors.ExecutorLostError):
        model(rows(-1))
    client.unload("fake/batch-deadly")
