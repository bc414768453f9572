"""A checkpoint's manifest: digests of all files in its folder, to detect that they are not what was saved.

    manifest.json = {"format": "metronome.manifest/1", "name": "step_000004", "recipe": SHA-256 of the run's recipe,
                     "files": {"model/config.json": {"size": bytes, "sha256": 64 hexadecimal digits}, …},
                     "digest": SHA-256 of all the other fields}

It is the last file written into a checkpoint and is checked before any other is read. ``name`` and ``recipe`` detect an
undamaged checkpoint of another step or run in this one's place. A manifest finds damage and mix-ups, not forgery:
who can write into the folder can also write a manifest. So checkpoints hold only data, and no code that loading them
would execute.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kernels.errors import MetronomeError
from model.program.files import write_json
from model.program.reading import UnreadableError, one_line, parse_yaml, read_json

MANIFEST = "manifest.json"
FORMAT = "metronome.manifest/1"
LOCATION_FIELDS = ("name", "runs", "tracking", "hub")
"""Fields of a recipe that say where a run is stored, reported, sent. They change no result; no digest covers them."""
_SERIES = re.compile(r"(step_|checkpoint-)(\d+)")
"""Matches the names of a run's successive checkpoints: step_000004, checkpoint-4."""


class CheckpointError(MetronomeError):
    """A checkpoint is missing, damaged or of another model."""


class _Fault(Exception):
    """What is wrong with a checkpoint, as the rest of a sentence that begins with its path. ``remedy``: what mends it,
    where something does."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


def write(folder: Path, name: str, recipe: str = "") -> None:
    """Writes the manifest of the files that are in ``folder`` now. ``name``: the folder's final name; ``recipe``: the
    text of the run's recipe."""
    files = {
        at: {"size": (folder / at).stat().st_size, "sha256": _file_digest(folder / at)} for at in sorted(_files(folder))
    }
    content = {"format": FORMAT, "name": name, "recipe": recipe_digest(recipe), "files": files}
    content["digest"] = _own_digest(content)
    write_json(folder / MANIFEST, content)


def check(
    folder: Path, *, part: str = "", recipe: str | tuple[str, ...] | None = None, what: str = "checkpoint"
) -> None:
    """Raises CheckpointError unless ``folder`` holds exactly the files that were saved, under the name that it was
    saved as. The message names the first wrong file and the newest undamaged checkpoint before this one.

    ``part``: check only this subfolder. ``recipe``: text of the recipe that it must be of, or texts of which one must
    be its; None for any. ``what``: the message's word for what the folder holds."""
    try:
        _check(folder, part, recipe)
    except _Fault as fault:
        advice = fault.remedy or _advice(folder, recipe)
        raise CheckpointError(one_line(f"{what} {folder}: {fault}. {advice}")) from None


def check_loaded(folder: Path) -> None:
    """`check` for a folder that is a checkpoint or a direct subfolder of one. Does nothing when neither it nor its
    parent has a manifest or the name of a run's checkpoint: then another program saved it (transformers, say)."""
    resolved = folder.resolve()
    for root, part in ((folder, ""), (resolved.parent, resolved.name)):
        if _has_ours(root) or _SERIES.fullmatch(root.resolve().name):
            check(root, part=part)
            return


def _check(folder: Path, part: str, recipe: str | tuple[str, ...] | None) -> None:
    content = _read(folder)
    actual = folder.resolve().name
    if actual != content["name"] and _SERIES.fullmatch(actual):
        raise _Fault(f"it was saved as {content['name']} ({MANIFEST}): another one lies in its place")
    recipes = (recipe,) if isinstance(recipe, str) else recipe
    if recipes is not None and content["recipe"] not in map(recipe_digest, recipes):
        raise _Fault(f"it was saved by a run of another recipe ({MANIFEST})")
    inside = f"{part}/" if part else ""
    listed = {at: entry for at, entry in content["files"].items() if at.startswith(inside)}
    present = {at for at in _files(folder) if at.startswith(inside)}
    for at in sorted(listed):
        if at not in present:
            raise _Fault(f"{at} is missing")
        try:
            size, saved = (folder / at).stat().st_size, listed[at]["size"]
            if size != saved:
                raise _Fault(f"{at} is damaged: it has {size:,} bytes, and had {saved:,} when it was saved")
            if _file_digest(folder / at) != listed[at]["sha256"]:
                raise _Fault(f"{at} is damaged: its digest is not the one in {MANIFEST}")
        except OSError as error:
            raise _Fault(f"{at} cannot be read ({error.strerror})") from None
    if added := sorted(present - listed.keys()):
        more = f", nor are {len(added) - 1} more" if added[1:] else ""
        remedy = f"All that was saved is whole: remove {'these files' if more else 'that file'}"
        raise _Fault(f"{added[0]} is not listed in {MANIFEST}{more}: put there later", remedy)


