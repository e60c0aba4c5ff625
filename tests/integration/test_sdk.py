"""Both clients against a server: the same promises for threads and asyncio, on the fake and the real one."""

import asyncio
import hashlib
import inspect
import io
import socket
import threading
import time

import nos
import numpy as np
import pytest
import pytest_asyncio
from nos import errors
from nos.types import Media
from PIL import Image

from tests.fakes.server import NAME, SOURCE, TOKEN, FakeServer
from tests.servers import wait_for

pytestmark = pytest.mark.asyncio


async def settle(value):
    """Return what a call of either client gives."""
    return await value if inspect.isawaitable(value) else value


async def collect(items):
    """Return what an iteration of either client gives."""
    if hasattr(items, "__aiter__"):
        return [item async for item in items]
    return list(items)


class _Opened:
    """Opens either client's streams and feeds in an `async with`."""

    def __init__(self, opened):
        self.opened = opened

    async def __aenter__(self):
        return self.opened

    async def __aexit__(self, *_):
        await settle(self.opened.close())


@pytest.fixture
def fake():
    running = FakeServer()
    yield running
    running.stop()


@pytest.fixture(params=["fake", "real"])
def place(request):
    """Address and token of a server that has the contract's model."""
    if request.param == "fake":
        fake = request.getfixturevalue("fake")
        return fake.address, TOKEN
    server = request.getfixturevalue("server")
    with nos.connect(server.address, token_file=server.token_file) as client:
        client.register(SOURCE, name=NAME, class_name="Contract")
    return server.address, server.token


async def open_client(kind, address, **options):
    options.setdefault("token", TOKEN)
    connect = nos.connect if kind == "threads" else nos.AsyncClient.connect
    return await settle(connect(address, **options))


@pytest.fixture(params=["threads", "asyncio"])
def kind(request):
    return request.param


@pytest_asyncio.fixture
async def client(kind, place):
    connected = await open_client(kind, place[0], token=place[1])
    yield connected
    await settle(connected.close())


@pytest_asyncio.fixture
async def model(client):
    return await settle(client.model(NAME))


@pytest_asyncio.fixture
async def fake_client(kind, fake):
    connected = await open_client(kind, fake.address)
    yield connected
    await settle(connected.close())


async def test_status_says_where_the_address_came_from(client):
    status = await settle(client.status())
    assert status.state == "ready"
    assert status.source == "argument"
    assert status.workers[0].device.name == "cpu"


async def test_models_are_listed_and_described(client):
    names = [info.name for info in await settle(client.models())]
    assert NAME in names
    assert len(await settle(client.models("no such"))) == 0
    info = await settle(client.info(NAME))
    assert info.spec.doc.startswith("Does what a test")


async def test_unknown_model_is_named(client):
    with pytest.raises(errors.ModelNotFoundError, match="no/such"):
        await settle(client.model("no/such"))


async def test_handle_shows_the_methods_of_the_model(model):
    assert {"add", "count", "rows"} <= set(dir(model))
    assert str(inspect.signature(model.add)) == "(a: int, b: int = 2) -> int"
    assert model.add.__doc__ == "Add two numbers."
    assert "float32 tensor of shape (batch, 3)" in repr(model)
    assert "Count rows" in model._repr_html_()


async def test_names_with_an_underscore_are_never_the_models(model):
    with pytest.raises(AttributeError):
        model._secret  # noqa: B018


async def test_unknown_method_lists_those_there_are(model):
    with pytest.raises(errors.MethodNotFoundError, match=r"nope.*rows"):
        model.nope  # noqa: B018


async def test_values_come_back_as_they_went(model):
    tree = {"a": [1, 2.5, "x", None, True], "t": (b"raw", np.arange(3))}
    back = await settle(model(tree))
    assert back["a"] == tree["a"]
    assert back["t"][0] == b"raw"
    np.testing.assert_array_equal(back["t"][1], np.arange(3))


async def test_results_are_the_callers_own_writable_memory(model):
    array = np.zeros(5, np.float32)
    back = await settle(model(array))
    back[0] = 1
    assert array[0] == 0


