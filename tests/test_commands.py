"""Every command of the program, found by its own entries: starts by `run_command`, refuses hostile arguments in one
line before anything is written, and tries its output paths before the work."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from kernels.errors import MetronomeError
from model.program.files import whole_folder, write_whole
from model.program.folders import locked
from model.program.outputs import (
    OutputFile,
    OutputFolder,
    output_file,
    output_folder,
    problem_of_file,
    problem_of_folder,
)
from rl.config import TrainConfig
from rl.console import VERBS
from tests.support.recipes import commands as recipe_classes
from tests.support.recipes import leaves, required

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("kernels", "model", "rollout", "reward", "rl")
OTHER_STARTS = {"rl.console": "starts the others, and imports none of our packages but theirs"}
"""Modules with a ``__main__`` block that need no `run_command`, and why."""
NUMBERS = ("nan", "inf", "-1", "1e999", "9" * 400, "", " ", "many", "[1]", "\x00", "0x", "--", "1.5")
FILES = ("", "folder", "folder/", "file/x.json", "file/", "/proc/none/x.json", "/dev/null", "\x00")


def entries() -> list[str]:
    """Modules with a ``__main__`` block, by dotted name."""
    paths = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]
    return [name(p) for p in paths if "__main__" in p.read_text(encoding="utf-8")]


def name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def started(module: str) -> str | None:
    """The module that the ``__main__`` block of another one hands to `run_command`."""
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run_command":
            return str(ast.literal_eval(node.args[0]))
    return None


COMMANDS = [command for entry in entries() if (command := started(entry))]


def test_every_entry_starts_by_run_command() -> None:
    assert {entry for entry in entries() if not started(entry)} == set(OTHER_STARTS)
    assert len(COMMANDS) > 20  # a scan that finds nothing would pass everything below


def test_every_verb_is_an_entry() -> None:
    modules = {verb.module for verb in VERBS.values()}
    assert modules <= {command.removesuffix(".command").removesuffix(".__main__") for command in COMMANDS}


def main_of(command: str) -> Callable[[list[str]], None]:
    main: Callable[[list[str]], None] = importlib.import_module(command).main
    return main


def refused(command: str, arguments: list[str]) -> str:
    """The one line with which a command refuses its arguments."""
    with pytest.raises(MetronomeError) as error:
        main_of(command)(arguments)
    line = str(error.value)
    assert line and "\n" not in line, line
    return line


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder: with a file and a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    return tmp_path


def content(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(command)(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: ")
    names = [name for name, _ in leaves(RECIPES[command])] if command in RECIPES else []
    names += [option.removeprefix("--") for action in options(command) for option in action.option_strings[-1:]]
    assert names and all(f"--{name}" in said for name in names)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("arguments", [["--no-such-option", "1"], ["--no-such-option=\n"], ["\x1b[2J"]])
def test_unknown_arguments(command: str, arguments: list[str], place: Path) -> None:
    before = content(place)
    refused(command, arguments)
    assert content(place) == before


def options(command: str) -> list[argparse.Action]:
    """The options of a command that has plain ones."""
    module = importlib.import_module(command)
    return list(module.parser()._actions) if hasattr(module, "parser") else []


def makes_number(action: argparse.Action) -> bool:
    return "number." in getattr(action.type, "__qualname__", "")


def makes_output(action: argparse.Action) -> bool:
    return "_option." in getattr(action.type, "__qualname__", "")


NUMBER_OPTIONS = [(c, a.option_strings[-1]) for c in COMMANDS for a in options(c) if makes_number(a)]
OUTPUT_OPTIONS = [(c, a.option_strings[-1]) for c in COMMANDS for a in options(c) if makes_output(a)]


def test_no_option_is_a_bare_number() -> None:
    bare = [(c, a.dest) for c in COMMANDS for a in options(c) if a.type in (int, float)]
    assert not bare
    assert len(NUMBER_OPTIONS) > 8


def test_options_that_name_results_are_tried() -> None:
    results = [(c, a) for c in COMMANDS for a in options(c) if a.dest in ("json", "out") and a.nargs != 0]
    untried = [(c, a.dest) for c, a in results if not makes_output(a)]
    assert not untried
    assert len(OUTPUT_OPTIONS) > 8


@pytest.mark.parametrize(("command", "option"), NUMBER_OPTIONS)
def test_numbers_out_of_range(command: str, option: str, place: Path) -> None:
    before = content(place)
    for value in NUMBERS:
        line = refused(command, [f"{option}={value}"])
        assert option in line, line
    assert content(place) == before


@pytest.mark.parametrize(("command", "option"), OUTPUT_OPTIONS)
def test_output_paths_of_options(command: str, option: str, place: Path) -> None:
    before = content(place)
    folder = option == "--out"
    for value in ("", "file", "file/x", "/proc/none/x") if folder else FILES:
        line = refused(command, [f"{option}={value}"])
        assert option in line, line
    assert content(place) == before


def outputs(command: str) -> list[tuple[str, OutputFile | OutputFolder]]:
    """(dotted name, kind) of the outputs in a command's recipe; nothing for a command without a recipe."""
    return outputs_of(RECIPES[command]) if command in RECIPES else []


