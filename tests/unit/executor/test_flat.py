"""Weights packed into one run of bytes and bound again are the same weights."""

import json

import pytest
import torch
from nos_backend.executor import flat
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(6)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.gain = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.register_buffer("none", None)

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens)))


def pack(model):
    plan = flat.make_plan(model)
    run = torch.zeros(plan.size_bytes, dtype=torch.uint8)
    flat.pack(plan, model, run)
    return plan, run


@torch.inference_mode()
def test_a_twin_bound_to_the_run_answers_alike():
    model, twin = Tied().eval(), Tied().eval()
    tokens = torch.arange(10)
    plan, run = pack(model)
    flat.bind(plan, twin, run)
    assert torch.equal(twin(tokens), model(tokens))
    assert torch.equal(twin.gain, model.gain)


def test_tied_weights_share_a_slot():
    model = Tied()
    plan, run = pack(model)
    flat.bind(plan, model, run)
    assert model.head.weight is model.embed.weight
    offsets = {
        slot.offset_bytes for slot in plan.slots if slot.name == "weight" and slot.owner != "norm"
    }
    assert len(offsets) == 2


def test_strides_are_kept():
    model = Tied()
    plan, run = pack(model)
    stride = model.conv.weight.stride()
    flat.bind(plan, model, run)
    assert model.conv.weight.stride() == stride
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_meta_twin_needs_no_construction():
    model = Tied().eval()
    plan, run = pack(model)
    with torch.device("meta"):
        twin = Tied().eval()
    flat.bind(plan, twin, run)
    assert torch.equal(twin(torch.arange(10)), model(torch.arange(10)))


def test_the_run_is_hardly_larger_than_the_weights():
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    plan = flat.make_plan(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights <= plan.size_bytes <= 1.02 * weights


def test_a_view_of_a_huge_tensor_brings_only_its_part():
    table = torch.randn(1000, 64)
    model = nn.Module()
    model.row = nn.Parameter(table[500:502])
    plan, run = pack(model)
    assert plan.size_bytes < 2000
    expected = table[500:502].clone()
    flat.bind(plan, model, run)
    assert torch.equal(model.row, expected)


def test_plain_objects_with_modules_and_tensors_are_flattened():
    class Model:
        def __init__(self):
            self.net = nn.Linear(3, 3)
            self.table = torch.arange(4.0)

    model = Model()
    plan, run = pack(model)
    flat.bind(plan, model, run)
    run.zero_()
    assert model.table.sum() == 0
    assert model.net.weight.abs().sum() == 0


def test_weights_without_padding_between_them_are_packed_right():
    model, twin = (
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64)) for _ in range(2)
    )
    model.register_buffer("empty", torch.zeros(8)[:0])
    twin.register_buffer("empty", torch.zeros(8)[:0])
    plan, run = pack(model)
    flat.bind(plan, twin, run)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_plan_survives_json():
    plan = flat.make_plan(Tied())
    assert flat.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [(torch.eye(3).to_sparse(), "sparse"), (torch.ones(2, dtype=torch.cfloat).conj(), "conj")],
)
def test_what_cannot_be_flattened_is_named(tensor, reason):
    model = nn.Module()
    model.register_buffer("odd", tensor)
    plan = flat.make_plan(model)
    assert not plan.slots
    assert plan.loose[0].startswith("odd: ")
    assert reason in plan.loose[0]
