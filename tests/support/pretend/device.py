"""A pretend GPU: torch's PrivateUse1 device, written in Python, so that the whole program runs with its tensors on a
device of their own where there is no GPU.

A tensor on it wraps a CPU tensor, with which everything is computed, so bits are the CPU's. What it has of a GPU is the
rules: an op with tensors of both devices raises as CUDA's does and names the program's line; and the `ledger` counts
what a real device would have been asked for: launches, copies, and each time that the host would have waited.

`install` must run before autograd first does in a process (its threads are counted out then), and it cannot be undone:
so tests use it in processes of their own (`tests.support.pretend.run`). It rests on torch's experimental
``_setup_privateuseone_for_python_backend``, which torch 2.11 and 2.13 have.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

DEVICE = "pretend"
ROOT = Path(__file__).resolve().parents[3]

aten = torch.ops.aten

CROSS = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
"""May have tensors of two devices."""

INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
"""May have indices on the CPU, if what is indexed lies on the device."""

WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.equal.default, aten.repeat_interleave.Tensor,
    aten.bincount.default,
}  # fmt: skip
"""The host needs their result, or its size."""

VIEWS = {
    aten.view.default, aten.view.dtype, aten._unsafe_view.default, aten.select.int, aten.slice.Tensor, aten.unbind.int,
    aten.split.Tensor, aten.split_with_sizes.default, aten.detach.default, aten.t.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.expand.default, aten.as_strided.default,
    aten.permute.default, aten.alias.default, aten.unfold.default, aten.view_as_real.default, aten.diagonal.default,
    aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default, aten.empty_strided.default,
    aten.lift_fresh.default, aten.squeeze.dims, aten.reshape.default, aten._reshape_alias.default,
}  # fmt: skip
"""Launch nothing on a device."""


@dataclass
class Ledger:
    """What a device would have been asked for since the last `clear`."""

    launches: Counter[str] = field(default_factory=Counter)  # torch's own kernels, by name
    kernels: Counter[str] = field(default_factory=Counter)  # ours: ops, or Triton kernels where its host code runs
    waits: Counter[str] = field(default_factory=Counter)  # the host waits for the device, by reason
    copies: int = 0  # to the device, whether the host waits or not
    copied_bytes: int = 0
    reads: int = 0  # copies to the host; each waits
    places: Counter[tuple[str, str]] = field(default_factory=Counter)  # (what, the program's line), when `trace` is set
    trace: bool = False

    def clear(self) -> None:
        for counter in (self.launches, self.kernels, self.waits, self.places):
            counter.clear()
        self.copies = self.copied_bytes = self.reads = 0

    def launch(self, name: str) -> None:
        self.launches[name] += 1
        self._note(f"launch {name}")

    def kernel(self, name: str) -> None:
        self.kernels[name] += 1
        self._note(f"kernel {name}")

    def wait(self, reason: str) -> None:
        self.waits[reason] += 1
        self._note(f"wait, {reason}")

    def copy(self, x: Tensor, waits: bool) -> None:
        """Of the CPU's ``x`` to the device."""
        self.copies += 1
        self.copied_bytes += x.numel() * x.element_size()
        if waits:
            self.wait("copy to the device")
        else:
            self._note("copy to the device")

    def read(self) -> None:
        self.reads += 1
        self.wait("copy to the host")

    def totals(self) -> dict[str, int]:
        """``{"kernels": 86, "launches": 12, "waits": 1, "copies": 1, "copied_bytes": 2048, "reads": 1}``"""
        counted = {name: sum(getattr(self, name).values()) for name in ("kernels", "launches", "waits")}
        return counted | {"copies": self.copies, "copied_bytes": self.copied_bytes, "reads": self.reads}

    def _note(self, what: str) -> None:
        if self.trace:
            self.places[what, where()] += 1


ledger = Ledger()


