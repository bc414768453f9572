"""Checks of output paths before the work whose results they shall hold: whatever can be found out at the start is.

In a recipe the type says it, and `model.program.ranges.check` tries the path: ``json: Annotated[str, OutputFile()]``.
Options of argparse have the types `output_file()` and `output_folder()`; `check_file` and `check_folder` are for paths
that are only known later. Trying a path writes an empty file beside it, or in
the nearest folder above it that exists, and removes it at once.

No result may damage what others rest on, so none is written into a model, a checkpoint or a data set of pairs, or over
what a run has in its folder (`_problem_of_place`). Whatever writes those itself asks `problem_of_writing` alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.ranges import hints_of, limits_of, shown

LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes that Linux's file systems take."""
BESIDE = len("..old.12345678")
"""Bytes that `model.program.files` and `model.program.folders` add to a name, for what they write beside it."""

RUN_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "resumed.jsonl",
    "summary.json",
    "origin.json",
    "audit/report.html",
    "audit/report.json",
)
RUN_FOLDERS = ("checkpoints", "episodes", "tracking", "model")
"""What a run of `rl.train` or `reward.train` consists of, by its path within the run's folder."""


@dataclass(frozen=True)
class OutputFile:
    """A file that a command will write; ``beside``: endings of further files that get its name."""

    beside: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "file"

    def problem(self, value: Any) -> str | None:
        """As `model.program.ranges.Limit.problem`."""
        return problem_of_file(str(value), self.beside)


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a command will make or write into."""

    def __repr__(self) -> str:
        return "folder"

    def problem(self, value: Any) -> str | None:
        """As `model.program.ranges.Limit.problem`."""
        return problem_of_folder(str(value))


def output_file(beside: tuple[str, ...] = (), ending: str = "") -> Callable[[str], Path]:
    """For ``type=`` of an argparse option: a file that the command will write. ``beside``: as in `OutputFile`;
    ``ending``: of its name, where it has to say what the file is."""

    def problem(text: str) -> str | None:
        other = text and not text.lower().endswith(ending)
        return problem_of_file(text, beside) or (f"give a name that ends in {ending}" if other else None)

    return _option(problem)


def output_folder() -> Callable[[str], Path]:
    """For ``type=`` of an argparse option: a folder that the command will make or write into."""
    return _option(problem_of_folder)


def _option(problem_of: Callable[[str], str | None]) -> Callable[[str], Path]:
    def read(text: str) -> Path:
        if problem := problem_of(text):
            raise argparse.ArgumentTypeError(f"{text!r}: {problem}")
        return Path(text)

    return read


def check_file(option: str, path: str | Path | None, beside: tuple[str, ...] = ()) -> None:
    """Raises MetronomeError, naming the option, when the file cannot be written; None is no path. ``beside``: as in
    `OutputFile`."""
    if path is not None and (problem := problem_of_file(str(path), beside)):
        raise MetronomeError(f"{option} {str(path)!r}: {problem}")


def check_folder(option: str, path: str | Path | None) -> None:
    """Raises MetronomeError, naming the option, when the folder cannot be made or written into; None is no path."""
    if path is not None and (problem := problem_of_folder(str(path))):
        raise MetronomeError(f"{option} {str(path)!r}: {problem}")


def problem_of_file(text: str, beside: tuple[str, ...] = ()) -> str | None:
    """Why the file ``text`` cannot be written, and what to give instead; None when it can."""
    if not text or "\0" in text:
        return "give the path of a file"
    path = Path(text)
    if problem := _problem_of_names(path):
        return problem
    if text.endswith("/") or path.is_dir():
        return "it is a folder; give the path of a file"
    written = (path, *(path.with_suffix(ending) for ending in beside))
    if problem := next((p for one in written if (p := _problem_of_last(one))), None):
        return problem
    if path.suffix in beside:
        return f"a file of that name is written beside it; give a name with another ending than {path.suffix}"
    for one in written:
        if os.path.lexists(one) and not one.is_file():
            return f"{one} is there and no regular file; give another path"
    return next((p for one in written if (p := _problem_of_place(one, is_file=True))), None) or _problem_in(path.parent)


def check_apart(recipe: Any, read: Sequence[str]) -> None:
    """Raises MetronomeError when a file that a command will write, by a recipe's dataclass, is a file that the recipe
    names elsewhere or one of those ``read`` for it."""
    kind: Any = type(recipe)
    values: dict[str, Any] = asdict(recipe)
    for name, hint in hints_of(kind).items():
        for limit in limits_of(hint):
            if isinstance(limit, OutputFile) and values[name] is not None:
                path = Path(values[name])
                written = [one for one in (path, *map(path.with_suffix, limit.beside)) if one.is_file()]
                texts = [*read, *_texts({at: value for at, value in values.items() if at != name})]
                same = (t for t in texts for one in written if os.path.isfile(t) and os.path.samefile(t, one))
                if (text := next(same, None)) is not None:
                    raise MetronomeError(
                        f"recipe: {name} is {shown(values[name])}: {shown(text)} is read; give another path"
                    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def problem_of_folder(text: str) -> str | None:
    """Why the folder ``text`` cannot be made or written into, and what to give instead; None when it can."""
    if not text or "\0" in text:
        return "give the path of a folder"
    path = Path(text)
    return _problem_of_names(path) or _problem_of_last(path) or _problem_of_place(path) or _problem_in(path)


def problem_of_writing(folder: Path) -> str | None:
    """Why a program cannot write into ``folder``, whatever it holds; None when it can."""
    return _problem_of_names(folder) or _problem_of_last(folder) or _problem_in(folder)


def _problem_of_place(path: Path, is_file: bool = False) -> str | None:
    """Why a result at ``path`` would damage what a run, a model or a data set consists of."""
    # A file replaces a link of its name; a folder is written into where the link leads.
    place = Path(os.path.realpath(path.parent), path.name) if is_file else Path(os.path.realpath(path))
    if is_file and place.is_file() and (what := _held_in(place.parent)):
        return f"it is a file of {what}; give another path"
    for folder in place.parents if is_file else (place, *place.parents):
        if _has_manifest(folder):
            return f"{folder} has a manifest of its files, and takes no others; give a path outside of it"
        if folder != place and _is_run(folder):
            at = place.relative_to(folder)
            if at.parts[0] in RUN_FOLDERS or (is_file and str(at) in RUN_FILES):
                return f"{at} is a part of the run {folder}; give another path"
    return None


def _has_manifest(folder: Path) -> bool:
    """Whether it is a checkpoint, a model or a data set with a manifest by `model.weights.manifest`."""
    path = folder / "manifest.json"
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return b"metronome." in file.read(4096)
    except OSError:  # if it matters, `_problem_in` says so
        return False


def _held_in(folder: Path) -> str | None:
    """What a folder of inputs without a manifest of ours holds: a model in transformers' format, or speech."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return "a model"
    return "a folder of speech" if (folder / "manifest.jsonl").is_file() else None


def _is_run(folder: Path) -> bool:
    """A folder may have a config.yaml of another kind, so one more file of a run is asked for."""
    return (folder / "config.yaml").is_file() and any((folder / name).is_file() for name in RUN_FILES[1:6])


def _problem_of_names(path: Path) -> str | None:
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    too_long = longest > LONGEST_NAME or len(os.fsencode(path)) > LONGEST_PATH - BESIDE
    return "give a shorter path" if too_long else None


def _problem_of_last(path: Path) -> str | None:
    """Why there is no room for the names of what is written beside a file or folder."""
    size, most = len(os.fsencode(path.name)), LONGEST_NAME - BESIDE
    return f"a name of {size} bytes; give one of at most {most}" if size > most else None


def _problem_in(folder: Path) -> str | None:
    """Why no file can be made in a folder, or in what will be one."""
    try:
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            return f"{folder} is no folder; give another path"
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try."):
            return None
    except OSError as error:
        return f"{folder} cannot be written into ({error.strerror}); give another path"
