"""A run of weights on a device: loading brings the host copy's bytes, eviction loses nothing."""

import faulthandler
import fcntl
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from nos_backend.executor import devices, residence
from nos_backend.executor.host_memory import host_memory_bytes

from tests.fakes.device import FakeDevice

SIZE = (1 << 20) - 100


@pytest.fixture
def host():
    fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
    os.write(fd, bytes(range(256)) * 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield fd
    os.close(fd)


@pytest.fixture(params=["cpu", "fake", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "fake":
        return FakeDevice(capacity_bytes=4 << 20)
    if request.param.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return devices.open_device(request.param)


@pytest.fixture
def run(device, host):
    run = device.reside(host, SIZE)
    yield run
    run.close()


def test_bytes_are_the_same_after_any_number_of_evictions(run):
    view = run.flat[256:512]
    for _ in range(20):
        run.load()
        assert torch.equal(view.cpu(), torch.arange(256, dtype=torch.uint8))
        run.evict()


def test_tensors_stay_bound_over_an_eviction(run):
    run.load()
    weight = run.flat[:16].view(torch.float32)
    before = weight.cpu().clone()
    run.evict()
    run.load()
    assert torch.equal(weight.cpu(), before)


def test_what_the_model_writes_never_reaches_the_host_copy(run, host):
    run.load()
    run.flat[:4] = 9
    assert os.pread(host, 4, 0) == bytes(range(4))
    run.evict()
    assert os.pread(host, 4, 0) == bytes(range(4))


def test_what_was_written_is_there_again_where_a_run_says_that_it_keeps_it(run):
    run.load()
    run.flat[8:16] += 1
    run.evict()
    run.load()
    kept = 1 if run.keeps_writes else 0
    assert run.flat[8:16].tolist() == list(range(8 + kept, 16 + kept))


def test_a_loaded_run_takes_its_room_and_gives_it_back(device, host):
    before = device.room_bytes()
    assert before > SIZE
    run = device.reside(host, SIZE)
    run.load()
    taken = before - device.room_bytes()
    run.close()
    if device.name != "cpu":  # the CPU maps what is there already, and the machine has other users
        assert taken >= SIZE
        assert device.room_bytes() == before


def test_two_runs_do_not_see_each_other(device, run, host):
    other = device.reside(host, SIZE)
    other.load()
    run.load()
    run.flat.zero_()
    assert other.flat[1] == 1
    other.close()


def test_a_closed_run_on_the_cpu_holds_no_memory():
    size = 64 << 20
    fd = os.memfd_create("big")
    os.ftruncate(fd, size)
    run = residence.CpuResidence(fd, size)
    run.load()
    run.flat.add_(1)
    run.evict()
    before = resident_bytes()
    run.close()
    assert before - resident_bytes() > size // 2
    os.close(fd)


def test_an_evicted_run_on_the_cpu_cannot_be_read_by_mistake(host):
    pid = os.fork()
    if not pid:
        faulthandler.disable()
        run = residence.CpuResidence(host, SIZE)
        run.load()
        run.evict()
        run.flat[0].item()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGSEGV


def test_the_fake_device_runs_out_and_fragments(host):
    device = FakeDevice(capacity_bytes=3 * SIZE)
    first, second, third = (device.reside(host, SIZE) for _ in range(3))
    for run in (first, second, third):
        run.load()
    first.evict()
    third.evict()
    large = device.reside(host, SIZE + 50)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        large.load()
    assert not large.is_loaded


def test_the_fake_device_fails_by_its_script(host):
    device = FakeDevice(
        capacity_bytes=1 << 30, script={("load", 2): RuntimeError("CUDA error: gone")}
    )
    run = device.reside(host, SIZE)
    run.load()
    run.evict()
    with pytest.raises(RuntimeError, match="gone"):
        run.load()


OOM, STICKY, OTHER = (True, False), (False, True), (False, False)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OOM),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            OOM,
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            OOM,
        ),
        (MemoryError(), OOM),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), STICKY),
        (RuntimeError("CUDA error: device-side assert triggered"), STICKY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), STICKY),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"), OTHER),
        (ValueError("CUDA error in the text of a model's own error"), OTHER),
    ],
)
def test_errors_are_told_apart(error, meaning):
    assert (devices.is_out_of_memory(error), devices.is_sticky(error)) == meaning


def test_host_memory_is_what_the_machine_can_give():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host_memory_bytes() <= total


def test_an_unknown_device_is_refused_by_name():
    with pytest.raises(ValueError, match="meta"):
        devices.open_device("meta")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
