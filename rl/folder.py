"""A run's folder on disk. Whenever a run crashes, each file in it is complete or absent.

    runs/<name>/config.yaml, environment.json, metrics.jsonl, summary.json, checkpoints/step_000010/, episodes/, audit/

Only the first process writes plain files; all processes write into a checkpoint's folder. Knows names and bytes, not
what they mean. `metrics.jsonl` is rewritten for each record: a run has hundreds of records of a few hundred bytes, and
so no reader and no crash ever meets half a line.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kernels.errors import MetronomeError
from model.program import ranks
from model.program.exhausted import naming, sentence
from model.program.files import replace_folder, write_whole
from model.program.folders import locate
from model.program.reading import (
    MOST_RECIPE_BYTES,
    UnreadableError,
    as_record,
    decode,
    lines,
    parse_line,
    read_bytes,
    read_record,
    read_text,
    to_json,
)
from model.program.runs import RECIPE, RESUMED, check_free
from model.weights import manifest

_STEP = re.compile(r"step_(\d{6,})")
_EPISODES = re.compile(r"step_\d{6,}\.rank_\d+\.safetensors")
_RESTORE = "restore the file, or cut it before this line, and --resume says from which checkpoint it can go on"


@dataclass(frozen=True)
class Note:
    """That a run went on under a changed recipe, or after it was finished."""

    step: int  # finished steps from which it went on
    changed: dict[str, tuple[Any, Any]]  # fields of the recipe -> values before and after
    recipes: tuple[str, ...]  # texts of the recipe before: as it stood in config.yaml, and as the program read it
    summary: dict[str, Any] | None  # the summary before, if it was finished


class RunFolder:
    """Owns ``path`` and the metric records written so far. Use `create` or `reopen`."""

    def __init__(self, path: Path, metrics: list[bytes], recipe: str = "") -> None:
        self.path = path
        self.recipe = recipe  # config.yaml
        self._metrics = metrics  # encoded lines, each with its newline

    @staticmethod
    def create(runs: Path, name: str, config: str) -> RunFolder:
        """Makes a folder with config.yaml, the resolved recipe ``config``. Raises MetronomeError when ``name`` cannot
        name a folder, or a folder of that name holds results."""
        path = locate(runs, name)
        check_free(path)
        folder = RunFolder(path, [], config)
        ranks.gather(None)  # all look before the first one writes
        folder._write_recipe()
        return folder

    @staticmethod
    def reopen(runs: Path, name: str) -> RunFolder:
        """The folder of an interrupted run, which may have been moved or renamed. Raises MetronomeError when there is
        none or its records are damaged."""
        path = locate(runs, name)
        if not (path / RECIPE).is_file():
            raise MetronomeError(f"{path} holds no run to resume (no {RECIPE}); start without --resume")
        return RunFolder(path, _read_lines(path / "metrics.jsonl"), read_text(path / RECIPE, MOST_RECIPE_BYTES))

    def recipes(self) -> tuple[str, ...]:
        """Texts of all recipes that the run has had, today's first."""
        return (self.recipe, *(text for note in notes(self.path) for text in note.recipes))

    def go_on(self, recipe: str, read: str, step: int | None, changed: Mapping[str, tuple[Any, Any]]) -> None:
        """Takes ``recipe`` for the run's from here on. ``read``: config.yaml's recipe as the program has read it;
        ``step``: finished steps from which it goes on, None where it begins anew; ``changed``: as in `Note`. The
        summary of a run that was finished moves into the note."""
        before, text = self.path / "summary.json", self.recipe
        ranks.gather(None)  # all have read before the first one writes
        self.recipe = recipe
        if ranks.rank() > 0:
            return
        texts = {manifest.recipe_digest(one): one for one in (text, read)}
        other = texts.keys() != {manifest.recipe_digest(recipe)}
        if step is not None and (changed or other or before.is_file()):
            kept = read_record(before, dict[str, Any]) if before.is_file() else None
            note = Note(step, dict(changed), tuple(texts.values()), kept)
            written = "".join(to_json(asdict(one), None) for one in [*notes(self.path), note])
            self.write_text(RESUMED, written)
            with self.writing(before.name):
                before.unlink(missing_ok=True)
        if text != recipe:
            self._write_recipe()

    def _write_recipe(self) -> None:
        if ranks.rank() == 0:
            with self.writing(RECIPE, anew=True):
                write_whole(self.path / RECIPE, self.recipe.encode())

    def check(self) -> None:
        """Raises MetronomeError when the folder was moved away or deleted; looks in the first process only."""
        if ranks.rank() == 0 and not (self.path / RECIPE).is_file():
            raise MetronomeError(
                f"{self.path} was moved or deleted while the run wrote into it (no {RECIPE}): the run ends, and writes "
                "nothing more there. Where the folder is now, --resume goes on from its newest checkpoint; if it holds "
                "summary.json, the run is finished, and `python -m rl.audit --run` writes the report"
            )

    @contextmanager
    def writing(self, name: str, anew: bool = False) -> Iterator[None]:
        """A block that writes ``name`` in the folder. Raises MetronomeError for what the disk refuses; and when the
        folder was moved away or deleted, unless it is made ``anew``: before anything is written, or, when it was in
        the block, at its end."""
        check = (lambda: None) if anew else self.check
        check()
        try:
            with naming(self.path / name):
                yield
            check()
        except MetronomeError:
            check()  # it may be what was to be read there
            raise
        except (OSError, SafetensorError) as error:
            check()
            reason = sentence(error)
            if reason is None:
                raise
            raise MetronomeError(f"{reason}; --resume goes on from the newest checkpoint") from error

    def write_bytes(self, name: str, data: bytes) -> Path:
        """Writes a file, in the first process only, and returns its path."""
        path = self.path / name
        if ranks.rank() == 0:
            with self.writing(name):
                write_whole(path, data)
        return path

    def write_text(self, name: str, text: str) -> Path:
        return self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Raises MetronomeError for NaN and infinities, which JSON does not have."""
        return self.write_text(name, to_json(value))

    def append_metrics(self, record: Mapping[str, float | int | str]) -> None:
        """Adds one record. Raises ValueError unless its ``step`` is larger than that of the record before,
        MetronomeError for a value that is not finite."""
        last = _step(self._metrics[-1]) if self._metrics else -1
        if int(record["step"]) <= last:
            raise ValueError(f"metrics: step {record['step']} after step {last}")
        records = [*self._metrics, to_json(dict(record), None).encode()]
        self.write_bytes("metrics.jsonl", b"".join(records))
        self._metrics = records

    def metrics(self) -> list[dict[str, Any]]:
        """The records so far, one for each step."""
        return [parse_line(line, "metrics.jsonl") for line in self._metrics]

    def check_records(self, step: int) -> None:
        """Raises MetronomeError unless metrics.jsonl has a record of each of the first ``step`` steps."""
        unbroken = 0
        while unbroken < min(step, len(self._metrics)) and _step(self._metrics[unbroken]) == unbroken:
            unbroken += 1
        if unbroken < step:
            sound = [one for one, _ in self._checkpoints() if one <= unbroken]
            other = f"move the checkpoints after step_{max(sound):06d} away, or " if sound else ""
            raise MetronomeError(
                f"{self.path / 'metrics.jsonl'}: the record of step {unbroken} is missing, and {step} steps are "
                f"finished; put the file back as the run wrote it, or {other}start under another --name"
            )

    def keep_before(self, step: int) -> None:
        """Drops the records, and all processes' episodes, of steps that a resumed run will take again."""
        kept = [line for line in self._metrics if _step(line) < step]
        if len(kept) < len(self._metrics):
            self._metrics = kept
            self.write_bytes("metrics.jsonl", b"".join(kept))
        ranks.gather(None)  # no process has begun to write episodes
        if ranks.rank() == 0:
            with self.writing("episodes"):
                for path in self._episodes():
                    if int(path.name.removeprefix("step_").partition(".")[0]) >= step:
                        path.unlink()
        ranks.gather(None)

    def _episodes(self) -> list[Path]:
        found = (self.path / "episodes").glob("step_*.safetensors")
        return [path for path in found if _EPISODES.fullmatch(path.name)]

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Gives a temporary folder for all processes to fill. When the block ends without an error in any of them, it
        becomes checkpoints/step_NNNNNN, with a manifest. ``step``: number of finished steps, at which a resumed run
        goes on."""
        final = self.checkpoint_path(step)
        partial = final.with_name(f".{final.name}.partial")
        try:
            with self.writing(str(final.relative_to(self.path))):
                if ranks.rank() == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                ranks.gather(None)
                yield partial
                ranks.gather(None)
                if ranks.rank() == 0:
                    manifest.write(partial, final.name, self.recipe)
                    replace_folder(partial, final)
        except BaseException:
            if ranks.rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        ranks.gather(None)

    def checkpoint_path(self, step: int) -> Path:
        """The path of the checkpoint after ``step`` finished steps, whether or not it exists."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """(finished steps, folder) of the newest finished checkpoint, if there is one."""
        return max(self._checkpoints(), default=None)

    def _checkpoints(self) -> list[tuple[int, Path]]:
        parent = self.path / "checkpoints"
        return [(int(m[1]), p) for p in parent.glob("step_*") if (m := _STEP.fullmatch(p.name)) and p.is_dir()]

    def latest_checkpoint(self) -> tuple[int, Path]:
        """The same; raises MetronomeError when there is none."""
        newest = self.newest_checkpoint()
        if newest is None:
            raise MetronomeError(f"{self.path / 'checkpoints'} holds no finished checkpoint")
        return newest

    def checkpoint_to_resume(self, *recipes: str) -> tuple[int, Path] | None:
        """The newest checkpoint, after comparing every file with the manifest; None for a run that was interrupted
        before its first one, and so begins anew. ``recipes``: further texts of the run's recipe. Raises
        CheckpointError, which names the file and the checkpoint before, when a file differs, and MetronomeError when
        the run has records but no checkpoint, or a checkpoint but not the records of the steps before it."""
        newest = self.newest_checkpoint()
        if newest is not None:
            manifest.check(newest[1], recipe=(*self.recipes(), *recipes))
            self.check_records(newest[0])
        elif self._metrics or (self.path / "summary.json").exists() or self._episodes():
            raise MetronomeError(
                f"{self.path} holds records of a run, but no finished checkpoint to go on from: put one back into "
                "checkpoints, or start under another --name"
            )
        return newest


def notes(path: Path) -> list[Note]:
    """The content of `RESUMED` in a run's folder, oldest first. Raises UnreadableError when it is damaged."""
    file = path / RESUMED
    data = read_bytes(file) if file.is_file() else b""
    numbered = [(f"{file}, line {number}", decode(line)) for number, line in lines(data)]
    return [as_record(text, Note, where, ranges=False) for where, text in numbered]  # recipes have control characters


def _read_lines(path: Path) -> list[bytes]:
    """The lines of metrics.jsonl, each with its newline. Raises MetronomeError, naming the line, for what is no record
    of a step after the one before. A last line that another program's crash cut short is left out."""
    if not path.exists():
        return []
    data = read_bytes(path)
    kept: list[bytes] = []
    last = -1
    for number, line in lines(data):
        where = f"{path}, line {number}"
        try:
            step = parse_line(line, where).get("step")
        except UnreadableError as error:
            if number == data.count(b"\n") + 1:  # no newline ends it
                break
            raise MetronomeError(f"{error}; {_RESTORE}") from None
        if type(step) is not int or step <= last:
            after = f" after step {last}" if last >= 0 else ""
            raise MetronomeError(f"{where}: not a metric record with a step{after}; {_RESTORE}")
        kept.append(line + b"\n")
        last = step
    return kept


def _step(line: bytes) -> int:
    return int(parse_line(line, "metrics.jsonl")["step"])
