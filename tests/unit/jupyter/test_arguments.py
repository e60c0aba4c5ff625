"""How a `%nos` line is read."""

from __future__ import annotations

import pytest
from IPython.core.error import UsageError
from nos_jupyter import arguments


def test_words_split_as_in_a_shell() -> None:
    assert arguments.split(r"run m -i text='two words' a\ b") == [
        "run",
        "m",
        "-i",
        "text=two words",
        "a b",
    ]


def test_braces_keep_spaces_quotes_and_inner_braces() -> None:
    line = """run m {f("}", [1, 2])} -i p={"a": {"b": 1}}"""
    assert arguments.split(line) == [
        "run",
        "m",
        '{f("}", [1, 2])}',
        "-i",
        'p={"a": {"b": 1}}',
    ]


@pytest.mark.parametrize("line", ["run m 'open", "run m {open", "run m {f('}')"])
def test_what_is_never_closed_is_a_usage_error(line: str) -> None:
    with pytest.raises(UsageError, match="never closed"):
        arguments.split(line)


def test_braces_and_dollar_give_the_object_itself() -> None:
    image = object()
    assert arguments.value("{image}", {"image": image}) is image
    assert arguments.value("$image", {"image": image}) is image


@pytest.mark.parametrize("word", ["0.4", '{"a": 1}', "$5", "plain"])
def test_everything_else_stays_text(word: str) -> None:
    assert arguments.value(word, {}) == word


@pytest.mark.parametrize("word", ["{nope}", "$nope", "{1 +}", "{1 / 0}"])
def test_an_expression_that_fails_is_one_line(word: str) -> None:
    with pytest.raises(UsageError) as failure:
        arguments.value(word, {})
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("pairs", [["=1"], ["x"], ["1x=2"], ["a=1", "a=2"]])
def test_a_named_value_needs_one_name(pairs: list[str]) -> None:
    with pytest.raises(UsageError):
        arguments.named_values(pairs, {})


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("modles", "did you mean %nos models?"),
        ("wxyz", "%nos help lists the commands"),
        ("load", "required: MODEL. Usage: %nos load [-h] MODEL"),
        ("run m --timeout soon", "invalid float value: 'soon'"),
        ("status --loud", "no such option: --loud. Usage: %nos status [-h]"),
    ],
)
def test_wrong_usage_is_one_line_with_the_next_step(line: str, says: str) -> None:
    with pytest.raises(UsageError) as failure:
        arguments.build().parse(line)
    assert says in str(failure.value)
    assert "\n" not in str(failure.value)


def test_nothing_means_status() -> None:
    assert arguments.build().parse("").command == "status"


def test_help_of_a_command_prints_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(arguments.HelpShown):
        arguments.build().parse("load --help")
    assert "%nos load" in capsys.readouterr().out
