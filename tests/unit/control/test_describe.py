"""What a source serves is read from its syntax, and each mistake names its line."""

import pytest
from nos.errors import InvalidRequestError, LimitExceededError
from nos.wire.signature import describe as in_words
from nos.wire.v1 import models_pb2
from nos_backend.control.describe import describe


def only(source, **options):
    (found,) = describe(source, **options)
    return found


def parameter_type(annotation, preamble=""):
    source = f"{preamble}\ndef model_(x: {annotation}): pass"
    return only(source, class_name="model_").spec.methods[0].parameters[0].type


KINDS = {
    "np.ndarray": "tensor",
    "torch.Tensor": "tensor",
    "Tensor": "tensor",
    "npt.NDArray[np.float32]": "float32 tensor",
    'Annotated[torch.Tensor, "float32[batch, 3, 224, 224]"]': (
        "float32 tensor of shape (batch, 3, 224, 224)"
    ),
    'Annotated[np.ndarray, "uint8"]': "uint8 tensor",
    'Annotated[np.ndarray, "[..., 2]"]': "tensor of shape (..., 2)",
    'Annotated[np.ndarray, "int64[]"]': "int64 tensor of shape ()",
    "PIL.Image.Image": "image: JPEG, PNG or a uint8 tensor (height, width, 3)",
    "str": "text",
    "bytes": "bytes",
    "int": "whole number",
    "float": "number",
    "int | float": "number",
    "bool": "truth value",
    "list": "list",
    "list[str]": "list of text",
    "list[list[int]]": "list of list of whole number",
    "tuple[int, int]": "list of whole number",
    "tuple[int, str]": "list",
    "tuple[float, ...]": "list of number",
    "dict[str, float]": "dict of number",
    "None": "None",
    "Optional[int]": "whole number or None",
    "str | None": "text or None",
    "Union[np.ndarray, torch.Tensor]": "tensor",
    'Literal["a", "b"]': "one of 'a', 'b'",
    "Literal[1, None]": "one of 1 or None",
    "int | str": "anything",
    "Frobnicator[int]": "anything",
    "'torch.Tensor'": "tensor",
    "'list[\"str\"]'": "list of text",
    "Any": "anything",
}


@pytest.mark.parametrize(("annotation", "words"), KINDS.items())
def test_annotation_says_what_a_parameter_takes(annotation, words):
    assert in_words(parameter_type(annotation)) == words


def test_unknown_annotation_keeps_its_text():
    assert parameter_type("pd.DataFrame").annotation == "pd.DataFrame"


def test_alias_of_the_module_is_followed():
    alias = 'Pixels = Annotated[torch.Tensor, "uint8[height, width, 3]"]'
    assert in_words(parameter_type("Pixels", alias)) == "uint8 tensor of shape (height, width, 3)"


@pytest.mark.parametrize(
    ("tensor", "said", "reason"),
    [
        ("uint8[b, 3]", "normalize", "not understood"),
        ("uint8[b, 3]", "normalize(0.5)", "not understood"),
        ("uint8[b, 3]", "normalize(mode=1)", "not understood"),
        ("uint8[b, 3]", "normalize(std=0)", "not understood"),
        ("uint8[b, 3]", "normalize(mean=1e999)", "not understood"),
        ("uint8[b, 3]", "normalize(mean=[1, 2, 3], std=[1, 2])", "not understood"),
        ("uint8[b, 3]", "normalize(mean=open('x'))", "not understood"),
        ("uint8[b, 4]", "normalize(mean=[1, 2, 3])", "a last dimension of 3"),
        ("float32[b, 3]", "normalize()", "uint8"),
    ],
)
def test_normalization_that_cannot_be_is_refused_with_its_line(tensor, said, reason):
    annotation = f"Annotated[torch.Tensor, {tensor!r}, {said!r}]"
    with pytest.raises(InvalidRequestError, match="line 2") as caught:
        parameter_type(annotation)
    assert reason in str(caught.value)


