"""Loads the native library, once and after checking that the processor can run it, and binds its functions.

Left out on purpose: ``torch.library``. Nothing here is traced or compiled, and its dispatcher costs more than a small
kernel takes. Calls go through cffi, which passes a handful of integers in half the time that ctypes needs; the integers
are addresses (``tensor.data_ptr()``, 0 for none) or sizes.

There is one library per instruction set (``_native_avx2.so``, ``_native_avx512.so``), built from the same sources and
giving the same bits; the best one that the processor supports is loaded, or the one that ``METRONOME_ISA`` names. On a
machine with AVX-512 its library is compared with the AVX2 one on small inputs before it is used.
``METRONOME_NATIVE=FILE`` loads FILE in place of either, such as a build with sanitizers (.ci/sanitize).
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import cffi
import torch

_NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "bmi2"},
    "avx2": {"avx2", "fma", "bmi2"},
}  # best first; flags as the kernel spells them in /proc/cpuinfo

_TYPES = {"p": "uintptr_t", "i": "int64_t", "f": "float"}
_FFI = cffi.FFI()


@functools.cache
def isa() -> str:
    """The instruction set in use, ``avx2`` or ``avx512``. Raises ValueError for an unknown METRONOME_ISA, RuntimeError
    when the processor cannot run it, or neither."""
    flags = _processor_flags()
    supported = [name for name, needs in _NEEDS.items() if needs <= flags]
    wanted = os.environ.get("METRONOME_ISA")
    if wanted is not None and wanted not in _NEEDS:
        raise ValueError(f"METRONOME_ISA={wanted!r} is not known; choose one of {sorted(_NEEDS)}")
    if wanted is not None and wanted not in supported:
        missing = sorted(_NEEDS[wanted] - flags)
        raise RuntimeError(f"METRONOME_ISA={wanted}, but this processor lacks {missing}; unset it")
    if not supported:
        raise RuntimeError(
            f"the cpu backend needs an x86-64 processor with {sorted(_NEEDS['avx2'])}; this one lacks "
            f"{sorted(_NEEDS['avx2'] - flags)}. METRONOME_BACKEND=reference runs anywhere, slowly"
        )
    return wanted or supported[0]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded native library. Raises RuntimeError when it is missing or disagrees with the AVX2 one."""
    chosen = _load(isa())
    if isa() == "avx512":
        _compare(chosen, _load("avx2"))
    return chosen


def bind(name: str, arguments: str) -> Callable[..., int]:
    """The native function ``name``. ``arguments`` has a letter for each argument: p address, i 64-bit integer, f float.

    Every function returns a 64-bit integer: 0, or what the function's own comment says. Raises as `library` does."""
    return _bind(library(), name, arguments)


def _bind(lib: ctypes.CDLL, name: str, arguments: str) -> Callable[..., int]:
    address = ctypes.cast(lib[name], ctypes.c_void_p).value
    function: Callable[..., int] = _FFI.cast(f"int64_t(*)({', '.join(_TYPES[a] for a in arguments)})", address)
    return function


def _processor_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError as error:
        raise RuntimeError(f"the cpu backend runs on Linux only: cannot read /proc/cpuinfo ({error})") from error
    for line in text.splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _load(name: str) -> ctypes.CDLL:
    path = Path(os.environ.get("METRONOME_NATIVE") or Path(__file__).parent / f"_native_{name}.so")
    if not path.exists():
        raise RuntimeError(
            f"the native CPU kernels are not built: {path} is missing. Run `pip install -e .` in the repository's root "
            "(it needs g++; on Debian and Ubuntu: apt-get install g++)"
        )
    _load_openmp()
    _keep_freed_memory()
    return ctypes.CDLL(str(path))


@functools.cache
def _load_openmp() -> None:
    # Our library has no OpenMP runtime of its own and takes torch's, so that one pool serves both and
    # torch.set_num_threads governs it.
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _keep_freed_memory() -> None:
    # By default glibc gives large freed blocks back to the kernel and every new activation is faulted in page by page,
    # which can take ten times as long as computing it (far more in a virtual machine). Keep them for the next call.
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, never = -1, -3, 2**31 - 1
    libc.mallopt(trim_threshold, never)
    libc.mallopt(mmap_threshold, never)


