from __future__ import annotations

import pytest
from nos.errors import ConfigError
from nos_backend.cluster.device import WorkerSettings, describe_device, find_devices
from nos_backend.roster import share

HIDDEN = {"CUDA_VISIBLE_DEVICES": ""}


def test_worker_settings_survive_the_environment():
    settings = WorkerSettings(device="cuda:1", capacity_bytes=5, host="h", ready_file="/r")
    assert WorkerSettings.from_environ(settings.to_environ()) == settings
    assert WorkerSettings.from_environ(WorkerSettings().to_environ()) == WorkerSettings()


def test_a_capacity_that_is_no_number_is_named():
    with pytest.raises(
        ConfigError, match="bad NOS_WORKER_CAPACITY_BYTES: expected a number of bytes, got 'much'"
    ):
        WorkerSettings.from_environ({"NOS_WORKER_CAPACITY_BYTES": "much"})


def test_a_machine_without_visible_cuda_devices_has_its_processor():
    assert find_devices(HIDDEN) == ["cpu"]
    device = describe_device("auto", HIDDEN)
    assert device.name == "cpu"
    assert device.memory_bytes > 1 << 28


def test_an_unknown_device_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="auto or one of cpu, got 'cuda:7'"):
        describe_device("cuda:7", HIDDEN)


def test_more_workers_than_devices_share_them():
    assert share(["cuda:0", "cuda:1"], 2) == {"cuda-0": "cuda:0", "cuda-1": "cuda:1"}
    assert list(share(["cuda:0", "cuda:1"], 3).items()) == [
        ("cuda-0", "cuda:0"),
        ("cuda-1", "cuda:1"),
        ("cuda-0-1", "cuda:0"),
        ("cuda-1-1", "cuda:1"),
    ]
    with pytest.raises(ConfigError, match="at most 8, got 9"):
        share(["cuda:0"], 9)