def where() -> str:
    """The innermost line of the program's, for one of our ops the line that calls it: ``model/logprob.py:63 in
    logprob``."""
    passed = (Path(__file__).parent, ROOT / "kernels/ops.py")
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not any(path.is_relative_to(one) for one in passed):
            return f"{path.relative_to(ROOT)}:{frame.lineno} in {frame.name}"
    return "outside the program"


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device; ``raw``, on the CPU, holds its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, requires_grad: bool = False) -> PretendTensor:
        out = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=f"{DEVICE}:0",
            requires_grad=requires_grad,
        )
        out.raw = raw
        return out  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PretendTensor({self.raw!r})"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else repr(self)

    def data_ptr(self) -> int:
        return self.raw.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        """Another tensor's memory, and its shape. Autograd is not told, as with torch's own."""
        if not isinstance(value, PretendTensor):
            raise TypeError(f"incompatible tensor type: {self.device} cannot take the memory of {value.device}")
        self.raw = value.raw
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first ({where()})")

    def tolist(self) -> Any:
        ledger.wait("tolist")
        return self.raw.tolist()

    def __reduce_ex__(self, protocol: int) -> Any:
        ledger.wait("pickle")
        return PretendTensor, (self.raw.detach(), self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(self.raw.clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.is_inference_mode_enabled() and func._can_decompose():  # elsewhere torch has done so already
            return func.decompose(*args, **kwargs)
        _check(func, args, kwargs)
        _note(func, args, kwargs)
        target = kwargs.get("device")
        leaves = func is aten._to_copy.default and target is not None and torch.device(target).type == "cpu"
        if "device" in kwargs and not leaves:
            kwargs["device"] = torch.device("cpu")
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if leaves or func is aten._local_scalar_dense.default or not isinstance(result, Tensor | tuple | list):
            return result
        if isinstance(given := kwargs.get("out"), PretendTensor):
            if given.shape != given.raw.shape:
                raise NotImplementedError(f"{func} gives its result another shape, which a wrapper cannot take")
            return given
        if func is aten.copy_.default and not isinstance(args[0], PretendTensor):
            return args[0]  # to the host
        returns = func._schema.returns
        if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
            return args[0]  # in place
        if torch.is_inference_mode_enabled() and returns and returns[0].alias_info is not None:
            base = next(x for x in _tensors(args) if isinstance(x, PretendTensor))
            if not base.is_inference():  # its views are no inference tensors either
                with torch.inference_mode(False):
                    return tree_map(_wrap, result)
        return tree_map(_wrap, result)


def _wrap(x: Any) -> Any:
    return PretendTensor(x) if isinstance(x, Tensor) else x


def bare(x: Any) -> Any:
    """The CPU tensor behind a pretend one; anything else as it is."""
    return x.raw if isinstance(x, PretendTensor) else x


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        for part in tree.values():
            yield from _tensors(part)


def _check(func: Any, args: Any, kwargs: Any) -> None:
    """CUDA's rules for tensors of two devices."""
    if func in CROSS or not str(func).startswith("aten."):
        return
    if func in INDEXED:
        base, indices = args[0], list(_tensors(args[1]))
        foreign = [x for x in indices if not isinstance(x, PretendTensor) and x.dim()]
        if not isinstance(base, PretendTensor) and len(foreign) < len(indices):
            raise RuntimeError(f"{func}: indices should be on the CPU, where the indexed tensor is ({where()})")
        for x in foreign:
            ledger.copy(x, waits=True)
        if any(not isinstance(x, PretendTensor) and x.dim() for x in _tensors(args[2:])):
            raise RuntimeError(f"{func}: values lie on the CPU, what is written to on {DEVICE} ({where()})")
        return
    foreign = [x for x in _tensors((args, kwargs)) if not isinstance(x, PretendTensor) and x.dim()]
    if foreign:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE}:0 and cpu! "
            f"({func}, a CPU tensor of {tuple(foreign[0].shape)}; {where()})"
        )


def _note(func: Any, args: Any, kwargs: Any) -> None:
    if func is aten._to_copy.default and torch.device(kwargs.get("device") or DEVICE).type == "cpu":
        ledger.read()
        return
    if func is aten.copy_.default and not isinstance(args[1], PretendTensor):
        free = bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking"))
        ledger.copy(args[1], waits=not free)
        return
    if func is aten.copy_.default and not isinstance(args[0], PretendTensor):
        ledger.read()
        return
    name = str(func).removeprefix("aten.").removesuffix(".default")
    if func in WAITS:
        ledger.wait(name)
    elif func in INDEXED and any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1])):
        ledger.wait("index by mask")
    if func not in VIEWS and func is not aten._local_scalar_dense.default:
        ledger.launch(name)


_library: torch.library.Library | None = None


def install() -> None:
    """Makes the device. Once a process, and before autograd first runs."""
    global _library
    if _library is not None:
        return
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE)
    _library = torch.library.Library("aten", "IMPL", "PrivateUse1")

    def empty(size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
              memory_format: Any = None) -> Tensor:  # fmt: skip
        return PretendTensor(torch.empty(size, dtype=dtype or torch.get_default_dtype(), device="cpu"))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
                      pin_memory: Any = None) -> Tensor:  # fmt: skip
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype(), device="cpu"))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """What ``torch.tensor(…, device=…)`` and ``x.to(device)`` end in, out of `__torch_dispatch__`'s sight."""
        if isinstance(target, PretendTensor) and not isinstance(source, PretendTensor):
            ledger.copy(source, waits=not non_blocking)
        elif isinstance(source, PretendTensor) and not isinstance(target, PretendTensor):
            ledger.read()
        bare(target).copy_(bare(source))
        return target

    def arange(*span: Any, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None) -> Tensor:
        ledger.launch("arange")
        return PretendTensor(torch.arange(*span, dtype=dtype, device="cpu"))

    for name in ("arange", "arange.start", "arange.start_step"):
        _library.impl(name, arange)
    _library.impl("_copy_from", copy_from)
    _library.impl("empty.memory_format", empty)
    _library.impl("empty_strided", empty_strided)
