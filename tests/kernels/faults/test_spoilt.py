"""NaN and infinity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.layout import Segments
from tests.kernels.contract import DTYPES, normal
from tests.kernels.faults.cases import CASES, F64, Inputs, attention_inputs, call, oracle, paged_inputs, same

SPOILT = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("value", SPOILT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(F64 - {"attention"}))
def test_spoilt_values_go_where_torch_takes_them(name: str, dtype: torch.dtype, value: float) -> None:
    """One value of one input becomes NaN or infinite: NaN and infinities come out where float64 torch has them, and
    every other value keeps its bits."""
    inputs = CASES[name].make(3, 40, 33, dtype)
    before = call(name, inputs)[0]
    for key, x in inputs.items():
        if not x.is_floating_point():
            continue
        bad = x.clone()
        bad.view(-1)[x.numel() // 2] = value
        got = call(name, inputs | {key: bad})[0]
        wide = {k: t.double() if t.is_floating_point() else t for k, t in (inputs | {key: bad}).items()}
        exact = oracle(name, wide)
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
        both.append(oracle(name, wide | {key: other}))
    return (both[0] != both[1]) | ~exact.isfinite()


@pytest.mark.parametrize("value", SPOILT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["attention", "attention with cache"])
@pytest.mark.parametrize("key", ["q", "k", "v", "rel"])
def test_spoilt_attention(name: str, key: str, dtype: torch.dtype, value: float) -> None:
    """Row 70 of 300 is spoilt: NaN shows in its own row and, for a key or value, in rows that see it through the window
    of 100; every other row keeps its bits, so the spoilt one is not even multiplied by 0."""
    inputs = paged_inputs(3, 300, 16, dtype) if name.endswith("cache") else attention_inputs(3, 300, 16, dtype)
    before = call(name, inputs)[0]
    bad = inputs[key].clone()
    bad[70] = value
    got = call(name, inputs | {key: bad})[0]
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
    expected = call(name, inputs)
    for column in range(33):
        bad = inputs["logits"].clone()
        bad[20, column] = value
        if inputs["allowed"][kind, column]:
            with pytest.raises(ValueError, match=f"row 20 .*token {column}$"):
                call(name, inputs | {"logits": bad})
        else:
            same(call(name, inputs | {"logits": bad}), expected, f"column {column}")


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
