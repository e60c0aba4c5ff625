"""NVML of a machine whose CUDA devices are the lines of the file that `FAKE_NVML` names."""

import os
from pathlib import Path
from types import SimpleNamespace


class NVMLError(Exception):
    """As NVML's own."""


def nvmlInit():
    pass


def nvmlShutdown():
    pass


def nvmlDeviceGetCount():
    return len(Path(os.environ["FAKE_NVML"]).read_text().split())


def nvmlDeviceGetHandleByIndex(index):
    if index >= nvmlDeviceGetCount():
        raise NVMLError("not found")
    return index


def nvmlDeviceGetName(handle):
    return Path(os.environ["FAKE_NVML"]).read_text().split()[handle]


def nvmlDeviceGetMemoryInfo(handle):
    return SimpleNamespace(total=1 << 30, free=1 << 30)
