"""What is launched does not know the row count: one kernel, one tile, one alignment for every number of rows.

Kernels are not run here: `run` is replaced by a recorder that notes what Triton would compile a kernel for. Row counts
are 0 to 4096; rows begin anywhere in memory, as a batch's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.triton import (
    attention_backward,
    attention_forward,
    attention_parts,
    conv,
    elementwise,
    embedding,
    experts,
    gelu,
    launch,
    linear,
    norm,
    router,
    sampling,
    tables,
    tiles,
)
from tests.kernels.backend import device
from tests.kernels.contract import DTYPES, normal

MODULES = (
    attention_backward, attention_forward, conv, elementwise, embedding, experts, gelu, linear, norm, router,
    sampling,
)  # fmt: skip
MOST = 4096
SOME = sorted({*range(1, 20), 31, 32, 33, 63, 64, 65, *range(90, MOST, 777), MOST - 1, MOST})


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> set[tuple[Any, ...]]:
    """What was launched since it was last cleared."""
    seen: set[tuple[Any, ...]] = set()

    def record(kernel: Any, grid: tuple[int, ...], device: Any, tile: Any, *args: Any, **constants: Any) -> None:
        given = dict(zip([name for name in kernel.arg_names if name not in constants], args, strict=True))
        for name, x in given.items():
            if name.startswith("status"):
                x.zero_()  # what the kernel would have found: nothing wrong
        if 0 not in grid:
            how = tuple(_compiled_for(kernel, name, x) for name, x in given.items())
            seen.add((kernel.__name__, tile, tuple(constants.items()), given.get("a_row") == 1 or how))

    for module in MODULES:
        monkeypatch.setattr(module, "run", record)
    return seen


def _compiled_for(kernel: Any, name: str, x: Any) -> Any:
    """Of an argument, what Triton compiles in; and the value itself of a size that a sum could follow.

    The gradient of a linear layer's weights (``a_row`` is 1), a sum over rows, is compared by its tile alone."""
    options = kernel.kwargs if launch.INTERPRET else vars(kernel)
    if isinstance(x, Tensor):
        anywhere = name in (options["do_not_specialize_on_alignment"] or ())
        return x.dtype, anywhere or x.data_ptr() % 16 == 0
    if isinstance(x, float):
        return float
    if name in (options["do_not_specialize"] or ()):
        return int
    specialised = x == 1, x % 16 == 0
    return specialised if name.endswith(("_row", "_head")) else (*specialised, x)


# ---- every op, as functions of (rows taken, whether to differentiate) ----

Call = Callable[[slice, bool], None]


def there(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(seed, *shape, dtype=dtype).to(device())


def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device())


def differentiate(op: Callable[..., Tensor], needs: bool, *inputs: Tensor) -> None:
    leaves = [x.detach().requires_grad_(needs and x.is_floating_point()) for x in inputs]
    out = op(*leaves)
    if needs:
        out.backward(torch.zeros_like(out))


def one(rows: slice, start: int = 0) -> Segments:
    count = rows.stop - rows.start
    return Segments.build([0], [start], [count]) if count else Segments.build([], [], [])


def cases(dtype: torch.dtype, width: int) -> dict[str, Call]:
    x, wide = there(1, 2 * MOST + 16, width, dtype=dtype), there(2, MOST + 8, 2 * width, dtype=dtype)
    w, taps, scale = there(3, 20, width, dtype=dtype), there(4, width, 4), there(5, width, dtype=dtype)
    heads = there(12, MOST + 8, 4, width, dtype=dtype)
    table, codes = there(6, 3 * 5, width, dtype=dtype), zeros(MOST + 8, 3, dtype=torch.uint8)
    expert, packed, many = zeros(2 * MOST + 16, dtype=torch.int32), ops.pack_linear(w), ops.pack_experts((w[None],))
    logits, ids, allowed = there(7, MOST + 8, width), zeros(MOST + 8), torch.ones_like(w[:3, :width], dtype=torch.bool)
    share, state = there(8, MOST + 8, 2), there(9, 2, 3, width, dtype=dtype)
    q, k, rel = (there(n, MOST + 8, h, c, dtype=dtype) for n, (h, c) in enumerate(((4, width), (2, width), (4, 3))))
    proj, tau = there(10, 3, 70, dtype=dtype), there(11, MOST + 8)
    pages = MOST // SPLIT_TOKENS + 2
    cache = PagedKV(
        zeros(pages, 2, width, SPLIT_TOKENS, dtype=dtype),
        zeros(pages, 2, SPLIT_TOKENS, width, dtype=dtype),
        torch.arange(pages, dtype=torch.int32, device=device())[None].contiguous(),
    )
    how = {"scale": 0.2, "window": 100}

    def pair(r: slice) -> slice:
        return slice(2 * r.start, 2 * r.stop)

    def no_gradient(op: Callable[[slice], Any]) -> Call:
        return lambda r, _: op(r)

    return {
        "linear": lambda r, g: differentiate(lambda x: ops.linear(x, packed), g, x[r]),
        "expert_linear": lambda r, g: differentiate(lambda x: ops.expert_linear(x, many, expert[pair(r)], 2), g, x[r]),
        "swiglu": lambda r, g: differentiate(ops.swiglu, g, wide[r]),
        "gelu": lambda r, g: differentiate(ops.gelu, g, x[r]),
        "moe_combine": lambda r, g: differentiate(ops.moe_combine, g, x[pair(r)], share[r]),
        "rms_norm": lambda r, g: differentiate(lambda x, w: ops.rms_norm(x, w, 1e-6), g, x[r], scale),
        "rms_norm of heads": lambda r, g: differentiate(
            lambda x, w: ops.rms_norm(x, w, 1e-6), g, heads[r], scale
        ),
        "short_conv": lambda r, g: differentiate(lambda x, w: ops.short_conv(x, w, one(r)), g, x[r], taps),
        "short_conv with state": no_gradient(lambda r: ops.short_conv(x[r], taps, one(r, r.start % 3), state)),
        "attention": lambda r, g: differentiate(
            lambda q, k, v, rel, proj: ops.attention(q, k, v, rel, proj, one(r), tau=tau[r], **how),
            g, q[r], k[r], k[r], rel[r], proj,
        ),
        "attention with cache": no_gradient(
            lambda r: ops.attention(q[r], k[r], k[r], rel[r], proj, one(r, r.start), cache=cache, **how)
        ),
        "route": lambda r, g: differentiate(lambda x: ops.route(x, scale[2:].float(), 1, 2)[1], g, logits[r]),
        "embedding_sum": lambda r, g: differentiate(lambda t: ops.embedding_sum(codes[r], t, 5), g, table),
        "logprob": lambda r, g: differentiate(
            lambda x: ops.logprob(x, ids[r], 0.7, allowed, ids[r])[0], g, logits[r]
        ),
        "sample": no_gradient(lambda r: ops.sample(logits[r], 0.7, ids[r], allowed, ids[r])),
    }  # fmt: skip


