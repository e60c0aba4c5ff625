"""The bytes and FLOPs of a forward pass are known before it runs."""

import pytest
import torch
from nos_backend.executor import footprint
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

BATCHES = (1, 2, 8, 32, 64)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(x + self.bn(self.b(torch.relu(self.a(x)))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(q @ k.transpose(-1, -2), -1) @ v


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 16, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1)

    def forward(self, x):
        return self.up(functional.gelu(self.down(x)))


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)), (256,)),
    "deep mlp": (lambda: nn.Sequential(*(nn.Linear(128, 128) for _ in range(10))), (128,)),
    "wide mlp": (lambda: nn.Sequential(nn.Linear(64, 8192), nn.Tanh(), nn.Linear(8192, 4)), (64,)),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        (3, 32, 32),
    ),
    "pooled cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * 196, 10)
        ),
        (3, 32, 32),
    ),
    "residual": (Residual, (8, 24, 24)),
    "two residuals": (lambda: nn.Sequential(Residual(), Residual()), (8, 24, 24)),
    "normalised": (
        lambda: nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 512), nn.GELU()),
        (512,),
    ),
    "attention": (Attention, (32, 64)),
    "convolved sequence": (
        lambda: nn.Sequential(nn.Conv1d(4, 64, 7), nn.SiLU(), nn.Conv1d(64, 4, 7)),
        (4, 200),
    ),
    "autoencoder": (Autoencoder, (3, 32, 32)),
    "bilinear": (
        lambda: nn.Sequential(nn.Linear(100, 300), nn.Softmax(-1), nn.Linear(300, 100)),
        (100,),
    ),
}


def profiled_peak(net, x):
    """The truth, from torch's own allocation events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        torch.no_grad(),
    ):
        result = net(x)
        del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.accept("B6")
@pytest.mark.parametrize("name", NETS)
@pytest.mark.filterwarnings("ignore:.*profiler.*")
def test_the_predicted_peak_is_the_real_one(name):
    make, shape = NETS[name]
    net = make().eval()
    for batch in BATCHES:
        prediction = footprint.predict(net, net, [torch.zeros(batch, *shape)], batch)
        truth = profiled_peak(net, torch.zeros(batch, *shape))
        assert abs(prediction.peak_bytes - truth) <= max(0.05 * truth, 16 << 20)
        # What a convolution allocates inside itself is seen by the profiler alone.
        floor = 0.5 if any("Conv" in use.kind for use in prediction.modules) else 0.99
        if truth > 1 << 20:
            assert prediction.peak_bytes >= floor * truth


@pytest.mark.accept("B6")
@pytest.mark.parametrize("batch", BATCHES)
def test_flops_of_an_mlp_are_the_analytic_count(batch):
    net = NETS["mlp"][0]()
    prediction = footprint.predict(net, net, [torch.zeros(batch, 256)], batch)
    assert prediction.flops == 2 * batch * (256 * 512 + 512 * 10)


def test_prediction_equals_measurement_on_real_tensors():
    net = Residual().eval()
    x = torch.randn(16, 8, 24, 24)
    predicted = footprint.predict(net, net, [x], 16)
    measured = footprint.measure(net, net, [x], 16)
    assert predicted.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.01)
    assert predicted.flops == measured.flops
    assert [use.path for use in predicted.modules] == [use.path for use in measured.modules]


def test_weights_are_the_same_objects_after_a_prediction():
    net = Residual().eval()
    before = {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()}
    footprint.predict(net, net, [torch.zeros(4, 8, 24, 24)], 4)
    assert {name: id(tensor) for name, tensor in net.state_dict(keep_vars=True).items()} == before


def test_the_breakdown_names_the_hungry_module():
    net = nn.Sequential(nn.Linear(64, 8192), nn.Tanh(), nn.Linear(8192, 4))
    prediction = footprint.predict(net, net, [torch.zeros(32, 64)], 32)
    uses = {use.path: use for use in prediction.modules}
    assert uses["0"].activation_bytes == 32 * 8192 * 4
    assert uses["0"].weight_bytes == (64 * 8192 + 8192) * 4
    assert uses["2"].activation_bytes == 512


def test_a_method_of_a_plain_object_is_predicted():
    class Model:
        def __init__(self):
            self.net = nn.Linear(16, 1024)

        def embed(self, x):
            return self.net(x)

    model = Model()
    prediction = footprint.predict(model, model.embed, [torch.zeros(8, 16)], 8)
    assert prediction.peak_bytes == 8 * 1024 * 4
    assert [use.path for use in prediction.modules] == ["net"]


def test_code_that_looks_at_values_cannot_be_predicted_and_keeps_its_weights():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x):
            return self.net(x) if self.net(x).sum() > 0 else x

    net = Looks()
    with pytest.raises(RuntimeError, match="meta"):
        footprint.predict(net, net, [torch.zeros(1, 4)], 1)
    assert net.net.weight.device.type == "cpu"
    assert footprint.measure(net, net, [torch.zeros(1, 4)], 1).peak_bytes > 0


def test_flops_are_counted_as_torch_counts_them_also_in_inference_mode():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    assert footprint.measure(net, torch.inference_mode()(net), [x], 4).flops == (
        counter.get_total_flops()
    )
