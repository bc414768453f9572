"""Which kernels Triton would compile: its own binder for sm_90, on CPU tensors, with nothing compiled or launched.

    python -m tests.kernels.triton.binder        # without TRITON_INTERPRET; prints what varies as JSON

A fake driver says that there is a card of sm_90. The backend's host code runs as it does in the interpreter, but each
launch goes through Triton's binder, which decides from types, addresses and integers which compiled kernel the call
needs; there a hook of Triton's notes the key and says that nothing is to be compiled. No values are computed: outputs
hold what memory held. Where a kernel would tell that something is wrong (arguments named ``status…`` or ``noticed``),
nothing is.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

COUNTS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 127, 128, 256, 999, 1000)
SOME = (1, 2, 16, 17, 65, 1000)
MOST = max(COUNTS)
FORMS = {"gather_kernel", "grouped_kernel"}  # of one product: `tiles.expert_form` chooses by the row count


class Binding(NamedTuple):
    """One compiled kernel: its name, how it is compiled, and of each argument what Triton compiles in."""

    kernel: str
    options: str
    arguments: tuple[tuple[str, str], ...]


# ---- Triton's binder without a card ----


class Sm90:
    """Of Triton's driver what binding asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def prepare() -> None:
    """Loads the backend as if a card were there, then lets its host code run on CPU tensors."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, which makes kernels Python functions; nothing would be bound")
    there, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        package = importlib.import_module("kernels.triton")
        modules = [
            importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)
        ]
        importlib.import_module("kernels.dispatch").use_backend("triton")
    finally:
        torch.cuda.is_available = there
    for module in modules:
        for name, value in (("INTERPRET", True), ("PLACE", "cpu"), ("DEVICE", "cpu")):
            if hasattr(module, name):
                setattr(module, name, value)
    driver.set_active(Sm90())
    bind = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        for name, x in zip(self.arg_names, args, strict=False):
            if name.startswith(("status", "noticed")):
                x.zero_()
        return bind(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run


@contextmanager
def bindings() -> Iterator[set[Binding]]:
    """What was bound within the block."""
    seen: set[Binding] = set()

    def note(*, key: str, repr: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        hints, fixed = compile["configs"][0], compile["constants"]
        arguments = [
            (name, f"{kind} {fixed[i,]}" if (i,) in fixed else " ".join([kind, *(f"{k}={v}" for k, v in hints[i,])]))
            if (i,) in fixed or (i,) in hints
            else (name, kind)
            for i, (name, kind) in enumerate(compile["signature"].items())
        ]
        options = f"{compile['num_warps']} warps, {compile['num_stages']} stages, fused {compile['enable_fp_fusion']}"
        seen.add(Binding(fn.name, options, tuple(arguments)))
        return True  # nothing is to be compiled

    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield seen
    finally:
        triton.knobs.runtime.jit_cache_hook = None


def variations(found: dict[str, set[Binding]]) -> list[str]:
    """One line for each argument by which calls that must run the same kernels would run others; ``found`` has what
    each call bound. Of the two FORMS each is compared over the calls that take it."""
    calls = list(found)
    names = {call: frozenset("either form" if b.kernel in FORMS else b.kernel for b in found[call]) for call in calls}
    lines = [
        f"{call} runs {sorted(names[call])}, {calls[0]} {sorted(names[calls[0]])}"
        for call in calls
        if names[call] != names[calls[0]]
    ]
    for kernel in sorted({b.kernel for bound in found.values() for b in bound}):
        kept = {call: {b for b in bound if b.kernel == kernel} for call, bound in found.items()}
        first, *others = [call for call in calls if kept[call]]
        told = set()
        for call in others:
            for other in sorted(kept[call] - kept[first]):
                # The form it is most like: a kernel may have several uses in one call (a product and its gradients).
                near = min(kept[first], key=lambda b, other=other: len(_differences(b, other)))
                for name, was, now in _differences(near, other):
                    if (name, now) not in told:
                        lines.append(f"{kernel}: {name} is {was!r} in {first}, {now!r} in {call}")
                    told.add((name, now))
            if not kept[call] - kept[first] and kept[first] - kept[call]:
                lines.append(f"{kernel}: {call} runs fewer variants of it than {first}")
    return lines


def _differences(a: Binding, b: Binding) -> list[tuple[str, str, str]]:
    pairs = [("options", a.options, b.options)]
    pairs += [(name, was, now) for (name, was), (_, now) in zip(a.arguments, b.arguments, strict=True)]
    return [(name, was, now) for name, was, now in pairs if was != now]


# ---- rows that lie anywhere ----

PLACES = ("odd", "packed", "strided", "columns", "shifted")
_memory: dict[torch.dtype, Tensor] = {}


def memory(dtype: torch.dtype) -> Tensor:
    if dtype not in _memory:
        _memory[dtype] = torch.zeros(3 * (MOST + 8) * 2 * 3 * 256, dtype=dtype)
    return _memory[dtype]


def place(rows: int, columns: int, dtype: torch.dtype, how: str) -> Tensor:
    """[rows, columns], a view: the first rows of a buffer, rows from an odd one on, every other row, the middle third
    of wider rows (as a fused projection is split), or rows that begin at an address that 16 does not divide."""
    stride, first = {
        "packed": (columns, 0),
        "odd": (columns, columns * (1 + 2 * (rows % 2))),
        "strided": (2 * columns, 0),
        "columns": (3 * columns, columns),
        "shifted": (columns, 1),
    }[how]
    return memory(dtype).as_strided((rows, columns), (stride, 1), first)


# ---- every op, as functions of (rows, where they lie) ----

Call = Callable[[int, str], None]


def cases(dtype: torch.dtype, width: int) -> dict[str, Call]:
    """Forward and, where there is one, backward. ``width`` is that of rows, and of heads."""
    from kernels import ops
    from kernels.layout import SPLIT_TOKENS, AdamWStep, PagedKV, Segments

    def rows(n: int, how: str, columns: int = width, kind: torch.dtype = dtype) -> Tensor:
        return place(n, columns, kind, how)

    def dense(n: int, how: str, columns: int, kind: torch.dtype) -> Tensor:
        """Of an op that takes contiguous rows only."""
        return rows(n, how if how == "shifted" else "odd", columns, kind)

    def heads(n: int, how: str, count: int, each: int = width) -> Tensor:
        return place(n, count * each, dtype, how).unflatten(1, (count, each))

    def both(op: Callable[..., Tensor], how: str, *inputs: Tensor) -> None:
        """Without and with gradients of all ``inputs``; the gradient that comes from above lies as rows do."""
        with torch.no_grad():
            op(*inputs)
        out = op(*(x.detach().requires_grad_() for x in inputs))
        above = place(out.shape[0], out[0].numel(), out.dtype, how) if out.dim() > 1 else torch.zeros_like(out)
        out.backward(above.view(out.shape) if out.dim() > 1 else above)

    def segments(n: int) -> dict[str, Segments]:
        """One sequence; two; many of one row each, which go on where they were."""
        cut = max(1, n // 3)
        two = ([0, 1], [0, 0], [cut, n - cut]) if n > 1 else ([1], [0], [1])
        return {"one": Segments.build([0], [0], [n]), "two": Segments.build(*two)}

    def decode(n: int) -> Segments:
        return Segments.build(list(range(n)), [3 + i % 70 for i in range(n)], [1] * n)

    w, taps, scale = rows(40, "packed"), torch.zeros(width, 4), torch.zeros(width, dtype=dtype)
    linear = ops.pack_linear(w.clone().requires_grad_())
    experts = ops.pack_experts((torch.zeros(3, 40, width, dtype=dtype).requires_grad_(),))
    table, state = torch.zeros(3 * 5, width, dtype=dtype), torch.zeros(MOST, 3, width, dtype=dtype)
    proj, tau = torch.zeros(3, 70, dtype=dtype), torch.zeros(MOST + 8)
    allowed, bias = torch.ones(3, 50, dtype=torch.bool), torch.zeros(8)
    numbers = torch.zeros(2 * MOST + 8, dtype=torch.int64)
    pages = 2 + MOST // SPLIT_TOKENS
    cache = PagedKV(
        torch.zeros(2 * pages, 2, width, SPLIT_TOKENS, dtype=dtype),
        torch.zeros(2 * pages, 2, SPLIT_TOKENS, width, dtype=dtype),
        torch.arange(MOST * pages, dtype=torch.int32).remainder(2 * pages).view(MOST, pages),
    )
    step = AdamWStep(*[0.5] * len(AdamWStep.__dataclass_fields__))

    def attend(n: int, how: str, at: Segments, **more: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, rel, proj: ops.attention(q, k, v, rel, proj, at, scale=0.2, window=100, **more)

    def attention(n: int, how: str) -> None:
        inputs = heads(n, how, 4), heads(n, how, 2), heads(n, how, 2), heads(n, how, 4, 3), proj
        for at in segments(n).values():
            both(attend(n, how, at, tau=tau[n % 3 :][:n]), how, *inputs)

    def pages_of_sessions(n: int, how: str) -> None:
        inputs = heads(n, how, 4), heads(n, how, 2), heads(n, how, 2), heads(n, how, 4, 3), proj
        with torch.no_grad():
            for at in (decode(n), *segments(n).values(), Segments.build([1], [n % 70], [n])):
                attend(n, how, at, cache=cache, first=64)(*inputs)

    def conv(n: int, how: str) -> None:
        for at in segments(n).values():
            both(lambda x, w, at=at: ops.short_conv(x, w, at), how, rows(n, how), taps)

    def conv_of_residual(n: int, how: str) -> None:
        for at in segments(n).values():
            added = rows(n, how)
            both(lambda x, w, y, at=at: ops.short_conv(x, w, at, addend=y), how, rows(n, how), taps, added)
            with torch.no_grad():
                ops.short_conv(rows(n, how), taps, at, state, added)

    def conv_of_sessions(n: int, how: str) -> None:
        with torch.no_grad():
            for at in (decode(n), *segments(n).values()):
                ops.short_conv(rows(n, how), taps, at, state)

    def codes(n: int, how: str) -> None:
        for kind in (torch.uint8, torch.int64):
            both(lambda t, kind=kind: ops.embedding_sum(rows(n, how, 3, kind), t, 5), how, table)

    def mixed(n: int, how: str) -> None:
        both(lambda x: ops.linear(x, linear, torch.float32), how, rows(n, how))

    def draw(n: int, how: str) -> None:
        for temperature in (0.7, 1.0, 0.0):
            ops.sample(rows(n, how, 50, torch.float32), temperature, numbers[n % 3 :][:n], allowed, numbers[:n])

    def score(n: int, how: str) -> None:
        logits = rows(n, how, 50, torch.float32)
        both(lambda x: ops.logprob(x, numbers[n % 3 :][:n], 0.7, allowed, numbers[:n])[0], how, logits)

    either = {
        "linear": lambda n, how: both(lambda x: ops.linear(x, linear), how, rows(n, how)),
        "linear to fp32": mixed,
        "expert_linear": lambda n, how: both(
            lambda x: ops.expert_linear(x, experts, numbers[: 2 * n].int(), 2), how, rows(n, how)
        ),
        "swiglu": lambda n, how: both(ops.swiglu, how, rows(n, how, 2 * width)),
        "gelu": lambda n, how: both(ops.gelu, how, rows(n, how)),
        "moe_combine": lambda n, how: both(
            ops.moe_combine, how, dense(2 * n, how, width, dtype), dense(n, how, 2, torch.float32)
        ),
        "rms_norm": lambda n, how: both(lambda x, w: ops.rms_norm(x, w, 1e-6), how, rows(n, how), scale),
        "rms_norm of heads": lambda n, how: both(lambda x, w: ops.rms_norm(x, w, 1e-6), how, heads(n, how, 4), scale),
        "short_conv": conv,
        "short_conv of sessions": conv_of_sessions,
        "short_conv with a residual": conv_of_residual,
        "attention": attention,
        "attention of sessions": pages_of_sessions,
        "embedding_sum": codes,
    }
    if dtype != torch.float32:
        return either
    return either | {
        "route": lambda n, how: both(lambda x: ops.route(x, bias, 2, 1)[1], how, rows(n, how, 9, torch.float32)),
        "logprob": score,
        "sample": draw,
        "dot": lambda n, how: ops.dot(rows(n, how).flatten(), rows(n, how).flatten()) and None,
        "adamw": lambda n, how: ops.adamw(*(torch.zeros(n) for _ in range(4)), step),
    }


def bound_by(call: Call, places: tuple[str, ...] = PLACES, counts: tuple[int, ...] = COUNTS) -> dict[str, set[Binding]]:
    """What every call binds: ``counts`` rows from an odd one on, SOME in the other places."""
    found = {}
    for how in places:
        for n in counts if how == "odd" else SOME:
            with bindings() as seen:
                call(n, how)
            found[f"{n} rows, {how}"] = seen
    return found


def controls() -> dict[str, list[str]]:
    """What `variations` says of a pointer that lies anywhere, a row count that is compiled in, and a tile that follows
    the row count."""
    from kernels.triton import elementwise, linear, tiles

    said = {}
    aligned, kernel, tile = elementwise.aligned, elementwise.swiglu_kernel, linear.product_tile
    elementwise.aligned = lambda x: x
    said["pointer"] = variations(bound_by(cases(torch.float32, 64)["swiglu"], ("odd", "shifted"), SOME))
    elementwise.aligned = aligned
    elementwise.swiglu_kernel = triton.jit(kernel.fn)
    said["row count"] = variations(bound_by(cases(torch.float32, 64)["swiglu"], ("odd",), SOME))
    elementwise.swiglu_kernel = kernel
    numbers = iter(range(1000))
    linear.product_tile = lambda dtype: tiles.Tile(16 << (next(numbers) // 4 % 2), 64, 32, warps=4, stages=3)
    said["tile"] = variations(bound_by(cases(torch.float32, 64)["linear"], ("odd",), SOME))
    linear.product_tile = tile
    said["none"] = variations(bound_by(cases(torch.float32, 64)["swiglu"], ("odd", "shifted"), SOME))
    return said


def main() -> None:
    prepare()
    from kernels.triton.specs import compile_specs

    varied, kernels = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        for width, places, counts in ((64, PLACES, COUNTS), (61, ("odd", "shifted"), SOME)):
            for name, call in cases(dtype, width).items():
                found = bound_by(call, places, counts)
                title = f"{name}, {dtype}, rows of {width}"
                varied[title] = variations(found)
                every = set.intersection(*({b.kernel for b in bound} - FORMS for bound in found.values()))
                kernels[title] = sorted(every) + sorted({b.kernel for b in set.union(*found.values())} & FORMS)
    launched = sorted({spec.fn.__name__ for spec in compile_specs()})
    print("RESULTS", json.dumps({"varied": varied, "kernels": kernels, "launched": launched, "controls": controls()}))


if __name__ == "__main__":
    main()