NAMES = (
    "linear", "expert_linear", "swiglu", "gelu", "moe_combine", "rms_norm", "rms_norm of heads", "short_conv",
    "short_conv with state", "attention", "attention with cache", "route", "embedding_sum", "logprob", "sample",
)  # fmt: skip
FORMS = {"gather_kernel", "grouped_kernel"}


def of_rows(call: Call, launches: set[Any], rows: int, needs: bool) -> frozenset[Any]:
    launches.clear()
    call(slice(rows % 3, rows % 3 + rows), needs)
    return frozenset(launches)


def without_forms(launched: frozenset[Any]) -> frozenset[Any]:
    """Gather and grouped as one: their tile, and what both are given."""
    return frozenset(("either", *what[1:3]) if what[0] in FORMS else what for what in launched)


@pytest.mark.parametrize("name", NAMES)
def test_every_row_count(name: str, launches: set[Any]) -> None:
    """Forward, for every number of rows from 0 to 4096; of attention, whose calls are long, every seventh and SOME."""
    call = cases(torch.float32, 64)[name]
    assert not of_rows(call, launches, 0, False)
    counts = {*range(1, MOST + 1, 7 if name.startswith("attention") else 1), *SOME}
    found = {of_rows(call, launches, rows, False) for rows in counts}
    assert len(found) == (2 if name == "expert_linear" else 1), found
    assert len({without_forms(launched) for launched in found}) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [61, 64, 256])
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_gradients(name: str, width: int, dtype: torch.dtype, launches: set[Any]) -> None:
    call = cases(dtype, width)[name]
    found = {without_forms(of_rows(call, launches, rows, True)) for rows in SOME}
    assert len(found) == 1, found
    assert next(iter(found))


def test_controls(launches: set[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that follows the row count, and an alignment that follows where rows lie, are seen."""
    call = cases(torch.float32, 64)["swiglu"]
    monkeypatch.setattr(elementwise, "aligned", lambda x: x)
    shifted = there(1, 4 * 128 + 1)[1:].view(4, 128)
    before = of_rows(call, launches, 4, False)
    ops.swiglu(shifted)
    assert len(launches) == 2 and before < launches
    call = cases(torch.float32, 64)["linear"]
    rows_seen = iter(range(10))
    monkeypatch.setattr(
        linear, "product_tile", lambda dtype: tiles.Tile(16, 64, 32 * (1 + next(rows_seen) % 2), warps=4, stages=3)
    )
    assert len({of_rows(call, launches, rows, False) for rows in (4, 5)}) == 2


# ---- tiles, alone ----


def test_form_of_experts_follows_the_row_count_and_its_tile_does_not() -> None:
    forms = [tiles.expert_form(rows) for rows in range(MOST + 1)]
    assert forms == ["gather"] * (tiles.GATHER_ROWS + 1) + ["grouped"] * (MOST - tiles.GATHER_ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_tiles_lie_by_position(dtype: torch.dtype) -> None:
    """Tiles are aligned by absolute position wherever a call begins, and parts of keys are parts of a page."""
    size = attention_parts.sizes(dtype, 32, 8, 128)
    assert SPLIT_TOKENS % size["KEYS"] == 0 and size["KEYS"] == tiles.attention_tile(dtype).n
    queries = size["ROWS"] // size["GROUP_PAD"]
    for start in (0, 5, 777, MOST):
        for length in (1, 2, 63, 64, 65, 1000):
            segments = Segments.build([0], [start], [length])
            found = tables.tiles_of(tables.Host.of(segments), queries)
            assert (found[:, 4] % queries == 0).all()
            assert found[0, 4] <= start and found[-1, 4] + queries >= start + length
            assert len(found) == (start + length - 1) // queries - start // queries + 1


def test_memory_is_copied_only_where_it_must() -> None:
    x = there(2, 9, 64)
    for other in (x, torch.cat([x, x], dim=1)[:, 64:], x[:1].expand(9, -1)):
        assert launch.aligned(other).data_ptr() == other.data_ptr()
    shifted = x.new_empty(9 * 64 + 1)[1:].view(9, 64).copy_(x)
    for other in (shifted, x[:, 1:], x.T):
        copy = launch.aligned(other)
        assert copy.data_ptr() % launch.ALIGN == 0 and torch.equal(copy[:, : other.shape[1]], other)
