"""What models may ask of conda, and what comes of a file."""

from __future__ import annotations

import sys

import pytest
from nos.errors import InvalidRequestError
from nos.wire.environment import CONDA_FILE
from nos_backend.control.conda import MAX_FILE_CHARACTERS
from nos_backend.control.requirements import MAX_REQUIREMENTS, normalize

OURS = f"{sys.version_info.major}.{sys.version_info.minor}"
FILE = f"""
name: maps
channels: [bioconda, conda-forge, nodefaults]
dependencies:
  - python={OURS}
  - GDAL  >=3.8,<4
  - conda-forge::proj=9.3=*_0
  - pip:
      - Einops == 0.8.*
prefix: /home/ann/maps
"""
BOMB = "a: &a [x, x]\n" + "".join(
    f"{key}: &{key} [*{before}, *{before}]\n"
    for before, key in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


def test_a_file_comes_down_to_lines_that_stay_as_they_are() -> None:
    lines = normalize([CONDA_FILE + FILE])
    assert lines == [
        "channel:bioconda",
        "channel:conda-forge",
        "conda:conda-forge::proj=9.3=*_0",
        "conda:gdal >=3.8,<4",
        f"conda:python={OURS}",
        "einops==0.8.*",
    ]
    assert normalize(lines) == lines


def test_packages_of_conda_come_from_conda_forge_unless_said_otherwise() -> None:
    assert normalize(["einops", "conda:gdal=3.9"]) == [
        "channel:conda-forge",
        "conda:gdal=3.9",
        "einops",
    ]


@pytest.mark.parametrize(
    "versions",
    ["", "=3", f"={OURS}", f"=={OURS}.4", f" {OURS}.*", f"={OURS}.9=h5_0_cpython", ">=3.8,<4"],
)
def test_a_python_that_may_be_the_servers_is_taken(versions: str) -> None:
    assert f"conda:python{versions}" in normalize([f"conda:python{versions}"])


@pytest.mark.parametrize("versions", ["=2.7", "=3.4", " 3.1.*", "<3.9", "=3.5|=3.6", "==x"])
def test_another_python_is_refused(versions: str) -> None:
    with pytest.raises(InvalidRequestError, match="has the Python of the server") as caught:
        normalize([f"conda:python{versions}"])
    assert (caught.value.field, caught.value.expected) == ("env.dependencies", f"python={OURS}")


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        ("a: [", "env", "no YAML in line"),
        ("\0", "env", "no YAML"),
        ("[" * 5000, "env", "nested too deeply"),
        ("- gdal", "env", "a mapping with dependencies"),
        ("", "env", "a mapping with dependencies"),
        ("variables: {A: b}\ndependencies: [gdal]", "env", "'variables'"),
        (BOMB + "dependencies: [gdal]", "env", "'a'"),
        ("name: x", "env.dependencies", "got nothing"),
        ("dependencies: []", "env.dependencies", "a list of packages"),
        ("dependencies: gdal", "env.dependencies", "a list of packages"),
        ("dependencies: [[gdal]]", "env.dependencies", "a list of texts"),
        ("dependencies: [{npm: [x]}]", "env.dependencies", "a list of texts"),
        ("dependencies: [pip: einops]", "env.dependencies.pip", "a list of texts"),
        ("dependencies: [gdal, pip: [-e .]]", "env", "no option of an installer"),
        ("dependencies: [--file=/etc/passwd]", "env.dependencies", "a name and versions"),
        ("dependencies: ['https://evil/x.conda']", "env.dependencies", "a name and versions"),
        ("dependencies: ['gdal[url=x]']", "env.dependencies", "a name and versions"),
        ("dependencies: ['']", "env.dependencies", "a name and versions"),
        ("dependencies: ['evil::gdal']", "env.channels", "one of bioconda, conda-forge"),
        ("channels: [x: y]\ndependencies: [gdal]", "env.channels", "a list of texts"),
        ("channels: conda-forge\ndependencies: [gdal]", "env.channels", "a list of texts"),
        ("channels: ['http://evil']\ndependencies: [gdal]", "env.channels", "'http://evil'"),
        ("channels: [5]\ndependencies: [gdal]", "env.channels", "'5'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as caught:
        normalize([CONDA_FILE + text])
    assert caught.value.field == field
    assert len(str(caught.value)) < 400


def test_a_file_has_a_largest_size() -> None:
    text = "dependencies: [gdal]\n"
    full = text + "#" * (MAX_FILE_CHARACTERS - len(text))
    assert normalize([CONDA_FILE + full]) == ["channel:conda-forge", "conda:gdal"]
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_FILE_CHARACTERS} characters"):
        normalize([CONDA_FILE + full + "#"])


def test_packages_of_both_kinds_count() -> None:
    lines = [f"conda:package{number}" for number in range(MAX_REQUIREMENTS)]
    assert len(normalize(lines)) == MAX_REQUIREMENTS + 1  # and the channel
    with pytest.raises(InvalidRequestError, match="at most 100 packages"):
        normalize([*lines, "one-more"])
