"""Hostile values for every field of every command's recipe: it is read, or one line names the field; nothing is written
and nothing hangs. At the level of the parser, so that thousands of inputs take seconds."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.errors import MetronomeError
from model.program import ranges
from model.program.ranges import Range
from model.program.recipe import Recipe, read_recipe
from rl.config import TrainConfig
from tests.support.recipes import classes, commands, leaves, required

OPTIONS = [
    "", " ", "-1", "0", "nan", ".nan", "-.inf", "1e999", "1" + "0" * 400, "1" + "0" * 5000, "-0.0", "5e-324",
    "9223372036854775808", "true", "null", "~", "no", "[]", "{}", "[1]", "[[1]]", "[.nan, 1]", "[2, 1]", "[a, a]",
    "{a: 1}", "{a: {b: [c]}}", "\0", "\x1b[2J", "a\nb", "\ud800", "[" * 100, "{a: &x [*x]}", "&x [*x]", "x" * 5000,
    "'", '"\\ud800"', "!!python/object:os.x {}", "!!binary aaaa", "2024-13-45", "- a", "a: b: c", "\u2028", "../up",
]  # fmt: skip
"""Values on the command line."""

VALUES = [
    "", " ", "-1", "-0.5", "1.0e+999", ".nan", ".inf", "-.inf", "1" + "0" * 400, "true", "~", "[]", "{}", "[[]]",
    "{a: 1}", "[.nan, .inf]", "[-1, -2]", "['', '']", "{a: [1, {b: ~}]}", "''", "' '", '"\\0"', '"\\ud800"', "'5'",
    "'x'", "&x [*x]", "2024-01-01", "!!set {a}", "x" * 5000, "[" * 80,
]  # fmt: skip
"""Values in a recipe, as YAML."""

FIELDS = {kind: [name for name, _ in leaves(kind)] for kind in classes()}
for _kind in set(FIELDS) - {TrainConfig}:  # the families' settings are the same everywhere
    FIELDS[_kind] = [name for name in FIELDS[_kind] if name.count(".") < 2 or not name.startswith("scenario")]


def nested(name: str, value: str) -> str:
    """A recipe's text that gives one field a value."""
    for part in reversed(name.split(".")):
        value = f"{{{part}: {value}}}"
    return f"{value}\n"


def one_line(text: str) -> bool:
    """Whether a terminal shows it as one line, and not a long one."""
    return len(text) < 2000 and not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def outcome(kind: type[Any], name: str, arguments: list[str]) -> Recipe[Any] | None:
    """What was read, None where it was refused; fails for an error of another kind, of several lines, or that does not
    name the field."""
    needed = [f"--{n}={v}" for n, v in required(kind).items() if n != name]
    try:
        return read_recipe("a.command", "", kind, [*needed, *arguments])
    except MetronomeError as error:
        text = str(error)
        assert one_line(text), (name, text)
        assert named(text, name), (name, text)
        return None


def named(text: str, name: str) -> bool:
    """Whether an error names the field, or the part whose families it cannot find; a recipe's text that is no YAML at
    all has no fields."""
    part = name.removesuffix(".families")
    return any(f"{name}{end}" in text for end in " [.=") or text.startswith((f"recipe: {part}: ", "recipe: is "))


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_fields_with_hostile_values(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried = 0
    for i, name in enumerate(FIELDS[kind]):  # each with half of the values, so that neighbours have all of them
        inputs = [[f"--{name}={value}"] for value in OPTIONS[i % 2 :: 2]]
        inputs += [["--config", nested(name, value)] for value in VALUES[i % 2 :: 2]]
        read = [recipe for recipe in (outcome(kind, name, given) for given in inputs) if recipe is not None]
        tried += len(inputs)
        assert len(read) < len(inputs) - 5, f"{name} takes whatever it is given"
        for recipe in read[:1]:
            assert read_recipe("a.command", "", kind, ["--config", recipe.text]) == recipe
    assert os.listdir(tmp_path) == []
    print(f"{kind.__name__}: {tried} inputs")


NO_NUMBERS = ("nan", "inf", "-inf", ".nan", ".inf", "-.inf", "1e999", "-1e999")


def is_number(hint: Any) -> bool:
    """Whether a field is a number, a list of or a mapping to numbers, or one of these or null."""
    kind = ranges.bare(hint)[0]
    if get_origin(kind) is tuple:
        return all(is_number(one) for one in get_args(kind) if one is not ...)
    return is_number(get_args(kind)[1]) if is_mapping(hint) else kind in (int, float, int | float)


def is_mapping(hint: Any) -> bool:
    return get_origin(ranges.bare(hint)[0]) in (dict, Mapping)


NUMERIC = [(kind, n, hint) for kind in classes() for n, hint in leaves(kind) if n in FIELDS[kind] and is_number(hint)]


def test_no_field_takes_what_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(NUMERIC) > 100 and {"rl.axis_weights", "rl.steps"} <= {name for _, name, _ in NUMERIC}
    for kind, name, hint in NUMERIC:
        for value in NO_NUMBERS[:: 1 if name.count(".") < 2 else 3]:
            several = f"{{timing: {value}}}" if is_mapping(hint) else f"[{value}]"
            text = several if get_args(ranges.bare(hint)[0]) else value
            assert outcome(kind, name, [f"--{name}={text}"]) is None, (name, text)
            assert outcome(kind, name, ["--config", nested(name, text)]) is None, (name, text)
    assert os.listdir(tmp_path) == []


def test_control_a_name_may_be_nan() -> None:
    assert "rl.train" in commands() and not is_number(str) and is_number(Annotated[float | None, Range(0, 1)])
    for value in NO_NUMBERS[:3]:
        read = outcome(TrainConfig, "speech_dir", [f"--speech_dir={value}"])
        assert read is not None and read.config.speech_dir == value


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
ANY = st.recursive(
    SCALARS, lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=8), one, max_size=3)
)
WORDS = st.sampled_from(["--rl.steps", "--config", "5", "--name", "--resume"])
PLACES = st.sampled_from([(kind, name) for kind, names in FIELDS.items() for name in names])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES, value=ANY, spelled=st.text(max_size=40), by_option=st.booleans())
def test_any_value_of_any_field(
    place: tuple[type[Any], str],
    value: Any,
    spelled: str,
    by_option: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, name = place
    outcome(kind, name, [f"--{name}={spelled}"] if by_option else ["--config", nested(name, json.dumps(value))])
    assert os.listdir(tmp_path) == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(max_size=20) | st.sampled_from(["--rl.steps", "--config", "5", "--name", "--resume"]), max_size=5)
)
def test_any_arguments(arguments: list[str]) -> None:
    try:
        read_recipe("rl.train", "", TrainConfig, arguments, resumes=True)
    except MetronomeError as error:
        assert one_line(str(error))
    except SystemExit:
        assert {"--help", "-h"} & set(arguments)


def test_a_message_that_names_nothing_is_seen() -> None:
    """The control of `named`."""
    assert named("recipe: rl.steps is -1: give a number", "rl.steps")
    assert not named("recipe: rl.groups is -1: give a number", "rl.steps")
    assert not named("something is wrong", "rl.steps")