def test_normalization_may_stand_before_the_shape_and_is_for_torch_only():
    both = 'Annotated[{}, "normalize(mean=[0, 0, 0])", "uint8[b, 3]"]'
    assert in_words(parameter_type(both.format("torch.Tensor"))) == "uint8 tensor of shape (b, 3)"
    with pytest.raises(InvalidRequestError, match=r"torch\.Tensor"):
        parameter_type(both.format("np.ndarray"))


def test_alias_of_itself_ends():
    assert parameter_type("A", "A = list[A]").kind == models_pb2.TYPE_KIND_LIST


def test_class_of_the_source_hides_the_known_name():
    assert in_words(parameter_type("Image", "class Image: pass")) == "anything"


DIGITS = '''
import nos
import torch
from torch import nn

class Base(nn.Module):
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Inherited."""
    def replaced(self): pass

@nos.model(name="my/digits", device="cuda", isolation="process", call_timeout_s=2.5)
class Digits(Base):
    """Reads digits."""
    def __init__(self, width: int = 8): pass
    def forward(self, x, *rest, scale: float = 1.0, **more): return x
    def _private(self): pass
    @property
    def size(self): return 3
    @staticmethod
    def names() -> list[str]: return []
    @classmethod
    def about(cls, topic="all"): return ""
    def stream(self, n: int):
        for i in range(n): yield i
    replaced = None
    also = stream
'''


def test_class_gives_its_public_methods_options_and_doc():
    spec = only(DIGITS).spec
    assert (spec.name, spec.doc) == ("my/digits", "Reads digits.")
    assert (spec.device, spec.isolation, spec.call_timeout_s) == ("cuda", "process", 2.5)
    names = [method.name for method in spec.methods]
    assert names == ["predict", "__call__", "names", "about", "stream", "also"]


def test_forward_of_a_network_is_its_call_with_all_parameter_forms():
    call = next(method for method in only(DIGITS).spec.methods if method.name == "__call__")
    assert [parameter.name for parameter in call.parameters] == ["x", "rest", "scale", "more"]
    assert call.parameters[1].is_variadic
    assert (call.parameters[2].has_default, call.parameters[2].default_text) == (True, "1.0")
    assert call.parameters[3].is_keywords


def test_static_and_class_methods_lose_only_their_own_first_parameter():
    methods = {method.name: method for method in only(DIGITS).spec.methods}
    assert not methods["names"].parameters
    assert [parameter.name for parameter in methods["about"].parameters] == ["topic"]


def test_init_is_described_beside_the_methods():
    assert [parameter.name for parameter in only(DIGITS).init.parameters] == ["width"]


GENERATORS = {
    "def f(): yield 1": "anything",
    "def f() -> Iterator[str]: return iter([])": "text",
    "def f() -> collections.abc.Generator[int, None, None]: yield 1": "whole number",
    "def f() -> 'Iterable[float]': return []": "number",
}


@pytest.mark.parametrize(("source", "words"), GENERATORS.items())
def test_generator_is_told_with_what_its_items_are(source, words):
    method = only(source).spec.methods[0]
    assert method.is_generator
    assert in_words(method.returns) == words


def test_yield_of_an_inner_function_does_not_count():
    source = "def f():\n    def g(): yield 1\n    return list(g())"
    assert not only(source).spec.methods[0].is_generator


def test_function_is_a_model_with_only_call():
    found = only("@model(name='up')\ndef upper(text: str) -> str: ...\ndef other(): ...")
    assert found.class_name == "upper"
    assert [method.name for method in found.spec.methods] == ["__call__"]


def test_every_decorated_class_is_a_model():
    source = (
        "from nos import model as served\n@served\nclass A:\n  def f(self): ...\nclass B: ...\n"
    )
    source += "@served(name='c')\nclass C:\n  def f(self): ..."
    assert [found.class_name for found in describe(source)] == ["A", "C"]


def test_undecorated_source_serves_the_class_nobody_derives_from():
    source = "class Base:\n  def f(self): ...\nclass Net(Base): ...\nclass _Part: ..."
    assert only(source).class_name == "Net"


