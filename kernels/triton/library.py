"""Triton itself: whether it is there, in a version for which the kernels are written. Imports it only when asked."""

from __future__ import annotations

import importlib
import re

from kernels.errors import MetronomeError

OLDEST = (3, 6)
"""The oldest version in which the kernels were compiled and ran. A newer one than was tried is let through: it enters
the contract, so no result can pass for an older one's."""

USED = ("jit", "cdiv", "next_power_of_2", "knobs", "runtime")
"""What the kernels' host code takes from the package."""


def check() -> None:
    """Raises MetronomeError unless Triton can be used."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        said = "is not installed" if missing else f"cannot be imported ({error})"
        raise MetronomeError(
            f"Triton, in which a GPU's kernels are written, {said}: `pip install triton`, in the version that belongs "
            "to this torch; or give --placement.device cpu"
        ) from error
    version = str(getattr(triton, "__version__", "of no known version"))
    found = re.match(r"(\d+)\.(\d+)", version)
    lacking = [name for name in USED if not hasattr(triton, name)]
    if found is None or (int(found[1]), int(found[2])) < OLDEST or lacking:
        lacks = f", which lacks {', '.join(lacking)}," if lacking else ""
        raise MetronomeError(
            f"Triton {version} at {getattr(triton, '__file__', None)}{lacks} will not do: the kernels need "
            f"{'.'.join(map(str, OLDEST))} or newer, best the version that belongs to this torch (`pip install triton`)"
        )
