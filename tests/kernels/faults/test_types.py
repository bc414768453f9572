"""Devices, types and dimensions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels import ops
from kernels.layout import Segments
from tests.kernels.contract import DTYPES
from tests.kernels.faults.cases import BY_NAME, CASES, call, same


@BY_NAME
def test_wrong_devices(name: str) -> None:
    """Each input in turn without memory (a meta tensor, whose address is 0): refused."""
    inputs = CASES[name].make(3, 9, 13, torch.float32)
    for key, x in inputs.items():
        with pytest.raises(ValueError, match=name.split()[0] if key != "w" else "pack_"):
            call(name, inputs | {key: x.to("meta")})


ANY_FLOAT = {  # inputs that alone decide the type, or may differ from the others
    ("swiglu", "gate_up"), ("gelu", "x"), ("moe_combine", "y"), ("short_conv", "x"), ("embedding_sum", "table"),
    ("attention", "rel_proj"), ("attention with cache", "rel_proj"),
}  # fmt: skip
ANY_ROWS = {
    "linear",
    "short_conv",
    "short_conv with state",
    "rms_norm",
    "swiglu",
    "gelu",
    "route",
    "embedding_sum",
}  # one row less is another call, no fault
ANY_COLUMNS = {("gelu", "x"), ("moe_combine", "y"), ("embedding_sum", "table"), ("attention", "rel_proj"),
               ("attention with cache", "rel_proj"), ("attention with cache", "table")}  # fmt: skip


@BY_NAME
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_types(name: str, dtype: torch.dtype) -> None:
    """Each input in turn in every other type: refused. An integer type that the op also takes gives the same."""
    inputs = CASES[name].make(3, 9, 13, dtype)
    expected = call(name, inputs)
    types = (torch.float16, torch.float64, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.cfloat)
    for key, x in inputs.items():
        for other in {*types, *DTYPES} - {x.dtype}:
            changed = inputs | {key: x.to(other)}
            if key == "codes" and other in (torch.uint8, torch.int16, torch.int32):
                same(call(name, changed), expected, f"codes as {other}")
            elif (name, key) in ANY_FLOAT and other in DTYPES:
                call(name, changed)  # another call, no fault
            else:
                with pytest.raises(ValueError):
                    call(name, changed)


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
                call(name, inputs | {key: bad})


SEGMENTS = Segments.build([1, 0], [0, 0], [5, 4])


@pytest.mark.parametrize("field", ["slot", "start", "offset", "position"])
@pytest.mark.parametrize("other", [torch.int64, torch.float32, torch.uint8])
def test_segments_of_wrong_types(field: str, other: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"segments: {field} is {other}"):
        replace(SEGMENTS, **{field: getattr(SEGMENTS, field).to(other)})


@pytest.mark.parametrize("field", ["slot", "start", "offset", "position"])
def test_segments_of_wrong_shapes(field: str) -> None:
    x = getattr(SEGMENTS, field)
    apart = torch.stack([x, x], 1)[:, 0]
    for bad in (x[None], apart, *([] if field == "position" else [x[:-1]])):
        with pytest.raises(ValueError, match="segments: "):
            replace(SEGMENTS, **{field: bad})


@pytest.mark.parametrize("name", ["short_conv", "attention"])
def test_segments_elsewhere(name: str) -> None:
    """Without memory, as all wrong devices above."""
    meta = Segments(*(x.to("meta") for x in (SEGMENTS.slot, SEGMENTS.start, SEGMENTS.offset, SEGMENTS.position)))
    inputs = CASES[name].make(3, 9, 13, torch.float32)
    with pytest.raises(ValueError, match=f"{name}: segments .*meta"):
        if name == "short_conv":
            ops.short_conv(inputs["x"], inputs["weight"], meta)
        else:
            ops.attention(*(inputs[key] for key in ("q", "k", "v", "rel", "rel_proj")), meta, scale=0.2)


@pytest.mark.parametrize("name", ["linear", "expert_linear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_exchanged_since_they_were_packed(name: str, dtype: torch.dtype) -> None:
    """`repack` takes other memory of the same kind, as ZeRO gives a parameter; it refuses any other kind."""
    inputs = CASES[name].make(3, 9, 16, dtype)
    weight = inputs["w"].clone()
    packed = ops.pack_linear(weight) if name == "linear" else ops.pack_experts((weight,))
    for bad in (
        torch.cat([weight] * 9), torch.cat([weight] * 9, -2), torch.cat([weight] * 9, -1), weight[:-1],
        weight.flatten(), weight[..., None], weight.double(), torch.cat([weight, weight], -1)[..., :16],
    ):  # fmt: skip
        kept, weight.data = weight.data, bad
        with pytest.raises(ValueError, match="repack"):
            ops.repack(packed)
        weight.data = kept
    weight.data = inputs["w"].clone() * 2
    ops.repack(packed)
    if name == "linear":
        got = ops.linear(inputs["x"], packed)
    else:
        got = ops.expert_linear(inputs["x"], packed, inputs["expert"], 2)
    same((got,), call(name, inputs | {"w": inputs["w"] * 2}), name)
