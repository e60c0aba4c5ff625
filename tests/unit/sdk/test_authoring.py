"""Marking classes and finding their source."""

import nos
import numpy as np
import pytest
from nos.authoring import source_of
from nos.errors import InvalidRequestError


@nos.model(name="me/plain", device="cpu")
class Plain:
    """A class that uses a module of its file."""

    def __call__(self, x):
        return np.sum(x)


def test_a_marked_class_is_unchanged():
    assert Plain()(np.ones(3)) == 3


def test_the_mark_needs_no_parentheses():
    class Bare: ...

    assert nos.model(Bare) is Bare


def test_source_of_a_class_brings_the_imports_that_it_uses():
    found = source_of(Plain)
    assert found.class_name == "Plain"
    assert found.name == "me/plain"
    assert "import numpy as np\n" in found.text
    assert "import nos\n" in found.text
    assert "pytest" not in found.text
    compile(found.text, "x", "exec")


def test_text_is_sent_as_it_is():
    found = source_of("class A: ...", "A", "<cell 3>")
    assert (found.text, found.class_name, found.source_name) == ("class A: ...", "A", "<cell 3>")


@pytest.mark.parametrize("wrong", [3, Plain(), None, len])
def test_what_has_no_source_is_refused(wrong):
    with pytest.raises(InvalidRequestError, match="source"):
        source_of(wrong)


def test_a_class_without_a_file_is_refused():
    made = type("Made", (), {})
    with pytest.raises(InvalidRequestError, match="cannot be found"):
        source_of(made)