async def test_frames_above_a_mebibyte_come_back_whole(model):
    array = np.random.default_rng(0).integers(0, 255, 5_000_000, dtype=np.uint8)
    np.testing.assert_array_equal(await settle(model(array)), array)


async def test_methods_take_arguments_by_position_and_name(model):
    assert await settle(model.add(1)) == 3
    assert await settle(model.add(1, b=5)) == 6
    assert await settle(model.digest(b"abc")) == hashlib.sha256(b"abc").hexdigest()


async def test_method_hidden_by_the_handle_is_in_methods(model):
    assert await settle(model.methods["load"]()) == "loaded"


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda model: model.add(), errors.InvalidRequestError, "misses 'a'"),
        (lambda model: model.add(1, c=2), errors.InvalidRequestError, "no parameter 'c'"),
        (lambda model: model.rows(np.zeros((2, 3))), errors.InvalidTensorError, "float64"),
        (lambda model: model.rows(np.zeros((2, 4), "f")), errors.InvalidTensorError, r"\(2, 4\)"),
        (lambda model: model(object()), errors.InvalidRequestError, "no wire form"),
        (lambda model: model(np.array([{}])), errors.InvalidTensorError, "object"),
        (lambda model: model.add(1, timeout_s=-1), errors.InvalidRequestError, "time limit"),
    ],
)
async def test_wrong_arguments_are_refused_here(fake, fake_client, call, error, text):
    model = await settle(fake_client.model(NAME))
    with pytest.raises(error, match=text):
        await settle(call(model))
    assert fake.num_frames == 0


async def test_what_the_model_raised_is_told(model):
    with pytest.raises(errors.ModelError, match="boo") as caught:
        await settle(model.fail("boo"))
    assert caught.value.type_name == "ValueError"
    assert "Traceback" in "".join(caught.value.__notes__)


async def test_generator_is_an_iteration(model):
    assert await collect(model.count(4)) == [0, 1, 2, 3]
    assert await collect(model.count(0)) == []


async def test_submitted_calls_have_futures(model):
    futures = [model.submit(value) for value in range(5)]
    values = [
        await asyncio.wrap_future(it) if not inspect.isawaitable(it) else await it for it in futures
    ]
    assert values == list(range(5))


async def test_map_keeps_the_order(model):
    assert await collect(model.map(range(100), max_in_flight=7)) == list(range(100))


async def test_map_ends_at_the_first_failure(model):
    with pytest.raises(errors.ModelError):
        await collect(model.map(["a", "b"], method="fail"))


async def test_stream_gives_a_result_for_each_frame_in_order(model):
    async with _Opened(model.stream("add")) as stream:
        for value in range(40):
            assert await settle(stream.send(value, b=1)) == value + 1
        results = await collect(stream)
    assert [result.seq for result in results] == list(range(1, 41))
    assert [result.value for result in results] == list(range(1, 41))
    assert all(result.timings.total_s > 0 for result in results)


async def test_a_failed_frame_does_not_end_its_stream(model):
    async with _Opened(model.stream("fail")) as stream:
        await settle(stream.send("one"))
        await settle(stream.send("two"))
        results = await collect(stream)
    assert [type(result.error) for result in results] == [errors.ModelError] * 2
    with pytest.raises(errors.ModelError):
        results[0].value  # noqa: B018


async def test_generator_frames_give_items_and_one_end(model):
    async with _Opened(model.stream("count")) as stream:
        await settle(stream.send(2))
        results = await collect(stream)
    assert [(result.value, result.more) for result in results] == [
        (0, True),
        (1, True),
        (None, False),
    ]


async def test_finished_stream_takes_no_frame(model):
    async with _Opened(model.stream()) as stream:
        await settle(stream.send(1))
        await settle(stream.finish())
        with pytest.raises(errors.StreamClosedError):
            await settle(stream.send(2))
        assert [result.value for result in await collect(stream)] == [1]


async def test_time_limit_ends_a_call(model):
    with pytest.raises(errors.DeadlineExceededError):
        await asyncio.wait_for(settle(model.wait(1.0, timeout_s=0.2)), 10)


