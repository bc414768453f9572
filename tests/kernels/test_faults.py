"""Every op of the cpu backend under odd inputs: the right numbers or a ValueError, never a crash or another's memory.

Each op is a `Case`: inputs that work, by name, and how to call it. The tests change one thing: rows, memory layout, a
pointer's alignment, a device, a type, an id, or one value to NaN or infinity.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import ops, reference
from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from tests.kernels.contract import DTYPES, SEEDS, assert_same, generator, normal, strided

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]

WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 65, 130])


@dataclass(frozen=True)
class Case:
    make: Callable[[int, int, int, torch.dtype], Inputs]  # seed, rows, width, dtype
    call: Callable[[Inputs], Outputs]
    rows: tuple[str, ...]  # inputs with a row a token, whose rows may lie apart in memory
    columns: bool = True  # those rows are float vectors of which one value can be spoilt


def _integers(seed: int, rows: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randint(0, below, (rows,), generator=generator(seed)).to(dtype)


def _linear(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"x": normal(seed, rows, width, dtype=dtype), "w": normal(seed + 1, 21, width, dtype=dtype)}


def _experts(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {
        "x": normal(seed, rows, width, dtype=dtype),
        "w": normal(seed + 1, 3, 21, width, dtype=dtype),
        "expert": _integers(seed, 2 * rows, 3, torch.int32),
    }


def _combine(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"y": normal(seed, 3 * rows, width, dtype=dtype), "weight": normal(seed + 1, rows, 3)}


def _norm(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"x": normal(seed, rows, width, dtype=dtype), "weight": normal(seed + 1, width, dtype=dtype)}


def _conv(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"x": normal(seed, rows, width, dtype=dtype), "weight": normal(seed + 1, width, 4)}


def _state_conv(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return _conv(seed, rows, width, dtype) | {"state": normal(seed + 2, 2, 3, width, dtype=dtype)}


def _segment(x: Tensor, slot: int = 0, start: int = 0) -> Segments:
    """All rows of x as one sequence."""
    rows = x.shape[0] if x.dim() else 0
    return Segments.build([slot], [start], [rows]) if rows else Segments.build([], [], [])


def _attention(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {
        "q": normal(seed, rows, 4, width, dtype=dtype),
        "k": normal(seed + 1, rows, 2, width, dtype=dtype),
        "v": normal(seed + 2, rows, 2, width, dtype=dtype),
        "rel": normal(seed + 3, rows, 4, 5, dtype=dtype),
        "rel_proj": normal(seed + 4, 5, 70, dtype=dtype),
        "tau": 1 + normal(seed + 5, rows).abs(),
    }


def _paged(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    pages = -(-rows // SPLIT_TOKENS) + 1
    return _attention(seed, rows, width, dtype) | {
        "key": torch.full((pages, 2, width, SPLIT_TOKENS), torch.nan, dtype=dtype),
        "value": torch.full((pages, 2, SPLIT_TOKENS, width), torch.nan, dtype=dtype),
        "table": torch.arange(pages, dtype=torch.int32).flip(0)[None].contiguous(),
    }


def _attend(x: Inputs) -> Outputs:
    cache = PagedKV(x["key"], x["value"], x["table"]) if "key" in x else None
    heads = (x["q"], x["k"], x["v"], x["rel"], x["rel_proj"])
    return (ops.attention(*heads, _segment(x["q"]), scale=0.2, window=100, tau=x["tau"], cache=cache),)


def _router(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return {"logits": normal(seed, rows, width + 1), "bias": normal(seed + 1, width)}


def _codes(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    codes = torch.randint(0, 5, (rows, 7), generator=generator(seed))
    return {"codes": codes, "table": normal(seed + 1, 35, width, dtype=dtype)}


def _scores(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    allowed = torch.rand(3, width, generator=generator(seed)) < 0.6
    allowed[:, width // 2] = True
    return {
        "logits": normal(seed, rows, width),
        "token": torch.full((rows,), width // 2),
        "allowed": allowed,
        "row_class": _integers(seed + 1, rows, 3),
    }


def _draws(seed: int, rows: int, width: int, dtype: torch.dtype) -> Inputs:
    return _scores(seed, rows, width, dtype) | {"token": _integers(seed + 2, rows, 2**62)}  # as keys


CASES = {
    "linear": Case(_linear, lambda x: (ops.linear(x["x"], ops.pack_linear(x["w"])),), ("x",)),
    "expert_linear": Case(
        _experts, lambda x: (ops.expert_linear(x["x"], ops.pack_experts((x["w"],)), x["expert"], 2),), ("x",)
    ),
    "swiglu": Case(
        lambda seed, rows, width, dtype: {"gate_up": normal(seed, rows, 2 * width, dtype=dtype)},
        lambda x: (ops.swiglu(x["gate_up"]),),
        ("gate_up",),
    ),
    "moe_combine": Case(_combine, lambda x: (ops.moe_combine(x["y"], x["weight"]),), ()),
    "rms_norm": Case(_norm, lambda x: (ops.rms_norm(x["x"], x["weight"], 1e-6),), ("x",)),
    "short_conv": Case(_conv, lambda x: (ops.short_conv(x["x"], x["weight"], _segment(x["x"])),), ("x",)),
    "short_conv with state": Case(
        _state_conv,
        lambda x: (ops.short_conv(x["x"], x["weight"], _segment(x["x"], 1, 2), x["state"]), x["state"]),
        ("x",),
    ),
    "attention": Case(_attention, _attend, ()),
    "attention with cache": Case(_paged, _attend, ()),
    "route": Case(_router, lambda x: ops.route(x["logits"], x["bias"], 1, 1), ("logits",)),
    "embedding_sum": Case(_codes, lambda x: (ops.embedding_sum(x["codes"], x["table"], 5),), ("codes",), False),
    "logprob": Case(
        _scores,
        lambda x: ops.logprob(x["logits"], x["token"], 0.8, x["allowed"], x["row_class"]),
        ("logits",),
    ),
    "sample": Case(
        _draws, lambda x: ops.sample(x["logits"], 0.8, x["token"], x["allowed"], x["row_class"]), ("logits",)
    ),
}
BY_NAME = pytest.mark.parametrize("name", CASES)
F64 = {"linear", "expert_linear", "swiglu", "moe_combine", "rms_norm", "short_conv", "attention", "embedding_sum"}


def _call(name: str, inputs: Inputs) -> Outputs:
    """Runs the op on copies of what it may write to."""
    written = ("state", "key", "value")
    return CASES[name].call({key: x.clone() if key in written else x for key, x in inputs.items()})


def _bits(outputs: Outputs) -> list[Tensor]:
    """NaN compares unequal to itself; its bits do not."""
    short = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return [x.view(short[x.dtype]) if x.dtype in short else x for x in outputs]


def _same(got: Outputs, expected: Outputs, what: str) -> None:
    for one, other in zip(_bits(got), _bits(expected), strict=True):
        assert_same(one, other, what)


# ---- sizes ----


@BY_NAME
@given(rows=st.sampled_from([0, 1, 2, 17, 70]), width=WIDTHS, dtype=st.sampled_from(DTYPES), seed=SEEDS)
@settings(max_examples=25)
def test_odd_sizes(name: str, rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    """No rows, one column, widths that fill no vector and no tile: close to float64 where an oracle is apt; finite."""
    inputs = CASES[name].make(seed, rows, width, dtype)
    outputs = _call(name, inputs)
    assert all(torch.isfinite(x).all() for x in outputs)
    if name in F64:
        exact = _oracle(name, {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()})
        # Loose on purpose: wrong memory or a wrong column is far off. Exact bounds are each op's own test's.
        assert torch.allclose(outputs[0].double(), exact, rtol=0.05, atol=0.05 * max(1.0, width**0.5))


def _oracle(name: str, x: Inputs) -> Tensor:
    if name == "linear":
        return reference.linear(x["x"], reference.pack_linear((x["w"],)), torch.float64)
    if name == "expert_linear":
        return reference.expert_linear(x["x"], reference.pack_experts(((x["w"],),)), x["expert"], 2)
    if name == "swiglu":
        return reference.swiglu(x["gate_up"])
    if name == "moe_combine":
        return reference.moe_combine(x["y"], x["weight"])
    if name == "rms_norm":
        return reference.rms_norm(x["x"], x["weight"], 1e-6)
    if name == "short_conv":
        return reference.short_conv(x["x"], x["weight"], _segment(x["x"]), None)
    if name == "embedding_sum":
        return reference.embedding_sum(x["codes"], x["table"], 5)
    heads = (x["q"], x["k"], x["v"], x["rel"], x["rel_proj"])
    return reference.attention(*heads, _segment(x["q"]), 0.2, 100, x["tau"], None)


# ---- memory ----


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_is_right_or_refused(name: str, dtype: torch.dtype) -> None:
    """Each input in turn with a column between its columns, transposed in memory, and backwards."""
    inputs = CASES[name].make(3, 9, 13, dtype)
    expected = _call(name, inputs)
    refused = 0
    for key, x in inputs.items():
        wide = torch.stack([x, x], -1)[..., 0]
        turned = x.transpose(0, -1).contiguous().transpose(0, -1)
        for layout in (wide, turned):
            assert torch.equal(layout, x) or key in ("key", "value")
            try:
                _same(CASES[name].call(inputs | {key: layout}), expected, f"{name}: {key} strides {layout.stride()}")
            except ValueError:
                refused += 1
    assert refused > 0


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("aligned", [False, True])
def test_misaligned_pointers(name: str, dtype: torch.dtype, aligned: bool) -> None:
    """Inputs that begin one element, or one byte, past a boundary of 64 bytes."""
    inputs = CASES[name].make(5, 11, 19, dtype)

    def moved(x: Tensor) -> Tensor:
        size = x.element_size()
        memory = bytearray(x.numel() * size + 192)
        base = torch.frombuffer(memory, dtype=torch.uint8)
        offset = -base.data_ptr() % 64 + (size if aligned else 1)
        copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape)
        base[offset : offset + x.numel() * size] = x.contiguous().view(-1).view(torch.uint8)
        assert copy.data_ptr() % 64 == (size if aligned else 1)
        return copy

    expected = _call(name, inputs)
    _same(CASES[name].call({key: moved(x) for key, x in inputs.items()}), expected, name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.rows])
def test_huge_strides(name: str) -> None:
    """Rows more than 2^31 elements apart, in memory that is reserved and, but for the rows, never touched."""
    case = CASES[name]
    inputs = case.make(7, 2, 33, torch.float32)
    expected = _call(name, inputs)
    far: Inputs = {}
    for key in case.rows:
        x = inputs[key].to(torch.uint8) if name == "embedding_sum" else inputs[key]
        apart = 2**31 + 5
        size = (apart + x.shape[1]) * x.element_size()
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for
        memory = mmap.mmap(-1, size, flags=private)
        far[key] = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (apart, 1))
        far[key].copy_(x)
    _same(_call(name, inputs | far), expected, name)


def test_strided_heads() -> None:
    """attention's rows may lie apart; its heads may not."""
    inputs = _attention(3, 40, 16, torch.float32)
    expected = _attend(inputs)
    apart = {key: strided(inputs[key].flatten(1)).unflatten(1, inputs[key].shape[1:]) for key in ("q", "k", "v", "rel")}
    _same(_attend(inputs | apart), expected, "rows apart")