def outputs_of(kind: type[Any]) -> list[tuple[str, OutputFile | OutputFolder]]:
    """The same of a recipe's class, those of the classes within it included."""
    limits = [(field, one) for field, hint in leaves(kind) for one in getattr(hint, "__metadata__", ())]
    return [(field, one) for field, one in limits if isinstance(one, OutputFile | OutputFolder)]


RECIPES = recipe_classes() | {"rl.minimal": TrainConfig}  # which it reads by `rl.train.parse`
RECIPE_OUTPUTS = [(command, field, kind) for command in COMMANDS for field, kind in outputs(command)]


def test_recipes_that_name_results_try_them() -> None:
    commands = {command for command, _, _ in RECIPE_OUTPUTS}
    assert commands >= {"rl.train", "rl.bestofn", "reward.train", "reward.pairs", "reward.evaluate", "reward.hacks"}


def test_control_an_output_within_a_part_is_found() -> None:
    @dataclass(frozen=True)
    class Part:
        picture: Annotated[str, OutputFile()] = "x.png"

    @dataclass(frozen=True)
    class Whole:
        name: str = "x"
        part: Part = field(default_factory=Part)

    Whole.__annotations__["part"] = Part
    Part.__annotations__["picture"] = Annotated[str, OutputFile()]
    assert outputs_of(Whole) == [("part.picture", OutputFile())]


@pytest.mark.parametrize(("command", "field", "kind"), RECIPE_OUTPUTS)
def test_output_paths_of_recipes(command: str, field: str, kind: Any, place: Path) -> None:
    before = content(place)
    wrong = FILES if isinstance(kind, OutputFile) else ("", "file", "file/x", "/proc/none/x")
    beside = tuple(f"x{ending}" for ending in getattr(kind, "beside", ()))
    needed = [f"--{n}={value}" for n, value in required(RECIPES[command]).items() if n != field]
    for value in (*wrong, *beside):
        line = refused(command, [*needed, f"--{field}={value}"])
        assert field in line, line
    assert content(place) == before


LENGTHS = (200, *range(230, 257))
"""Of names, in bytes. Linux takes up to 255, and what is written beside for a while has a longer name."""


@pytest.mark.parametrize("beside", [(), (".png",)])
def test_a_file_whose_name_is_taken_can_be_written(beside: tuple[str, ...], place: Path) -> None:
    taken = []
    for length in LENGTHS:
        path = Path("x" * (length - 2) + ".j")
        if problem_of_file(str(path), beside) is None:
            taken.append(length)
            for one in (path, *map(path.with_suffix, beside)):
                write_whole(one, b"1")
                write_whole(one, b"2")
    assert taken and taken[0] == LENGTHS[0] and taken[-1] < 255
    assert len(content(place)) == len(taken) * (1 + len(beside)) + 2, "and nothing else is left"


def test_a_folder_whose_name_is_taken_can_be_written(place: Path) -> None:
    taken = []
    for path in (Path("x" * length) for length in LENGTHS):
        if problem_of_folder(str(path)) is None:
            taken.append(path.name)
            for _ in range(2):
                with locked(path), whole_folder(path):
                    pass
    assert taken and taken[0] == "x" * LENGTHS[0] and len(taken[-1]) < 255
    assert content(place) == {"folder", "file", *taken}


def test_outputs_that_will_do_leave_nothing(place: Path) -> None:
    before = content(place)
    assert output_file()("new/x.json") == Path("new/x.json")
    assert output_file()("file") == Path("file")
    assert output_folder()("new/folder") == Path("new/folder")
    assert output_folder()("folder") == Path("folder")
    assert content(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_leave_to_write(place: Path) -> None:
    (place / "folder").chmod(0o500)
    with pytest.raises(argparse.ArgumentTypeError, match="cannot be written into"):
        output_file()("folder/x.json")