async def test_time_limit_holds_where_the_server_ignores_it(fake, fake_client):
    fake.ignores_limits = True
    model = await settle(fake_client.model(NAME))
    with pytest.raises(errors.DeadlineExceededError, match=r"within 0\.1 s"):
        await settle(model.wait(20.0, timeout_s=0.1))
    await asyncio.to_thread(wait_for, lambda: fake.num_cancels == 1, "the cancel")


async def test_images_travel_encoded(model):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    back = await settle(model([Media.from_bytes(file.getvalue()), 1]))
    assert back[1] == 1


async def test_registered_class_can_be_called_and_forgotten(client):
    source = "class Twice:\n    def __call__(self, x: int) -> int:\n        return 2 * x\n"
    info = await settle(client.register(source, name=NAME, class_name="Twice"))
    assert info.name == NAME
    assert info.spec.methods[0].name == "__call__"


async def test_watch_tells_the_models_first(client):
    async with _Opened(client.watch()) as feed:
        if hasattr(feed, "__anext__"):
            change = await feed.__anext__()
        else:
            change = next(feed)
    assert change.model.name
    assert not change.is_deleted


async def test_events_bring_snapshots(client):
    async with _Opened(client.events(status_interval_s=0.1)) as feed:
        while True:
            event = await feed.__anext__() if hasattr(feed, "__anext__") else next(feed)
            if event.status is not None:
                break
    assert event.status.workers[0].device.capacity_bytes > 0


async def test_frames_go_straight_to_the_worker(client, model):
    await settle(model(1))
    status = await settle(client.status())
    [(key, way)] = [item for item in status.routes.items() if item[0].startswith(NAME)]
    assert key == model.spec.key
    assert way.startswith(("direct to", "through shared memory"))


async def test_relay_is_there_for_who_asks(kind, place):
    client = await open_client(kind, place[0], token=place[1], via="relay")
    model = await settle(client.model(NAME))
    assert await settle(model.add(1)) == 3
    status = await settle(client.status())
    assert list(status.routes.values()) == ["relayed by the gateway"]
    await settle(client.close())


async def test_worker_that_cannot_be_reached_is_relayed_to(kind, fake):
    fake.kill_worker()
    client = await open_client(kind, fake.address)
    model = await settle(client.model(NAME))
    assert await settle(model.add(1)) == 3
    assert fake.num_streams == {"gateway": 1, "worker": 0}
    await settle(client.close())


async def test_worker_that_never_answers_is_relayed_to(kind, fake, accept):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fake.worker_address = f"127.0.0.1:{silent.getsockname()[1]}"
        client = await open_client(kind, fake.address)
        model = await settle(client.model(NAME))
        begun_s = time.monotonic()
        assert await settle(model.add(1)) == 3
        accept.figure(time.monotonic() - begun_s, 3.0, "s until the first answer")
        begun_s = time.monotonic()
        async with _Opened(model.stream()) as stream:
            await settle(stream.send(1))
        accept.figure(time.monotonic() - begun_s, 1.0, "s for the next stream")
        await settle(client.close())


async def test_idle_stream_is_closed_and_the_next_call_opens_another(fake, fake_client):
    model = await settle(fake_client.model(NAME))
    await settle(model(1))
    [link] = fake_client._engine._all_links
    link.on_time(time.monotonic() + 61, lambda _: None)
    await asyncio.to_thread(wait_for, lambda: not fake_client._engine._all_links, "its end")
    assert await settle(model.add(1)) == 3
    assert fake.num_streams == {"gateway": 0, "worker": 2}


async def test_calls_share_one_stream(fake, fake_client):
    model = await settle(fake_client.model(NAME))
    again = await settle(fake_client.model(NAME))
    for _ in range(3):
        await settle(model(1))
        await settle(again.add(1))
    assert fake.num_streams == {"gateway": 0, "worker": 1}


async def test_draining_worker_loses_no_call(fake, fake_client):
    model = await settle(fake_client.model(NAME))
    await settle(model(1))
    fake.drain()
    assert [await settle(model.add(value)) for value in range(20)] == list(range(2, 22))
    wait_for(lambda: fake.num_streams["worker"] == 2, "the second stream")


