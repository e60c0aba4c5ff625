"""What environments are called and how large they are."""

from __future__ import annotations

from pathlib import Path

from nos_backend.worker.environments import name_of, size_bytes


def test_the_name_is_that_of_the_packages() -> None:
    assert name_of(["a", "b"]) == name_of(["a", "b"])
    assert name_of(["a", "b"]) != name_of(["a"])


def test_links_count_for_themselves(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    (tmp_path / "link").symlink_to("/usr")
    assert 100 <= size_bytes(tmp_path) < 200
