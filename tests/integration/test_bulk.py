"""Row E7: Dask collections through a model, on the workers and behind the calls of everybody."""

from __future__ import annotations

import pickle
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor as ThreadPool

import cloudpickle
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import nos
import numpy as np
import pandas as pd
import pytest
from nos import _blocks
from nos.errors import InvalidRequestError, ModelError, StreamClosedError

from tests.servers import ROOT, wait_for

COUNTER = '''
import time


class Counter:
    """Says the how manieth call it was."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: float) -> int:
        self.count += 1
        time.sleep(0.1)
        return self.count
'''


def rows(count, width=4):
    return np.random.default_rng(0).random((count, width), dtype=np.float32)


def chunked(array, size):
    return da.from_array(array, chunks=(size, *array.shape[1:]))


@pytest.mark.accept("E7")
def test_blocks_of_an_array_are_what_calls_give(client):
    digits = client.model("nos/digits")
    images = np.random.default_rng(0).integers(0, 17, (500, 8, 8)).astype(np.float32)
    labels = digits.labels.map_blocks(chunked(images, 120))
    assert (labels.dtype, labels.shape, labels.chunks) == (
        *(np.int64, (500,)),
        ((120, 120, 120, 120, 20),),
    )
    assert np.array_equal(labels.compute(), digits.labels(images))
    assert labels[7:9].compute().tolist() == digits.labels(images[7:9]).tolist()


@pytest.mark.accept("E7")
def test_a_method_of_one_row_gets_them_one_by_one_and_its_result_need_not_be_declared(client):
    edges = client.model("nos/edges")
    images = np.random.default_rng(0).integers(0, 255, (9, 12, 16, 3), dtype=np.uint8)
    found = edges.map_blocks(chunked(images, 4))
    assert (found.dtype, found.shape) == (np.uint8, (9, 12, 16))
    assert np.array_equal(found.compute(), np.stack([edges(image) for image in images]))


@pytest.mark.accept("E7")
def test_results_are_composed_before_anything_ran(client):
    model = client.model("fake/batch")
    model.seen()
    x = rows(40)
    total = model.map_blocks(chunked(x, 16)).sum(axis=1).max()
    assert model.seen() == []
    assert float(total.compute()) == pytest.approx(float(x.sum(axis=1).max()))
    assert sum(model.seen()) == 40


@pytest.mark.accept("E7")
def test_columns_of_a_dataframe_become_a_series_with_its_index(client):
    table = pd.DataFrame({"text": list("vwxyz"), **{name: range(5) for name in "abcd"}})
    frame = dd.from_pandas(table.set_index(table.index * 10), npartitions=2)
    upper = client.model("fake/batch-lists").upper.map_partitions(frame, column="text").compute()
    assert (list(upper), list(upper.index)) == (list("VWXYZ"), [0, 10, 20, 30, 40])
    numbers = client.model("fake/batch").map_partitions(frame, column=list("abcd")).compute()
    assert [row.tolist() for row in numbers] == [[float(n)] * 4 for n in range(5)]
    counted = client.model("fake/slow").map_partitions(frame.assign(s=0.001), column="s")
    assert (counted.dtype, counted.compute().sum()) == (np.float64, pytest.approx(0.005))


@pytest.mark.accept("E7")
def test_a_bag_takes_any_items_and_gives_any_results(client):
    bag = db.from_sequence(["a", "b", "c"], npartitions=2)
    found = client.model("fake/batch-lists").upper.map_bag(bag.map(lambda text: [text, "x"]))
    assert found.compute(scheduler="threads") == [["A", "X"], ["B", "X"], ["C", "X"]]


