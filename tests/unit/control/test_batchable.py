"""What an author writes about batching, and what is made of it."""

from __future__ import annotations

import pytest
from nos.errors import InvalidRequestError
from nos.wire.v1 import models_pb2
from nos_backend.control.describe import describe

METHOD = (
    'def __call__(self, x: Annotated[torch.Tensor, "{x}"]) -> Annotated[torch.Tensor, "{y}"]: ...'
)


def batching(options: str, method: str) -> models_pb2.Method:
    source = f"import nos\n@nos.model(name='m'{options})\nclass M:\n    {method}\n"
    return describe(source)[0].spec.methods[0]


@pytest.mark.parametrize(
    ("x", "y", "is_on"),
    [
        ("float32[batch, 3]", "float32[batch, 2]", True),
        ("float32[*batch, 3]", "float32[*batch]", True),
        ("float32[batch, 3]", "float32[3]", False),
        ("float32[n, 3]", "float32[n, 2]", False),
        ("float32[..., 3]", "float32[..., 2]", False),
        ("float32[*batch, 3]", "float32[batch, 3]", False),
        ("float32[3]", "float32[batch]", False),
        ("float32", "float32", False),
    ],
)
def test_methods_batch_where_tensors_and_result_have_the_dimension_batch(
    x: str, y: str, *, is_on: bool
) -> None:
    assert batching("", METHOD.format(x=x, y=y)).HasField("batching") == is_on


def test_lists_batch_when_asked_or_when_the_result_has_the_dimension() -> None:
    lists = "def __call__(self, texts: list[str]) -> list[str]: ..."
    rows = (
        'def __call__(self, texts: list[str]) -> Annotated[torch.Tensor, "float32[batch, 4]"]: ...'
    )
    assert not batching("", lists).HasField("batching")
    assert list(batching(", batch=True", lists).batching.parameters) == ["texts"]
    assert list(batching("", rows).batching.parameters) == ["texts"]


def test_limits_are_taken_from_the_decorator() -> None:
    method = METHOD.format(x="float32[batch, 3]", y="float32[batch, 3]")
    found = batching(", batch=8, queue_delay_s=0.01", method).batching
    assert (found.max_rows, found.queue_delay_s) == (8, 0.01)
    assert not batching(", batch=False", method).HasField("batching")
    assert not batching(", batch=None", method).batching.HasField("queue_delay_s")


@pytest.mark.parametrize(
    "options",
    [
        "batch=0",
        "batch=-1",
        "batch='yes'",
        "queue_delay_s=-1",
        "queue_delay_s='1'",
        "exact=8",
        "check_batch='yes'",
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(InvalidRequestError, match=options.partition("=")[0]):
        batching(f", {options}", METHOD.format(x="float32[batch]", y="float32[batch]"))


def test_batching_that_no_method_can_do_is_refused_and_told_how() -> None:
    with pytest.raises(InvalidRequestError, match=r"float32\[batch, 8\]"):
        batching(", batch=4", "def __call__(self, x: int) -> int: ...")


def test_an_exact_model_has_runs_of_one_size() -> None:
    method = METHOD.format(x="float32[batch, 3]", y="float32[batch, 3]")
    found = batching(", batch=8, exact=True", method).batching
    assert (found.exact_rows, found.max_rows, found.is_checked) == (8, 8, False)
    assert batching(", exact=True", method).batching.exact_rows == 16
    assert batching(", check_batch=True", method).batching.is_checked
    with pytest.raises(InvalidRequestError):
        batching(", exact=True", "def __call__(self, x: int) -> int: ...")


PADDED = """def __call__(
        self, x: Annotated[torch.Tensor, "float32[batch, length]"], {mask}
    ) -> Annotated[torch.Tensor, "float32[batch, length]"]: ..."""
MASK = 'mask: Annotated[torch.Tensor, "bool[batch, length]"] | None = None'


def test_a_dimension_is_padded_where_a_mask_can_tell() -> None:
    found = batching(", pad='length'", PADDED.format(mask=MASK)).batching
    assert (found.padded, list(found.parameters)) == ("length", ["x"])


@pytest.mark.parametrize(
    ("options", "mask", "sentence"),
    [
        ("pad='width'", MASK, "no method can pad 'width'"),
        ("pad='batch'", MASK, "no method can pad 'batch'"),
        ("pad='length'", "scale: float = 1.0", "a parameter `mask` of"),
        ("pad='length'", MASK.removesuffix(" | None = None"), "that is None by default"),
        ("pad='length'", MASK.replace("bool", "float32"), "a parameter `mask` of"),
        ("pad='length', exact=True", MASK, "either `exact` or `pad`"),
        ("pad=3", MASK, "option pad is wrong"),
        ("pad='a b'", MASK, "option pad is wrong"),
    ],
)
def test_padding_that_no_method_can_do_is_refused_and_told_how(
    options: str, mask: str, sentence: str
) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        batching(f", {options}", PADDED.format(mask=mask))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize(
    ("method", "is_each"),
    [
        ('def __call__(self, x: Annotated[np.ndarray, "uint8[height, width]"]) -> int: ...', True),
        ("def __call__(self, x: np.ndarray, image: PIL.Image.Image) -> dict: ...", True),
        ("def __call__(self, x: int) -> int: ...", False),
        ("def __call__(self, *x: np.ndarray) -> int: ...", False),
        ('def __call__(self, x: Annotated[torch.Tensor, "float32[batch]"]) -> int: ...', False),
    ],
)
def test_single_items_run_in_one_round_when_asked(method: str, *, is_each: bool) -> None:
    source = f"import nos\n@nos.model(name='m', batch=True)\nclass M:\n    {method}\n"
    source += "    def texts(self, texts: list[str]) -> list[str]: ...\n"
    assert describe(source)[0].spec.methods[0].batching.is_each == is_each
    off = describe(source.replace("True", "None", 1))
    assert not off[0].spec.methods[0].HasField("batching")