def _read(folder: Path) -> dict[str, Any]:
    """The manifest's content, with the type of every field checked."""
    if not folder.is_dir():
        raise _Fault("there is no such folder")
    if not (folder / MANIFEST).exists():
        raise _Fault(f"{MANIFEST} is missing: an older version saved this checkpoint, or the file was lost")
    try:
        content = read_json(folder / MANIFEST)
    except UnreadableError as error:
        raise _Fault(f"{MANIFEST} is damaged: it {error.problem}") from None
    version = content.get("format") if isinstance(content, dict) else None
    if isinstance(version, str) and version.startswith("metronome.manifest/") and version != FORMAT:
        raise _Fault(f"{MANIFEST} is of format {version}, and this version reads {FORMAT}")
    try:
        sound = (
            content["format"] == FORMAT
            and content["digest"] == _own_digest(content)
            and all(isinstance(content[field], str) for field in ("name", "recipe"))
            and all(type(e["size"]) is int and isinstance(e["sha256"], str) for e in content["files"].values())
        )
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise _Fault(f"{MANIFEST} is damaged: it does not agree with its own digest")
    return dict(content)


def _has_ours(folder: Path) -> bool:
    """Whether ``folder`` has a manifest of this format; other programs also write files called manifest.json."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        content = read_json(folder / MANIFEST)
    except UnreadableError:
        return True  # damaged, and `check` says so
    return isinstance(content, dict) and str(content.get("format")).startswith("metronome.")


def _advice(folder: Path, recipe: str | tuple[str, ...] | None) -> str:
    """What to do instead of reading ``folder``."""
    name = folder.resolve().name
    if not folder.resolve().parent.is_dir():
        return "Name a folder that a run saved"
    if not _SERIES.fullmatch(name):
        return "Copy it again from where it was whole, or make it anew"
    for before in _earlier(folder.resolve()):
        try:
            _check(before, "", recipe)
        except _Fault:
            continue
        return f"The newest one before it that is whole is {before.name}: to resume from it, move {name} away"
    return "No checkpoint before it is whole: start anew under another --name"


def _earlier(folder: Path) -> Iterator[Path]:
    """The checkpoints of the same series that lie beside ``folder``, from the one before it backwards."""
    series = {match: other for other in folder.parent.iterdir() if (match := _SERIES.fullmatch(other.name))}
    this = _SERIES.fullmatch(folder.name)
    assert this is not None
    older = [(int(m[2]), path) for m, path in series.items() if m[1] == this[1] and int(m[2]) < int(this[2])]
    yield from (path for _, path in sorted(older, reverse=True))


def _files(folder: Path) -> set[str]:
    """Everything in ``folder`` but folders and the manifest itself, as paths relative to it with forward slashes."""
    paths = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return {p.relative_to(folder).as_posix() for p in paths} - {MANIFEST}


def _file_digest(path: Path) -> str:
    if not path.is_file():  # a pipe would never end
        raise OSError(0, "it is no file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_digest(recipe: str) -> str:
    """Digest of a recipe's values without `LOCATION_FIELDS`, so that a run that was moved can resume. Order, comments
    and the way that numbers are written do not enter it."""
    try:
        fields = parse_yaml(recipe)
    except UnreadableError:
        fields = None
    if isinstance(fields, dict):
        kept = {name: value for name, value in fields.items() if name not in LOCATION_FIELDS}
        recipe = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(recipe.encode()).hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    rest = {field: value for field, value in content.items() if field != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