@pytest.mark.accept("E7")
def test_calls_go_before_the_rows_of_a_large_job(server, client, accept):
    key = client.register(COUNTER, name="counter").spec.key
    model = client.model("counter")
    model(0.0)
    with ThreadPool(1) as pool, nos.connect(server.address, token_file=server.token_file) as other:
        blocks = other.model("counter").map_blocks(chunked(np.ones(20_000), 2000), batch=False)
        job = pool.submit(blocks.compute, scheduler="threads", num_workers=1)
        wait_for(lambda: client.stats(key).num_pending >= 15, "its window is full")
        numbers, latencies_s = [], []
        for _ in range(100 if accept.strict else 8):
            start_s = time.monotonic()
            numbers.append(model(0.0))
            latencies_s.append(time.monotonic() - start_s)
        assert not job.done()
        other.close()
        assert isinstance(job.exception(30), StreamClosedError)
    client.unregister("counter")
    # In order of arrival there would be 16 rows between one call and the next.
    assert statistics.median(np.diff(numbers)) <= 8
    accept.figure(float(np.quantile(latencies_s, 0.99)), 0.3, "s p99 of calls beside rows of 0.1 s")


def test_other_processes_find_the_token_by_themselves(server, client, monkeypatch):
    x = rows(10)
    blocks = client.model("fake/batch").map_blocks(chunked(x, 5))
    packed = cloudpickle.dumps(blocks)
    assert server.token.encode() not in packed
    monkeypatch.setenv("NOS_TOKEN_FILE", str(server.token_file))
    assert np.array_equal(pickle.loads(packed).compute(scheduler="sync"), x)
    assert _blocks._connect.cache_info().currsize == 1
    lane = _blocks._connect(client.address, "auto", client.model("fake/batch").spec.key, "__call__")
    lane.method._engine.close()
    _blocks._connect.cache_clear()


def test_progress_counts_the_rows(client, capsys):
    client.model("fake/batch").map_blocks(chunked(rows(30), 10), progress=True).compute()
    assert "30/30" in capsys.readouterr().err


def test_one_failing_row_fails_the_job_with_the_models_error(client):
    x = rows(30)
    x[17] = -1
    with pytest.raises(ModelError, match="ValueError"):
        client.model("fake/batch").poisoned.map_blocks(chunked(x, 10)).compute()


def test_a_method_that_drops_rows_is_found_out(client):
    x = rows(30)
    x[17] = -1
    with pytest.raises((InvalidRequestError, ModelError), match="rows"):
        client.model("fake/batch").filtered.map_blocks(chunked(x, 30)).compute()


def test_a_closed_client_says_so(server):
    with nos.connect(server.address, token_file=server.token_file) as other:
        blocks = other.model("fake/batch").map_blocks(chunked(rows(10), 5))
    with pytest.raises(StreamClosedError):
        blocks.compute()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda it: it.map_blocks(rows(3)), r"array: expected a dask.array.Array, got ndarray"),
        (lambda it: it.map_blocks(chunked(rows(3).astype(float), 2)), "expected float32.*float64"),
        (lambda it: it.map_blocks(chunked(rows(3).reshape(3, 2, 2), 2)), "what a row is"),
        (lambda it: it.map_blocks(da.asarray(np.float32(1))), "no rows"),
        (lambda it: it.map_blocks(chunked(rows(3), 2), rows=-1), "expected 0 or more, got -1"),
        (lambda it: it.seen.map_blocks(chunked(rows(3), 2)), "takes nothing"),
        (lambda it: it.map_bag([1]), "bag: expected a dask.bag.Bag, got list"),
        (lambda it: it.map_partitions(rows(3), column="a"), "got ndarray"),
        (lambda it: it.map_partitions(frame(), column="z"), "column: expected one of a, got 'z'"),
        (lambda it: it.map_blocks(chunked(rows(3, width=5), 2)).compute(), r"got \(\d, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(client, call, said):
    with pytest.raises(InvalidRequestError, match=said):
        call(client.model("fake/batch"))


def frame():
    return dd.from_pandas(pd.DataFrame({"a": [1.0]}), npartitions=1)


def test_the_example_of_the_documentation_runs(server):
    text = (ROOT / "docs" / "bulk.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    with nos.connect(server.address, token_file=server.token_file) as client:
        names = {"client": client}
        exec(compile(code, "bulk.md", "exec"), names)
    assert names["accuracy"].compute is not None
