"""Corrects Triton's interpreter, in which the kernels are tested where there is no GPU, so that it computes as a GPU
does.

- ``tl.dot`` calls numpy's matmul. That reads bf16 as integers, and it may give a row other bits at another place of the
  tile, because BLAS computes a matrix' last rows by another routine. A GPU's matrix unit does neither. The replacement
  is one chain in ascending k, each product and each sum rounded to fp32: the order of `kernels.reference`.
- Conversion to bf16 truncates. A GPU rounds to nearest, ties to even, and so does the replacement.
- Triton 3.6 reads a scalar as numpy 2.4 and later no longer allow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_library_cast = InterpreterBuilder.cast_impl
_library_patch = interpreter._patch_lang_tensor


def mend() -> None:
    """Replaces these functions of the interpreter, for the whole process."""
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast
    interpreter._patch_lang_tensor = _patch


def _patch(tensor: Any, scope: Any) -> None:
    _library_patch(tensor, scope)
    tensor.__index__ = lambda x: int(x.handle.data.item())


def _dot(builder: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right, out = _wide(a), _wide(b), total.data.copy()
    with np.errstate(all="ignore"):  # infinities and NaN go through as on a GPU, which does not warn either
        for k in range(left.shape[-1]):
            out += left[..., :, k, None] * right[..., k, None, :]
    return TensorHandle(out, total.dtype.scalar)


def _cast(builder: Any, x: Any, to: Any) -> Any:
    types = (x.dtype.scalar, to.scalar)
    if types == (tl.float32, tl.bfloat16):
        narrow = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(narrow, tl.bfloat16)
    if types == (tl.bfloat16, tl.float32):
        return TensorHandle(_wide(x), tl.float32)
    return _library_cast(builder, x, to)


def _wide(x: Any) -> NDArray[np.float32]:
    if x.dtype.scalar == tl.bfloat16:  # held as its 16 bits
        return np.asarray(x.data.astype(np.uint32) << 16).view(np.float32)
    if x.dtype.scalar != tl.float32:
        raise TypeError(f"tl.dot of {x.dtype.scalar}: the mended interpreter knows float32 and bfloat16")
    wide: NDArray[np.float32] = x.data
    return wide
