"""How every command starts and how it ends when something outside it is wrong.

`run_command` checks what must hold before anything heavy is imported (Python, our `kernels`, the native library),
prepares the process, runs the command and turns a `MetronomeError` into one line and exit status 2. It imports nothing
of the project itself until the checks have passed: with a foreign `kernels` package first on the path no import of ours
can be trusted. Other exceptions are defects of the program and keep their traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import warnings
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
"""Two records of numbers and an enumeration."""

EXIT_USER_ERROR = 2
RANK_DELAY_S = 2.0


class StartupError(Exception):
    """The environment cannot run the program. The message says what, where, and what to do."""


def check_python(version: tuple[int, int, int]) -> None:
    if version[:2] < OLDEST_PYTHON:
        found, need = (".".join(map(str, v[:2])) for v in (version, OLDEST_PYTHON))
        raise StartupError(f"Python {found} at {sys.executable} is too old; Metronome needs {need} or newer")


def check_kernels(root: Path = ROOT) -> None:
    """Raises StartupError unless ``import kernels`` gives the package beside this one; Hugging Face has a namesake."""
    spec = importlib.util.find_spec("kernels")
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
    if found == root / "kernels" and (found / "ops.py").is_file():
        return
    if found is None:
        raise StartupError(f"no package `kernels` is importable, though it should lie in {root}: `pip install -e .`")
    raise StartupError(
        f"the package `kernels` at {found} shadows Metronome's own in {root / 'kernels'}; start from {root} with "
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
    """Settings that must stand before deepspeed and wandb are imported, and before anything is loaded."""
    os.environ.setdefault("DS_ACCELERATOR", accelerator())  # otherwise DeepSpeed takes a GPU wherever it sees one
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Whatever a library reads by torch.load may be tensors and plain values only, even where the library says otherwise
    # (DeepSpeed does): nothing that lies in a checkpoint's folder is ever executed.
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def accelerator() -> str:
    """DeepSpeed's name for where the chosen backend works, before anything of it is imported."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") != "0"
    return "cuda" if os.environ.get("METRONOME_BACKEND") == "triton" and not interpreted else "cpu"


def import_deepspeed() -> ModuleType:
    """deepspeed with its native ops off.

    Otherwise its first act is to compile a shared-memory all-reduce with g++ (most of a minute, and a compiler at run
    time) that would then also replace gloo's order of summation by its own."""
    prepare_process()
    ops = importlib.import_module("deepspeed.ops")
    ops.__dict__["__compatible_ops__"] = {}
    deepspeed = importlib.import_module("deepspeed")
    # What its optimizer files hold beside plain values: making one of these executes nothing of a file's own.
    allow = importlib.import_module("torch.serialization").add_safe_globals
    allow([getattr(importlib.import_module(f"deepspeed.{module}"), name) for module, name in DEEPSPEED_SAFE_CLASSES])
    return deepspeed


def run_command(module: str) -> NoReturn:
    """Runs ``main()`` of the named module after the checks; never returns. Exit status 2: a user can mend it."""
    try:
        check_python(sys.version_info[:3])
        check_kernels()
    except StartupError as error:
        fail(str(error))
    prepare_process()
    errors = importlib.import_module("kernels.errors")
    try:
        check_native()
        importlib.import_module(module).main()
    except (StartupError, errors.MetronomeError) as error:
        fail(str(error))
    except RuntimeError as error:
        if not _lost_a_process(error):
            raise
        # The one that ended has said why, or is about to; this message is only read when it could not.
        time.sleep(2 * RANK_DELAY_S)
        fail(f"another process of this run ended unexpectedly ({str(error).splitlines()[0]})")
    except KeyboardInterrupt:
        fail("interrupted; finished files are whole, and the run can go on with --resume", status=130)
    sys.exit(0)


def _lost_a_process(error: RuntimeError) -> bool:
    """Whether gloo raised ``error`` because the other end of a connection is gone."""
    text = str(error)
    return "gloo" in text and ("Connection closed by peer" in text or "Connection reset by peer" in text)


def fail(message: str, status: int = EXIT_USER_ERROR) -> NoReturn:
    """Prints ``error: message`` once for all processes of a run and exits.

    What is wrong is mostly seen by every rank. The launcher stops the others as soon as one exits, so the others wait
    a moment before they speak: the user reads one line, and still reads it when only a later rank has failed. The
    launcher ends with a report of its own, whose last lines show what it finds in TORCHELASTIC_ERROR_FILE: the same
    message."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(RANK_DELAY_S)
    sys.stdout.flush()
    print(f"error: {message}" if rank == 0 else f"error (process {rank}): {message}", file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        extra = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        Path(report).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    sys.exit(status)
