"""Networks that take their tensors from a file: what their constructor makes of it, or refused, and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nos_backend.executor import meta
from torch import nn


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x.long().clamp(0, 19)))  # type: ignore[no-any-return]


class Buffers(nn.Module):
    """Has numbers that its file does not hold, and some that its constructor reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("angles", torch.arange(8) / math.pi, persistent=False)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.5, 4)]
        self.table = torch.eye(8)
        one = nn.Parameter(torch.ones(8))
        self.one, self.other = one, one
        self.fixed = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = self.get_buffer("angles")
        found: torch.Tensor = self.norm(x) @ self.table + angles * self.rates[2] * self.one
        return found + self.other + self.fixed


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LSTM(8, 8, num_layers=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)[0]  # type: ignore[no-any-return]


def make_transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)


def changed(net: nn.Module) -> dict[str, torch.Tensor]:
    """Other weights than the constructor's, as a file has them: each tensor by itself."""
    return {
        name: tensor.detach().clone() + 1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in net.state_dict().items()
    }


@pytest.mark.parametrize("make", [Tied, Buffers, Recurrent, make_transformer])
def test_a_network_is_what_its_constructor_and_its_file_make(make: Callable[[], nn.Module]) -> None:
    expected, weights = make(), changed(make())
    expected.load_state_dict(weights)
    made = meta.construct(make, weights)
    x = torch.rand(4, 8)
    with torch.inference_mode():
        assert torch.equal(made.eval()(x), expected.eval()(x))
    of_file = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}
    assert {it.untyped_storage().data_ptr() for it in made.parameters()} <= of_file, "no copy"
    grads = [[it.requires_grad for it in net.parameters()] for net in (made, expected)]
    assert grads[0] == grads[1]


def test_shared_parameters_stay_one() -> None:
    made = meta.construct(Tied, changed(Tied()))
    assert isinstance(made, Tied)
    assert made.head.weight is made.embed.weight
    both = meta.construct(Buffers, changed(Buffers()))
    assert both.one is both.other


class Reads(Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.scale = float(self.one.sum())


class Derives(Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.inverse = 1 / self.one.detach()


class Remembers(Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.place = self.one.device


class Keeps(Buffers):
    """A change of its weight is one of `kept`, and a change of a copy is not."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(8)
        self.two = nn.Parameter(self.kept)


class KeepsBuffer(Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.means = [self.norm.running_mean]


class Closed(Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.later = lambda: 1


class Moves(Buffers):
    def __init__(self) -> None:
        super().__init__()
        self.to("cpu")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Reads, "reads its parameters"),
        (Derives, "derives something from its parameters"),
        (Remembers, "derives something from its parameters"),
        (Keeps, "in a second place"),
        (KeepsBuffer, "in a second place"),
        (Closed, "cannot be looked through"),
        (Moves, "reads its parameters"),
        (lambda: nn.LazyLinear(3), "of its own kind"),
    ],
)
def test_what_could_turn_out_otherwise_is_refused(make: Callable[[], Any], why: str) -> None:
    with pytest.raises(meta.UnfitError, match=why):
        meta.construct(make, changed(Buffers()) if make is not Keeps else changed(Keeps()))


def test_a_file_of_another_network_is_refused() -> None:
    for change in (
        {"one": torch.ones(9)},
        {"one": torch.ones(8).double()},
        {"more": torch.ones(1)},
    ):
        with pytest.raises(meta.UnfitError, match="other tensors"):
            meta.construct(Buffers, {**changed(Buffers()), **change})
    with pytest.raises(meta.UnfitError, match="other values for one"):
        meta.construct(Buffers, {**changed(Buffers()), "other": torch.zeros(8)})


def test_modules_made_afterwards_are_real() -> None:
    with pytest.raises(meta.UnfitError):
        meta.construct(Reads, {})
    assert not nn.Linear(2, 2).weight.is_meta
