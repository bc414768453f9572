"""Start and end of every command: `run_command`.

It checks Python, our `kernels` package and the native library, prepares the process, runs the command, and turns a
`MetronomeError` (something that a user can mend) into one line and exit status 2, and so what the machine ran out of
or does not allow (`model.program.exhausted`), which any `OSError` is that names a file. Other exceptions are bugs and
keep their traceback. With METRONOME_TRACEBACK=1 in the environment the traceback stands above those lines, too.

Nothing of the project is imported before the checks have passed, because another package called `kernels` may come
first on the path.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds our packages: the repository, or site-packages of a plain install."""

OLDEST_PYTHON = (3, 11)
DEEPSPEED_SAFE_CLASSES = (
    ("runtime.fp16.loss_scaler", "LossScaler"),
    ("runtime.zero.config", "ZeroStageEnum"),
    ("utils.tensor_fragment", "fragment_address"),
)
"""(module below deepspeed, class) of all objects in DeepSpeed's optimizer files that are not tensors or plain values:
two records of numbers and an enumeration. `torch.load` is allowed to make these and nothing else."""

EXIT_USER_ERROR = 2
RANK_DELAY_S = 2.0  # ranks other than 0 wait so long before they print an error; see `fail`


class StartupError(Exception):
    """The environment cannot run the program; the message says why and what to do."""


def check_python(version: tuple[int, int, int]) -> None:
    """Raises StartupError for a Python older than `OLDEST_PYTHON`."""
    if version[:2] < OLDEST_PYTHON:
        actual, need = (".".join(map(str, v[:2])) for v in (version, OLDEST_PYTHON))
        raise StartupError(f"Python {actual} at {sys.executable} is too old; Metronome needs {need} or newer")


def check_kernels(root: Path = ROOT) -> None:
    """Raises StartupError unless ``import kernels`` gives our package; Hugging Face publishes one of the same name."""
    spec = importlib.util.find_spec("kernels")
    package = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
    if package == root / "kernels" and (package / "ops.py").is_file():
        return
    if package is None:
        raise StartupError(f"no package `kernels` is importable, though it should lie in {root}: `pip install -e .`")
    raise StartupError(
        f"the package `kernels` at {package} shadows Metronome's own in {root / 'kernels'}; start from {root} with "
        "`python -m` or `accelerate launch -m`, or remove the other one (`pip uninstall kernels`)"
    )


def check_native() -> None:
    """Raises MetronomeError or StartupError when the chosen backend cannot run here (library not built, processor)."""
    dispatch = importlib.import_module("kernels.dispatch")
    try:
        dispatch.contract()
    except (RuntimeError, ValueError, OSError) as error:
        raise StartupError(str(error)) from error


def prepare_process() -> None:
    """Sets environment variables and warning filters that must be set before deepspeed or wandb are imported."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator())  # otherwise DeepSpeed takes a GPU wherever it sees one
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Whatever a library reads by torch.load may be tensors and plain values only, even where the library says otherwise
    # (DeepSpeed does): nothing that lies in a checkpoint's folder is ever executed.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def accelerator() -> str:
    """DeepSpeed's name of the device that METRONOME_BACKEND computes on. Imports nothing."""
    return "cuda" if os.environ.get("METRONOME_BACKEND") == "triton" and not interpreted() else "cpu"


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU. Triton reads the variable so, too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def import_deepspeed() -> ModuleType:
    """Imports deepspeed with its native ops disabled.

    Otherwise it compiles a shared-memory all-reduce with g++ first (most of a minute, and a compiler is needed at run
    time), which also adds in another order than gloo."""
    prepare_process()
    ops = importlib.import_module("deepspeed.ops")
    ops.__dict__["__compatible_ops__"] = {}
    deepspeed = importlib.import_module("deepspeed")
    # What its optimizer files hold beside plain values: making one of these executes nothing of a file's own.
    allow = importlib.import_module("torch.serialization").add_safe_globals
    allow([getattr(importlib.import_module(f"deepspeed.{module}"), name) for module, name in DEEPSPEED_SAFE_CLASSES])
    return deepspeed


def run_command(module: str) -> NoReturn:
    """Runs ``main()`` of the named module after the checks, and exits: 0, 2 for an error that a user can mend, 130 when
    interrupted."""
    try:
        check_python(sys.version_info[:3])
        check_kernels()
    except StartupError as error:
        fail(str(error))
    importlib.import_module("model.program.lifeline").follow_launcher()
    prepare_process()
    errors = importlib.import_module("kernels.errors")
    try:
        check_native()
        importlib.import_module(module).main()
        sys.stdout.flush()
    except (StartupError, errors.MetronomeError) as error:
        _show_cause(error)
        fail(str(error))
    except Exception as error:
        if not _lost_a_process(error):
            problem = importlib.import_module("model.program.exhausted").sentence(error)
            if problem is None:
                raise
            _show_cause(error)
            fail(problem)
        # The one that ended has said why, or is about to; this message is only read when it could not.
        time.sleep(2 * RANK_DELAY_S)
        fail(f"another process of this run ended unexpectedly ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        fail("interrupted; finished files are whole, and the run can go on with --resume", status=130)
    sys.exit(0)


def _show_cause(error: BaseException) -> None:
    if os.environ.get("METRONOME_TRACEBACK") == "1":
        traceback.print_exception(error)


def _lost_a_process(error: Exception) -> bool:
    """Whether gloo or NCCL raised ``error`` because the other end of a connection is gone."""
    text = str(error)
    gone = ("Connection closed by peer", "Connection reset by peer")
    return isinstance(error, RuntimeError) and (
        ("gloo" in text and any(words in text for words in gone))
        or ("NCCL error" in text and ("ncclRemoteError" in text or "remote process exited" in text))
    )


def fail(message: str, status: int = EXIT_USER_ERROR) -> NoReturn:
    """Prints ``error: message``, as a rule once for all processes of a run, and exits.

    Most errors occur on every rank, and the launcher stops all ranks as soon as one exits. So ranks other than 0 wait
    for `RANK_DELAY_S` before they print: the user reads one line, and also reads it when only a later rank fails. The
    launcher's own report ends with what it finds in TORCHELASTIC_ERROR_FILE, so the message is written there too."""
    # One line, in which nothing that came from a file can move the cursor or pass for a line of ours.
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    text = os.environ.get("RANK", "0")
    rank = int(text) if text.isdecimal() else 0
    if rank > 0:
        time.sleep(RANK_DELAY_S)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or nobody reads: Python would try again at its end, and say so
        with contextlib.suppress(OSError):
            sys.stdout.close()
    with contextlib.suppress(OSError):
        print(f"error: {message}" if rank == 0 else f"error (process {rank}): {message}", file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        extra = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the disk that is full may be this one
            Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    sys.exit(status)


def end_now(message: str, last: Callable[[], None]) -> NoReturn:
    """`fail` for a thread that sees what the others of this process wait for in vain: calls ``last`` and ends the
    process under them."""
    try:
        fail(message)
    finally:
        last()
        os._exit(EXIT_USER_ERROR)