# ---- types and devices ----


@BY_NAME
def test_wrong_devices(name: str) -> None:
    """Each input in turn without memory (a meta tensor, whose address is 0): refused."""
    inputs = CASES[name].make(3, 9, 13, torch.float32)
    for key, x in inputs.items():
        with pytest.raises(ValueError, match=name.split()[0] if key != "w" else "pack_"):
            _call(name, inputs | {key: x.to("meta")})


ANY_FLOAT = {  # inputs that alone decide the type, or may differ from the others
    ("swiglu", "gate_up"), ("moe_combine", "y"), ("short_conv", "x"), ("embedding_sum", "table"),
    ("attention", "rel_proj"), ("attention with cache", "rel_proj"),
}  # fmt: skip
ANY_ROWS = {
    "linear",
    "short_conv",
    "short_conv with state",
    "rms_norm",
    "swiglu",
    "route",
    "embedding_sum",
}  # one row less is another call, no fault
ANY_COLUMNS = {("moe_combine", "y"), ("embedding_sum", "table"), ("attention", "rel_proj"),
               ("attention with cache", "rel_proj"), ("attention with cache", "table")}  # fmt: skip


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_types(name: str, dtype: torch.dtype) -> None:
    """Each input in turn in every other type: refused. An integer type that the op also takes gives the same."""
    inputs = CASES[name].make(3, 9, 13, dtype)
    expected = _call(name, inputs)
    types = (torch.float16, torch.float64, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.cfloat)
    for key, x in inputs.items():
        for other in {*types, *DTYPES} - {x.dtype}:
            changed = inputs | {key: x.to(other)}
            if key == "codes" and other in (torch.uint8, torch.int16, torch.int32):
                _same(_call(name, changed), expected, f"codes as {other}")
            elif (name, key) in ANY_FLOAT and other in DTYPES:
                _call(name, changed)  # another call, no fault
            else:
                with pytest.raises(ValueError):
                    _call(name, changed)


