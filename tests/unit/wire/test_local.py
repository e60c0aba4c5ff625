from __future__ import annotations

import os
import subprocess
import sys

import pytest
from nos.wire import local


def record(pid: int, ticks: int = 0) -> local.BackendRecord:
    return local.BackendRecord(address="127.0.0.1:1", pid=pid, token_file="/t", start_ticks=ticks)


def test_a_record_of_a_living_process_is_read_back(tmp_path):
    written = record(os.getpid(), local.start_ticks(os.getpid()))
    local.write_backend(tmp_path, written)
    assert local.read_backend(tmp_path) == written
    assert (tmp_path / local.RECORD_NAME).stat().st_mode & 0o777 == 0o600
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"unknown": 1}'])
def test_a_damaged_record_is_no_record(tmp_path, text):
    (tmp_path / local.RECORD_NAME).write_text(text)
    assert local.read_backend(tmp_path) is None


def test_a_dead_process_and_a_zombie_are_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    local.write_backend(tmp_path, record(process.pid))
    assert local.read_backend(tmp_path) is None, "a zombie"
    process.communicate()
    assert local.read_backend(tmp_path) is None, "reaped"


def test_another_process_under_the_old_number_is_not_taken_for_it(tmp_path):
    local.write_backend(tmp_path, record(os.getpid(), local.start_ticks(os.getpid()) + 1))
    assert local.read_backend(tmp_path) is None


def test_only_its_own_record_is_removed(tmp_path):
    local.write_backend(tmp_path, record(os.getpid()))
    local.remove_backend(tmp_path, 1)
    assert local.read_backend(tmp_path) is not None
    local.remove_backend(tmp_path, os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_lock_is_held_once(tmp_path):
    with (
        local.lock(tmp_path / "new", "serve"),
        pytest.raises(BlockingIOError),
        local.lock(tmp_path / "new", "serve", wait=False),
    ):
        pass
    with local.lock(tmp_path / "new", "serve", wait=False):
        pass


def test_the_state_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("NOS_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert local.state_dir() == tmp_path / "nos"
    monkeypatch.setenv("NOS_STATE_DIR", str(tmp_path / "own"))
    assert local.state_dir() == tmp_path / "own"