async def test_ticket_is_renewed_within_the_stream(kind):
    fake = FakeServer(ticket_ttl_s=1.0)
    client = await open_client(kind, fake.address)
    model = await settle(client.model(NAME))
    async with _Opened(model.stream()) as stream:
        await settle(stream.send(1))
        await asyncio.to_thread(wait_for, lambda: fake.num_renewals >= 2, "two renewals")
    await settle(client.close())
    fake.stop()


@pytest.mark.accept("A6")
async def test_lost_worker_ends_every_frame_once(fake, fake_client, accept):
    model = await settle(fake_client.model(NAME))
    calls = [model.wait.submit(30.0) for _ in range(8)]
    wait_for(lambda: fake.num_frames == 8, "8 frames at the worker")
    begun_s = time.monotonic()
    await asyncio.to_thread(fake.kill_worker)
    for call in calls:
        with pytest.raises(errors.UnavailableError):
            await asyncio.wait_for(
                call if inspect.isawaitable(call) else asyncio.wrap_future(call), 10
            )
    accept.figure(time.monotonic() - begun_s, 2.0, "s until every frame had its error")
    assert await settle(model.add(1)) == 3, "the next call is relayed"


async def test_cancelled_call_is_withdrawn_at_the_server(fake, fake_client):
    model = await settle(fake_client.model(NAME))
    call = model.wait.submit(30.0)
    wait_for(lambda: fake.num_frames == 1, "the frame")
    assert call.cancel()
    await asyncio.sleep(0)
    await asyncio.to_thread(wait_for, lambda: fake.num_cancels == 1, "the cancel")
    assert await settle(model.add(1)) == 3


async def test_closed_client_says_so(fake, fake_client):
    model = await settle(fake_client.model(NAME))
    await settle(fake_client.close())
    with pytest.raises(errors.StreamClosedError):
        await settle(model(1))
    with pytest.raises(errors.StreamClosedError):
        await settle(fake_client.status())


@pytest.mark.accept("A11")
async def test_no_server_is_said_within_two_seconds(kind, accept):
    begun_s = time.monotonic()
    with pytest.raises(errors.UnavailableError, match=r"no server listens on .*nos serve"):
        await open_client(kind, "127.0.0.1:1")
    accept.figure(time.monotonic() - begun_s, 2.0, "s until told that no server listens")


@pytest.mark.parametrize("address", ["nonsense", "host:port", "host:0", "http://host:1", ""])
async def test_wrong_address_is_named(kind, address, monkeypatch, tmp_path):
    monkeypatch.setenv("NOS_STATE_DIR", str(tmp_path))
    with pytest.raises((errors.ConfigError, errors.UnavailableError), match=r"address|listens"):
        await open_client(kind, address)


@pytest.mark.parametrize("token", ["", "wrong"])
async def test_wrong_token_is_refused(kind, place, token):
    with pytest.raises(errors.UnauthenticatedError):
        await open_client(kind, place[0], token=token)


async def test_threads_may_share_a_client(place):
    client = nos.connect(place[0], token=place[1])
    model = client.model(NAME)
    failures = []

    def work(base):
        got = [model.add(base, b=value) for value in range(20)]
        if got != [base + value for value in range(20)]:
            failures.append(got)

    threads = [threading.Thread(target=work, args=(base * 100,)) for base in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    client.close()


async def test_one_thread_sends_while_another_receives(place):
    client = nos.connect(place[0], token=place[1])
    with client.model(NAME).stream(max_pending=4) as stream:

        def send():
            for value in range(50):
                stream.send(value)
            stream.finish()

        sender = threading.Thread(target=send)
        sender.start()
        assert [result.value for result in stream] == list(range(50))
        sender.join()
    client.close()


async def test_arrays_may_be_changed_once_submitted(fake, kind):
    fake.window_frames = 1
    client = await open_client(kind, fake.address)
    model = await settle(client.model(NAME))
    array = np.zeros(1000, np.uint8)
    calls = []
    for value in range(10):
        array[:] = value
        calls.append(model.submit(array))
    for value, call in enumerate(calls):
        back = await (call if inspect.isawaitable(call) else asyncio.wrap_future(call))
        assert (back == value).all()
    await settle(client.close())