@BY_NAME
def test_wrong_dimensions(name: str) -> None:
    """Each input in turn as a scalar, flattened, with an axis more, a row less, a column less."""
    inputs = CASES[name].make(3, 9, 13, torch.float32)
    for key, x in inputs.items():
        fewer_rows = key in CASES[name].rows and name not in ANY_ROWS
        fewer_columns = (name, key) not in ANY_COLUMNS
        wrong = [
            torch.zeros((), dtype=x.dtype),
            *([x[None]] if x.dim() != 2 or name != "rms_norm" else []),  # rms_norm takes heads too
            x[..., None],
            *([x.reshape(-1)] if x.dim() > 1 else []),
            *([x[:-1]] if fewer_rows else []),
            *([x[..., :-1].contiguous()] if fewer_columns else []),
        ]
        for bad in wrong:
            with pytest.raises(ValueError):
                _call(name, inputs | {key: bad})


# ---- ids ----

WRONG_IDS = st.sampled_from([-1, -(2**31), 2**31 - 1, 10**6])


@given(wrong=WRONG_IDS, row=st.integers(0, 39), rows=st.sampled_from([40, 400]))
@settings(max_examples=20)
def test_wrong_ids(wrong: int, row: int, rows: int) -> None:
    """An expert, code, class, token, slot or page that is not there is named; none is read or written."""
    for name, key in (
        ("expert_linear", "expert"),
        ("embedding_sum", "codes"),
        ("logprob", "row_class"),
        ("logprob", "token"),
        ("sample", "row_class"),
    ):
        inputs = CASES[name].make(1, rows, 13, torch.float32)
        inputs[key][row] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            _call(name, inputs)
    cached = _paged(1, rows, 13, torch.float32)
    cached["table"][0, 0] = wrong
    with pytest.raises(ValueError, match="names no page"):
        _attend(cached)
    assert bool(cached["key"].isnan().all())
    x = _state_conv(1, rows, 13, torch.float32)
    before = x["state"].clone()
    far = Segments.build([0], [0], [rows])
    far.slot[0] = wrong
    with pytest.raises(ValueError, match=r"segment 0 has slot"):
        ops.short_conv(x["x"], x["weight"], far, x["state"])
    assert torch.equal(x["state"], before)
    with pytest.raises(ValueError, match="names no page"):
        heads = (cached[key] for key in ("q", "k", "v", "rel", "rel_proj"))
        pages = PagedKV(cached["key"], cached["value"], cached["table"].clamp(0, 1))
        ops.attention(*heads, far, scale=0.2, cache=pages)