def _compare(one: ctypes.CDLL, other: ctypes.CDLL) -> None:
    """Raises RuntimeError unless both libraries give equal bits for exp, log, Gumbel and normal noise, products,
    attention, sampling, sums and AdamW's update. (dMel codes need tables; the tests compare those.)"""
    x = torch.linspace(-110, 95, 999)
    results = []
    for lib in (one, other):
        exp, log = torch.empty_like(x), torch.empty_like(x)
        _bind(lib, "vec_exp", "ppi")(x.data_ptr(), exp.data_ptr(), x.numel())
        _bind(lib, "vec_log", "ppi")(exp.data_ptr(), log.data_ptr(), x.numel())
        products = [_product(lib, x[: rows * 13].view(rows, 13), x[-41 * 13 :].view(41, 13)) for rows in (1, 5, 19)]
        word, noise = torch.arange(-500, 499) * 0x0041C64E6D3B5F87, torch.empty_like(x)
        _bind(lib, "vec_gumbel", "ppi")(word.data_ptr(), noise.data_ptr(), x.numel())
        attended, sampled = _attended(lib, x[:300].view(20, 15)), _sampled(lib, x[:300].view(3, 100) / 9)
        normal = torch.empty(word.shape, dtype=torch.float64)
        _bind(lib, "vec_normal", "ppi")(word.data_ptr(), normal.data_ptr(), x.numel())
        parts = [exp, log, noise, normal, *products, attended, sampled, *_updated(lib, x / 100)]
        results.append(torch.cat([part.view(torch.int32) for part in parts]))
    if not torch.equal(*results):
        raise RuntimeError(
            "on this processor the avx512 kernels differ from the avx2 ones, which breaks the promise of equal bits; "
            "set METRONOME_ISA=avx2"
        )


def _updated(lib: ctypes.CDLL, x: torch.Tensor) -> list[torch.Tensor]:
    """AdamW's weights and moments, and the sum of squares (fp64)."""
    weight, first, second = x.flip(0), x / 3, x * x
    numbers = (0.99, 0.1, 0.95, 0.05, 1e-3, 0.3, 1e-8)
    pointers = [t.data_ptr() for t in (weight, x, first, second)]
    _bind(lib, "adamw_f32", "ppppifffffff")(*pointers, x.numel(), *numbers)
    partial, total = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
    _bind(lib, "dot_f32", "ppipp")(x.data_ptr(), x.data_ptr(), x.numel(), partial.data_ptr(), total.data_ptr())
    return [weight, first, second, total]


def _product(lib: ctypes.CDLL, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    (rows, cols), (columns, _) = x.shape, w.shape
    panels = torch.zeros(-(-columns // 16) * 16 * cols)
    out = torch.empty(rows, columns)
    _bind(lib, "pack_rows_f32", "piipi")(w.data_ptr(), columns, cols, panels.data_ptr(), 0)
    arguments = (x.data_ptr(), cols, rows, panels.data_ptr(), columns, cols, out.data_ptr(), columns)
    _bind(lib, "linear_f32_f32", "piipiipi")(*arguments)
    return out.view(-1)


def _attended(lib: ctypes.CDLL, rows: torch.Tensor) -> torch.Tensor:
    """Attention of one head of width 5 over ``rows`` [T, 15], which hold its queries, keys and values."""
    count = rows.shape[0]
    q, k, v = (torch.sin(part).contiguous() for part in rows.split(5, dim=1))
    slot, start = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    offset = torch.tensor([0, count], dtype=torch.int32)
    proj, out = torch.linspace(-1, 1, 5 * 7).view(5, 7), torch.empty(count, 5)
    _bind(lib, "attention_f32", "pipipipipppppiiiiiiiifpp")(
        q.data_ptr(), 5, k.data_ptr(), 5, v.data_ptr(), 5, q.data_ptr(), 5, proj.data_ptr(), 0, slot.data_ptr(),
        start.data_ptr(), offset.data_ptr(), 1, 1, 1, 5, 5, 7, count, 0, 0.4, out.data_ptr(), 0,
    )  # fmt: skip
    return out.view(-1)


def _sampled(lib: ctypes.CDLL, logits: torch.Tensor) -> torch.Tensor:
    """Tokens, log-probs and digests, as the bits of floats."""
    rows, vocab = logits.shape
    key, kind = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    allowed, logp = torch.arange(vocab)[None] % 7 != 3, torch.empty(rows)
    token, digest = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.int64)
    _bind(lib, "sample_rows", "pifpppiiippp")(
        logits.data_ptr(), vocab, 0.8, key.data_ptr(), allowed.data_ptr(), kind.data_ptr(), rows, vocab, 1,
        token.data_ptr(), logp.data_ptr(), digest.data_ptr(),
    )  # fmt: skip
    return torch.cat([logp, token.view(torch.float32), digest.view(torch.float32)])
