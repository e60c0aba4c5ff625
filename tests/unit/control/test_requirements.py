"""Packages that models may ask for."""

from __future__ import annotations

import pytest
from nos.errors import InvalidRequestError
from nos_backend.control.requirements import MAX_REQUIREMENTS, normalize


def test_the_same_packages_are_written_one_way() -> None:
    lines = ["# for images", "", "Opencv_Python-Headless == 4.*  # no GUI", "einops", "einops"]
    assert normalize(lines) == ["einops", "opencv-python-headless==4.*"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--index-url http://evil", "no option of an installer"),
        ("-r other.txt", "no option of an installer"),
        ("evil @ https://evil/evil.whl", "the server knows where packages come from"),
        ("./evil", "a package as in"),
        ("two words", "a package as in"),
        ("x" * 201, "at most 200 characters"),
    ],
)
def test_what_is_no_package_is_named(line: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        normalize([line])
    assert caught.value.field == "env"


def test_too_many_packages_are_refused() -> None:
    lines = [f"package{number}" for number in range(MAX_REQUIREMENTS)]
    assert len(normalize(lines)) == MAX_REQUIREMENTS
    with pytest.raises(InvalidRequestError, match="at most 100 packages"):
        normalize([*lines, "one-more"])