@pytest.mark.parametrize(("top_k", "shared"), [(-1, 1), (0, 1), (14, 1), (2, -1), (2, 99)])
def test_wrong_counts_of_experts(top_k: int, shared: int) -> None:
    with pytest.raises(ValueError, match="route"):
        ops.route(normal(1, 9, 14), torch.zeros(max(14 - shared, 0)), top_k, shared)


# ---- NaN and infinity ----

SPOILT = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", SPOILT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(F64 - {"attention"}))
def test_spoilt_values_go_where_torch_takes_them(name: str, dtype: torch.dtype, value: float) -> None:
    """One value of one input becomes NaN or infinite: NaN and infinities come out where float64 torch has them, and
    every other value keeps its bits."""
    inputs = CASES[name].make(3, 40, 33, dtype)
    before = _call(name, inputs)[0]
    for key, x in inputs.items():
        if not x.is_floating_point():
            continue
        bad = x.clone()
        bad.view(-1)[x.numel() // 2] = value
        got = _call(name, inputs | {key: bad})[0]
        wide = {k: t.double() if t.is_floating_point() else t for k, t in (inputs | {key: bad}).items()}
        exact = _oracle(name, wide)
        what = f"{name}: {value} in {key}"
        assert torch.equal(got.isnan(), exact.isnan()), what
        assert torch.equal(got.double().nan_to_num(0.0).isinf(), exact.nan_to_num(0.0).isinf()), what
        assert torch.equal(got[got.isinf()].double(), exact[got.isinf()]), what
        untouched = ~_depends(name, inputs, key, exact)
        assert torch.equal(got[untouched], before[untouched]), what


def _depends(name: str, inputs: Inputs, key: str, exact: Tensor) -> Tensor:
    """Which outputs may change when the spoilt value does: those of float64 torch that do when it is 1 or 2."""
    wide = {k: t.double() if t.is_floating_point() else t for k, t in inputs.items()}
    middle = wide[key].numel() // 2
    both = []
    for number in (1.0, 2.0):
        other = wide[key].clone()
        other.view(-1)[middle] = number
        both.append(_oracle(name, wide | {key: other}))
    return (both[0] != both[1]) | ~exact.isfinite()


@pytest.mark.parametrize("value", SPOILT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["attention", "attention with cache"])
@pytest.mark.parametrize("key", ["q", "k", "v", "rel"])
def test_spoilt_attention(name: str, key: str, dtype: torch.dtype, value: float) -> None:
    """Row 70 of 300 is spoilt: NaN shows in its own row and, for a key or value, in rows that see it through the window
    of 100; every other row keeps its bits, so the spoilt one is not even multiplied by 0."""
    inputs = _paged(3, 300, 16, dtype) if name.endswith("cache") else _attention(3, 300, 16, dtype)
    before = _call(name, inputs)[0]
    bad = inputs[key].clone()
    bad[70] = value
    got = _call(name, inputs | {key: bad})[0]
    last = 170 if key in ("k", "v") else 71
    seen = torch.zeros(300, dtype=torch.bool)
    seen[70:last] = True
    assert torch.equal(got[~seen], before[~seen])
    spoilt = ~got.isfinite().flatten(1).all(1)
    assert bool(spoilt[70])
    if value != value:
        assert bool(got[seen].isnan().all())
    # And in company: another sequence in the same call keeps every bit.
    both = {k: torch.cat([bad if k == key else inputs[k], inputs[k]]) for k in ("q", "k", "v", "rel", "tau")}
    segments = Segments.build([0, 1], [0, 0], [300, 300])
    heads = (both["q"], both["k"], both["v"], both["rel"], inputs["rel_proj"])
    pair = ops.attention(*heads, segments, scale=0.2, window=100, tau=both["tau"])
    assert torch.equal(pair[300:], before)


@pytest.mark.parametrize("value", SPOILT)
def test_spoilt_router(value: float) -> None:
    """A spoilt logit: its row still names experts that exist, each once; other rows keep their bits."""
    logits, bias = normal(1, 40, 14), torch.zeros(13)
    before = ops.route(logits, bias, 3, 1)
    logits[20, 5] = value
    expert, weight = ops.route(logits, bias, 3, 1)
    rest = torch.arange(40) != 20
    assert torch.equal(expert[rest], before[0][rest]) and torch.equal(weight[rest], before[1][rest])
    chosen = expert[20].tolist()
    assert len(set(chosen)) == 4 and min(chosen) >= 0 and chosen[-1] == 13 and max(chosen[:3]) < 13


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["logprob", "sample"])
def test_spoilt_scores_are_refused(name: str, value: float) -> None:
    """A distribution with a NaN or +inf is none: refused with its row; where not allowed it does not matter."""
    inputs = CASES[name].make(1, 40, 33, torch.float32)
    kind = int(inputs["row_class"][20])
    expected = _call(name, inputs)
    for column in range(33):
        bad = inputs["logits"].clone()
        bad[20, column] = value
        if inputs["allowed"][kind, column]:
            with pytest.raises(ValueError, match=f"row 20 .*token {column}$"):
                _call(name, inputs | {"logits": bad})
        else:
            _same(_call(name, inputs | {"logits": bad}), expected, f"column {column}")


@pytest.mark.parametrize("value", SPOILT)
def test_spoilt_gradient(value: float) -> None:
    """One NaN or infinity in an upstream gradient spoils its row of dx and its row of dw, as in torch."""
    x, w = normal(1, 20, 33).requires_grad_(), normal(2, 17, 33).requires_grad_()
    grad = normal(3, 20, 17)
    grad[7, 4] = value
    ours = torch.autograd.grad(ops.linear(x, ops.pack_linear(w)), (x, w), grad)
    theirs = torch.autograd.grad(x @ w.T, (x, w), grad)
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        assert torch.equal(got.isnan(), expected.isnan())
