"""What the machine ran out of, or does not allow: disk, memory, open files, processes, rights. `sentence` says it in
one line, for `model.program.startup.run_command`.

Libraries hide the system's error in their own (safetensors, torch's writers and allocator), so their text is searched
for the system's words. An `OSError` that carries the system's number and names a file counts as one of these, whoever
raised it; where that hides a defect, METRONOME_TRACEBACK=1 shows the cause. A GPU's errors are told by
`model.program.gpu_faults`. Imports nothing but the standard library.
"""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.program import gpu_faults

_WRITING = "while writing "
_DURING = "memory ran out in "

_RAN_OUT: dict[int, tuple[str, int | None]] = {
    errno.ENOSPC: ("free space on that disk, or choose another folder", None),
    errno.EDQUOT: ("free some of your quota on that disk, or choose another folder", None),
    errno.EFBIG: ("allow larger files (`ulimit -f unlimited`)", resource.RLIMIT_FSIZE),
    errno.EMFILE: ("allow this process more open files (`ulimit -n 4096`)", resource.RLIMIT_NOFILE),
    errno.ENFILE: ("the machine has no more open files to give: end other programs", None),
    errno.ENOMEM: (
        "free memory, allow more (`ulimit -v unlimited`), or use a smaller model or batch",
        resource.RLIMIT_AS,
    ),
    errno.EAGAIN: ("allow more processes and threads (`ulimit -u unlimited`), or use fewer", resource.RLIMIT_NPROC),
    errno.EROFS: ("choose a folder that can be written into", None),
    errno.EIO: ("the disk is failing: save what is on it elsewhere", None),
}
"""Errors of a machine, whatever the file: what to do, and the limit that says how much is allowed."""

_OF_PATHS = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG,
    errno.ENOTEMPTY, errno.EBUSY, errno.ESTALE, errno.ETXTBSY,
}  # fmt: skip
"""Errors of a path that the message names."""

_MEMORY = ("not enough memory", "can't allocate memory", "cannot allocate memory", "std::bad_alloc", "out of memory")
_MAPPING = ("failed to map segment from shared object", "cannot allocate memory in static tls block")
_THREAD = "can't start new thread"
_TORCH_WRITER = ("pytorchstreamwriter failed", "file write failed", "inline_container.cc")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What fails in the block failed "while writing" ``path``, unless it names a file that lies elsewhere."""
    try:
        yield
    except Exception as error:
        name = error.filename if isinstance(error, OSError) else None
        if not isinstance(name, str) or Path(name).is_relative_to(path.parent):
            error.add_note(f"{_WRITING}{path}")
        raise


@contextmanager
def needing(phase: str, lower: str) -> Iterator[None]:
    """Where memory runs out in the block, of the machine or its GPU, `sentence` says that it did so in ``phase`` ("the
    learner") and what makes it need less (``lower``, with the recipe's fields). A function's decorator, too."""
    try:
        yield
    except Exception as error:
        if gpu_faults.out_of_memory(error) or _number(error) == errno.ENOMEM:
            error.add_note(f"{_DURING}{phase}\n{lower}")
        raise


def sentence(error: BaseException) -> str | None:
    """What ran out or is not allowed, where, and what to do; None for an error of another kind."""
    phase, lower = _phase(error)
    if (fault := gpu_faults.sentence(error, phase, lower)) is not None:
        return fault
    number = _number(error)
    if number is None:
        return None
    where = _where(error)
    if number == errno.EPIPE:
        return "what reads this command's output has ended before the command"
    if number == errno.ENOENT and "temporary directory" in str(error):
        return "no folder for temporary files can be written into; free space in /tmp, or name another one by TMPDIR"
    if number in _RAN_OUT:
        remedy, limit = _RAN_OUT[number]
        allowed = "" if limit is None else _allowed(limit)
        if phase and number == errno.ENOMEM:
            allowed, remedy = f"{allowed} in {phase}", f"free memory, or {lower}"
        return f"{where}{os.strerror(number)}{allowed}; {remedy}, and start again. Finished files are whole"
    if number in _OF_PATHS and where:
        return f"{where}{os.strerror(number)}; see that it is there and that this user may use it"
    return None


def _number(error: BaseException) -> int | None:
    """The system's number of an error, also of one that a library raised in its place."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):  # Rust's
        return int(found[1])
    for number in _RAN_OUT:
        if number != errno.EAGAIN and os.strerror(number) in text:
            return number
    lower = text.lower()
    if any(words in lower for words in (*_MEMORY, *_MAPPING)):
        return errno.ENOMEM
    if _THREAD in lower:
        return errno.EAGAIN
    if isinstance(error, RuntimeError) and any(words in lower for words in _TORCH_WRITER):
        # torch does not say why; the system did, if Python wrote the file for it
        if isinstance(before := error.__context__, OSError):
            return before.errno
        return errno.EFBIG if _allowed(resource.RLIMIT_FSIZE) else errno.ENOSPC
    return None


def _phase(error: BaseException) -> tuple[str, str]:
    """What the innermost `needing` says; empty where there is none."""
    notes: list[str] = getattr(error, "__notes__", [])
    found = next((note.removeprefix(_DURING) for note in notes if note.startswith(_DURING)), "")
    phase, _, lower = found.partition("\n")
    return phase, lower


def _where(error: BaseException) -> str:
    """The file that was to be written, as the outermost `naming` says, or else the one that the error names; with a
    colon."""
    notes: list[str] = getattr(error, "__notes__", [])
    written = [note.removeprefix(_WRITING) for note in notes if note.startswith(_WRITING)]
    name = error.filename if isinstance(error, OSError) else None
    named = [os.fsdecode(name)] if isinstance(name, str | bytes) else []
    path = (named + written)[-1:]
    return f"{path[0]}: " if path else ""


def _allowed(limit: int) -> str:
    """What a limit of this process allows, if it has one."""
    soft, _ = resource.getrlimit(limit)
    unit = {resource.RLIMIT_AS: " bytes", resource.RLIMIT_FSIZE: " bytes"}.get(limit, "")
    return "" if soft == resource.RLIM_INFINITY else f" (this process is allowed {soft:,}{unit})"