def test_nothing_of_the_source_runs(tmp_path):
    mark = tmp_path / "ran"
    describe(f"open({str(mark)!r}, 'w')\nclass A:\n  def f(self, x=open({str(mark)!r}, 'w')): ...")
    assert not mark.exists()


METHOD = "class A:\n  def f(self): ..."
MISTAKES = {
    "def f(:\n": "line 1",
    "x = 1\nclass A\n": "line 2",
    "x = '\0'": "not Python",
    "1": "does not say which class",
    "class A:\n  def f(self): ...\nclass B:\n  def f(self): ...": "got A, B",
    "class A:\n  def _f(self): ...": "no public method",
    "class A:\n  async def f(self): ...": "line 2: f is an async function",
    "class A:\n  def f(): ...": "takes no self",
    f"@nos.model(nam='a')\n{METHOD}": "unknown option: expected one of name",
    f"@nos.model(**options)\n{METHOD}": "unknown option",
    f"@nos.model(name=NAME)\n{METHOD}": "option name is not a literal",
    f"@nos.model(device='tpu')\n{METHOD}": "expected one of auto, cpu, cuda, got 'tpu'",
    f"@nos.model(isolation=1)\n{METHOD}": "expected one of shared, process, got 1",
    f"@nos.model(call_timeout_s=-1)\n{METHOD}": "option call_timeout_s is wrong",
    "def f(x: Annotated[torch.Tensor, 'float31[3]']): ...": "'float31[3]'",
    "def f(x: Annotated[torch.Tensor, 'float32[3']): ...": "float32[batch, 3, 224, 224]",
    "def f(x: Annotated[torch.Tensor, '[3, ...]']): ...": "dimension 1",
    "def f(x: Annotated[torch.Tensor, '[-1]']): ...": "got '-1'",
    "def f(x: Annotated[torch.Tensor, '[a,b,c,d,e,f,g,h,i]']): ...": "expected at most 8, got 9",
    "(" * 3000: "not Python",
}


@pytest.mark.parametrize(("source", "told"), MISTAKES.items())
def test_mistake_is_named(source, told):
    with pytest.raises(InvalidRequestError) as caught:
        describe(source)
    assert told in str(caught.value)
    assert len(str(caught.value)) < 500


def diamond(depth):
    """A class whose bases share their bases, `depth` times over: two to that many ways to the first."""
    lines = ["class L0:\n  def f(self): ...", "class R0:\n  def g(self): ..."]
    for level in range(1, depth):
        lines += [f"class {side}{level}(L{level - 1}, R{level - 1}): ..." for side in "LR"]
    return "\n".join([*lines, f"class Net(L{depth - 1}, R{depth - 1}): ..."])


@pytest.mark.timeout(10)
def test_many_ways_to_one_base_cost_no_time():
    assert {method.name for method in only(diamond(60)).spec.methods} == {"f", "g"}


def test_classes_that_derive_from_each_other_end():
    source = "class A(B): ...\nclass B(A):\n  def f(self): ...\nclass C(A): ..."
    assert [method.name for method in only(source).spec.methods] == ["f"]


def test_source_nested_too_deeply_is_refused():
    with pytest.raises(InvalidRequestError, match="nested"):
        describe("def f(x=" + "+".join(["1"] * 800) + "): ...")


def test_missing_class_is_named_beside_those_there_are():
    with pytest.raises(InvalidRequestError, match="expected one of A"):
        describe(METHOD, class_name="B")


def test_source_over_the_limit_is_refused():
    with pytest.raises(LimitExceededError, match="1048576"):
        describe("#" * (1 << 20) + "\n")


def test_invalid_escape_of_a_source_warns_nobody():
    assert only(METHOD + "\nx = '\\d'").class_name == "A"


def test_digest_is_that_of_the_source():
    assert only(METHOD).spec.source_sha256 == only(METHOD).spec.source_sha256
    assert only(METHOD).spec.source_sha256 != only(METHOD + "\n").spec.source_sha256
