"""A machine that runs out of something ends a command with one line that says of what, where and what to do; the older
file stays whole and nothing is left beside it. A defect keeps its traceback."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from model.program import files
from model.program.exhausted import naming, sentence
from model.program.files import append_line, replace_folder, whole_folder, write_whole
from tests.model.test_startup import command, run

LIMIT = """
import resource
def limit(name, value):
    kind = getattr(resource, name)
    resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
"""
HEAP = "import torch\ndef main():\n    limit('RLIMIT_AS', 6 << 30)\n    "
FSIZE = "limit('RLIMIT_FSIZE', 10_000)\n    "

RUNS_OUT = {
    "full disk": (
        "def main():\n    with open('/dev/full', 'w') as file: file.write('x')",
        "No space left on device; free space on that disk",
    ),
    "full disk under the output": (
        "import os\ndef main():\n    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n    print('x')",
        "No space left on device; free space on that disk",
    ),
    "nobody reads the output": (
        "import os\ndef main():\n    r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n    print('x')",
        "what reads this command's output has ended",
    ),
    "file limit": (
        f"{LIMIT}from model.program.files import write_whole\nfrom pathlib import Path\n"
        f"def main():\n    {FSIZE}write_whole(Path('FOLDER/out.bin'), bytes(20_000))",
        "FOLDER/out.bin: File too large (this process is allowed 10,000 bytes); allow larger files (`ulimit -f",
    ),
    "file limit of safetensors": (
        f"{LIMIT}import torch\nfrom safetensors.torch import save_file\nfrom pathlib import Path\n"
        "from model.program.files import whole_folder\n"
        f"def main():\n    {FSIZE}with whole_folder(Path('FOLDER/model')) as folder:\n"
        "        save_file({'x': torch.zeros(9000)}, folder / 'x.safetensors')",
        "FOLDER/model: File too large (this process is allowed 10,000 bytes)",
    ),
    "file limit of torch": (
        f"{LIMIT}import torch\ndef main():\n    {FSIZE}torch.save(torch.zeros(9000), 'FOLDER/x.pt')",
        "File too large (this process is allowed 10,000 bytes)",
    ),
    "open files": (
        f"{LIMIT}def main():\n    limit('RLIMIT_NOFILE', 32)\n    kept = [open('/dev/null') for _ in range(99)]",
        "/dev/null: Too many open files (this process is allowed 32); allow this process more open files (`ulimit -n",
    ),
    "memory": (
        f"{LIMIT}{HEAP}bytearray(8 << 30)".replace("import torch", ""),
        "Cannot allocate memory (this process is allowed 6,442,450,944",
    ),
    "memory of a tensor": (f"{LIMIT}{HEAP}torch.zeros(8 << 30)", "Cannot allocate memory (this process is allowed"),
    "temporary folder": (
        "import os, tempfile\ndef main():\n    tempfile._candidate_tempdir_list = lambda: ['/proc']\n"
        "    tempfile.TemporaryFile()",
        "no folder for temporary files can be written into; free space in /tmp",
    ),
    "no such folder": ("def main(): open('/nowhere/x')", "/nowhere/x: No such file or directory; see that it is"),
    "no folder": ("def main(): open('/dev/null/x', 'w')", "/dev/null/x: Not a directory; see that it is"),
}


@pytest.mark.parametrize("what", sorted(RUNS_OUT))
def test_what_runs_out_is_named_in_one_line(tmp_path: Path, what: str) -> None:
    body, says = (text.replace("FOLDER", str(tmp_path)) for text in RUNS_OUT[what])
    done = run(command(tmp_path, body))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr, done.stderr
    left = {path.name for path in tmp_path.iterdir()} - {"some_command.py", "__pycache__", "x.pt"}
    assert not left, "a write that failed leaves nothing"


DEFECTS = {
    "another error": "def main(): raise RuntimeError('the file of device 28 is full of errors')",
    "an error while handling one of the system": (
        "def main():\n    try: open('/nowhere/x')\n    except OSError: raise KeyError('x')"
    ),
    "a bad descriptor": "import os\ndef main(): os.write(99, b'x')",
    "an OSError of a library": "def main(): raise OSError('no config.json')",
}


@pytest.mark.parametrize("what", sorted(DEFECTS))
def test_defects_keep_their_traceback(tmp_path: Path, what: str) -> None:
    done = run(command(tmp_path, DEFECTS[what]))
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EDQUOT, "x", "a"), "a: Disk quota exceeded; free some of your quota"),
        (OSError(errno.ENFILE, "x"), "Too many open files in system"),
        (OSError(errno.EROFS, "x", b"a"), "a: Read-only file system; choose a folder"),
        (OSError(errno.EIO, "x", "a"), "a: Input/output error; the disk is failing"),
        (BlockingIOError(errno.EAGAIN, "x"), "`ulimit -u"),
        (RuntimeError("can't start new thread"), "`ulimit -u"),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), "No space left"),
        (RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file data/0: write failed"), "No space"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried …"),
         "Cannot allocate memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB"), "the GPU's memory ran out (20.00 GiB asked"),
        (RuntimeError("std::bad_alloc"), "Cannot allocate memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "Cannot allocate memory"),
        (OSError("libgomp.so.1: cannot allocate memory in static TLS block"), "Cannot allocate memory"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
    ],
)  # fmt: skip
def test_what_libraries_hide_is_found(error: Exception, says: str) -> None:
    text = sentence(error)
    assert text is not None and says in text and "\n" not in text
    for other in (ValueError("x"), FileNotFoundError("x"), OSError(errno.EBADF, "x"), RuntimeError("shape [3, 4]")):
        assert sentence(other) is None


def test_the_file_that_was_to_be_written_is_named(tmp_path: Path) -> None:
    inner, outer = tmp_path / "a" / ".partial" / "x", tmp_path / "a" / "b"
    with pytest.raises(OSError) as full, naming(outer), naming(inner):
        raise OSError(errno.ENOSPC, "x", str(inner))
    assert (sentence(full.value) or "").startswith(f"{outer}: No space")
    with pytest.raises(OSError) as elsewhere, naming(outer):
        raise OSError(errno.ENOENT, "x", "/another/file")
    assert (sentence(elsewhere.value) or "").startswith("/another/file: No such file")


@pytest.mark.parametrize("call", ["fsync", "chmod", "replace"])
def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "summary.json"
    write_whole(path, b"old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if call == "fsync" else (Path, call)), full)
        with pytest.raises(OSError) as error:
            write_whole(path, b"new")
    assert (sentence(error.value) or "").startswith(f"{path}: No space left on device")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]
    write_whole(path, b"new")  # the control
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_folder_that_fails_leaves_the_older_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """``failing``: what fails, the flush, the renaming of the older folder or that of the new one."""
    path, calls = tmp_path / "model", 0
    rename = Path.rename

    def write(text: str) -> None:
        with whole_folder(path) as folder:
            (folder / "weights").write_text(text)

    def full(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if failing == 1 or calls == failing - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(*arguments)  # type: ignore[arg-type]

    write("old")
    with monkeypatch.context() as patch:
        patch.setattr(*((files.os, "fsync") if failing == 1 else (Path, "rename")), full)
        with pytest.raises(OSError) as error:
            write("new")
    assert (sentence(error.value) or "").startswith(f"{path}: No space left on device")
    assert (path / "weights").read_text() == "old" and os.listdir(tmp_path) == ["model"]
    write("new")  # the control
    assert (path / "weights").read_text() == "new" and os.listdir(tmp_path) == ["model"]


def test_a_new_folder_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    new, path = tmp_path / ".partial", tmp_path / "step"
    for text in ("1", "2"):
        new.mkdir()
        (new / "x").write_text(text)
        replace_folder(new, path)
        assert (path / "x").read_text() == text and os.listdir(tmp_path) == ["step"]


def test_limits_are_those_of_this_process() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    try:
        assert f"allowed {soft - 1:,}" in (sentence(OSError(errno.EMFILE, "x")) or "")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_cause_is_shown_where_it_is_asked_for(tmp_path: Path) -> None:
    for body in (
        "def main(): open('/nowhere/x')",
        "from kernels.errors import MetronomeError\ndef main(): raise MetronomeError('/nowhere/x: a mistake')",
    ):
        code = command(tmp_path, body)
        plain, told = run(code, METRONOME_TRACEBACK="0"), run(code, METRONOME_TRACEBACK="1")
        assert plain.returncode == told.returncode == 2
        assert "Traceback" not in plain.stderr and "some_command.py" in told.stderr
        assert told.stderr.endswith(plain.stderr) and plain.stderr.startswith("error: /nowhere/x: ")


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append_line(file, "one\n")
    append_line(file, "two\n")
    assert file.read_text() == "one\ntwo\n"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, hard))
    try:
        with pytest.raises(OSError) as error:
            append_line(file, "a line of more than the four bytes that are left\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert f"{file}: " in str(sentence(error.value)) and file.read_text() == "one\ntwo\n"
