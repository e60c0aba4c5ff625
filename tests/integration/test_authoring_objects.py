"""Functions, networks with weights, pickles, files and folders become served models."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from nos.errors import InvalidRequestError, LoadError, ModelNotFoundError
from torch import nn

SHIFT = 3


def shift(x: int, *, by: int = SHIFT) -> int:
    """Add to a number."""
    return x + by


class Net(nn.Module):
    """Two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, width)
        self.outer = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x).relu())


def expected(net, rows):
    with torch.no_grad():
        return net(torch.from_numpy(rows)).numpy()


ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.mark.accept("F2")
def test_function_is_served(client):
    client.register(shift, name="objects/shift")
    model = client.model("objects/shift")
    assert (model(4), model(4, by=1)) == (7, 5)


@pytest.mark.accept("F2")
def test_network_with_weights_is_served_as_its_class_and_state(client):
    net = Net(8)
    made = client.register(net, name="objects/net", init={"width": 8})
    np.testing.assert_allclose(client.model("objects/net")(ROWS), expected(net, ROWS), rtol=1e-5)
    assert made.spec.doc == "Two layers."
    with torch.no_grad():
        net.outer.bias += 1
    assert client.register(net, name="objects/net", init={"width": 8}).version == 2
    np.testing.assert_allclose(client.model("objects/net")(ROWS), expected(net, ROWS), rtol=1e-5)


@pytest.mark.accept("F2")
@pytest.mark.timeout(300)  # torch.export takes a while on a busy machine
def test_network_with_an_example_is_served_as_an_exported_program(client):
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    made = client.register(net, name="objects/program", example=torch.ones(1, 4))
    assert made.collected == ("an exported program",)
    (method,) = made.spec.methods
    assert method.parameters[0].annotation == "Annotated[torch.Tensor, 'float32[batch, 4]']"
    np.testing.assert_allclose(
        client.model("objects/program")(ROWS), expected(net, ROWS), rtol=1e-5
    )


def test_network_of_a_library_is_served_by_its_import(client):
    net = nn.Linear(4, 2)
    client.register(net, name="objects/linear", init={"in_features": 4, "out_features": 2})
    np.testing.assert_allclose(client.model("objects/linear")(ROWS), expected(net, ROWS), rtol=1e-5)


def test_network_that_needs_arguments_says_which_and_the_ways_out(client):
    with pytest.raises(InvalidRequestError) as raised:
        client.register(Net(8), name="objects/needs")
    for part in ("'width'", "init=", "example=", "pickle=True"):
        assert part in str(raised.value)


def test_weights_of_another_width_are_refused(client):
    with pytest.raises(LoadError, match="not those of this class"):
        client.register(Net(8), name="objects/other", init={"width": 9})


class Counter:
    """Holds what has no source."""

    def __init__(self, words: dict[str, int]) -> None:
        self.total = lambda: sum(words.values())

    def __call__(self, x: int = 1) -> int:
        return x * self.total()


@pytest.mark.accept("F2")
def test_pickled_object_is_served_where_its_author_asks(client):
    client.register(Counter({"a": 2, "b": 3}), name="objects/counter", pickle=True)
    assert client.model("objects/counter")(2) == 10
    with pytest.raises(InvalidRequestError, match="a class, a function, text or a path"):
        client.register(Counter({}), name="objects/counter")


def test_pickle_of_another_python_is_refused_before_it_is_opened(client, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys, "version_info", (3, 8, 0))
        with pytest.raises(LoadError, match=r"pickled by Python 3\.8"):
            client.register(Counter({}), name="objects/old", pickle=True)


class Scaled:
    def __init__(self, by: np.ndarray, bias: torch.Tensor, names: list[str]) -> None:
        by += 0
        self.by, self.bias, self.names = by, bias, names

    def __call__(self, x: np.ndarray):
        return x * self.by, self.bias, self.names


def test_init_arguments_are_arrays_tensors_and_plain_values(client):
    init = {"by": np.array([2.0, 3.0]), "bias": torch.full((2,), 7), "names": ["a", "b"]}
    client.register(Scaled, name="objects/scaled", init=init)
    scaled, bias, names = client.model("objects/scaled")(np.ones(2))
    assert scaled.tolist() == [2.0, 3.0]
    assert bias.tolist() == [7, 7]
    assert names == ["a", "b"]
    assert client.register(Scaled, name="objects/scaled", init=init).version == 1
    assert (
        client.register(Scaled, name="objects/scaled", init={**init, "by": np.ones(2)}).version == 2
    )


MODEL = """
from pathlib import Path
from net.layers import SIZE

class Sized:
    def __call__(self) -> str:
        return f"{SIZE} {Path(__file__).with_name('words.txt').read_text()}"
"""


@pytest.mark.accept("F2")
def test_folder_and_file_are_served(client, tmp_path):
    folder = tmp_path / "sized"
    (folder / "net").mkdir(parents=True)
    (folder / "net" / "layers.py").write_text("SIZE = 3")
    (folder / "words.txt").write_text("words")
    (folder / "model.py").write_text(MODEL)
    made = client.register(folder, name="objects/folder")
    assert client.model("objects/folder")() == "3 words"
    assert made.collected == ("file model.py", "file net/layers.py", "file words.txt")
    file = tmp_path / "plain.py"
    file.write_text("def double(x: int) -> int:\n    return 2 * x\n")
    client.register(file, name="objects/file")
    assert client.model("objects/file")(4) == 8


class Picky:
    def __init__(self, ways: int) -> None:
        if ways < 1:
            raise ValueError(f"{ways} ways are too few")

    def __call__(self, x: np.ndarray) -> float:
        return float(x[3])


def test_constructor_that_fails_is_told_at_once_and_nothing_is_registered(client):
    with pytest.raises(LoadError, match="0 ways are too few") as raised:
        client.register(Picky, name="objects/picky", init={"ways": 0})
    assert f'{__file__}", line ' in str(raised.value)
    assert "raise ValueError" in str(raised.value)
    with pytest.raises(ModelNotFoundError):
        client.info("objects/picky")
    client.register(Picky, name="objects/picky", init={"ways": 0}, check=False)
    assert client.info("objects/picky").state == "registered"


def test_example_is_called_before_a_model_is_accepted(client):
    with pytest.raises(LoadError, match="index 3 is out of bounds"):
        client.register(Picky, name="objects/tried", init={"ways": 1}, example=np.ones(3))
    with pytest.raises(InvalidRequestError, match="x"):
        client.register(Picky, name="objects/tried", init={"ways": 1}, example={"y": 1})
    client.register(Picky, name="objects/tried", init={"ways": 1}, example=np.ones(4))
    info = client.info("objects/tried")
    assert (info.version, info.state) == (1, "registered")


def test_constructor_that_ends_its_process_is_told_at_once(client):
    source = "import os\nclass Ender:\n    def __init__(self): os._exit(3)\n    def f(self): ..."
    with pytest.raises(LoadError, match="ended its executor when it was tried"):
        client.register(source, name="objects/ender")
