"""Bad values that only a kernel can notice: told at once, or in a `deferred` block by its read-out; the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ops
from kernels.layout import PagedKV, Segments
from kernels.triton import tables, tiles
from tests.kernels.backend import device
from tests.kernels.contract import normal


def there(x: Tensor) -> Tensor:
    return x.to(device())


def experts(rows: int, bad: dict[int, int]) -> Callable[[], Any]:
    packed = ops.pack_experts((there(normal(1, 3, 16, 16)),))
    expert = torch.arange(rows, dtype=torch.int32) % 3
    for row, value in bad.items():
        expert[row] = value
    return lambda: ops.expert_linear(there(normal(2, rows, 16)), packed, there(expert))


def coded(code: int) -> Callable[[], Any]:
    codes = torch.zeros(20, 4, dtype=torch.int64)
    codes[17, 2] = code
    return lambda: ops.embedding_sum(there(codes), there(normal(1, 4 * 5, 16)), 5)


def logits(row: int = 0, to: float = 0.0, kind: int = 0, token: int | None = None) -> Callable[[], Any]:
    """Three rows of class 0, which allows tokens 0 … 4; row 1 is of class ``kind``; class 1 allows no token."""
    x, allowed = normal(1, 3, 8), torch.zeros(2, 8, dtype=torch.bool)
    allowed[0, :5] = True
    x[row, 3] = to
    kinds = torch.tensor([0, kind, 0])
    where = [there(part) for part in (x, torch.tensor([1, 2, 3 if token is None else token]), allowed, kinds)]
    if token is not None:
        return lambda: ops.logprob(where[0], where[1], 1.0, where[2], where[3])
    return lambda: ops.sample(where[0], 1.0, where[1], where[2], where[3])


GATHER, GROUPED = 5, tiles.GATHER_ROWS + 9
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "expert too great": (experts(GATHER, {3: 3}), r"expert\[3\] is 3, outside 0..2"),
    "expert below 0": (experts(GATHER, {4: -1}), r"expert\[4\] is -1"),
    "experts, grouped": (experts(GROUPED, {70: 9, 11: 2**30}), r"expert\[11\] is 1073741824"),
    "expert below 0, grouped": (experts(GROUPED, {0: -(2**31)}), r"expert\[0\] is -2147483648"),
    "code": (coded(5), r"codes\[17, 2\] is 5"),
    "code below 0": (coded(-(2**40)), r"codes\[17, 2\] is -1099511627776"),
    "NaN": (logits(2, torch.nan), "sample: row 2 .* token 3"),
    "class": (logits(kind=7), "sample: row 1 has class 7"),
    "no token": (logits(kind=1), "sample: row 1 .*no finite logit"),
    "token not allowed": (logits(token=6), "logprob: row 2 has token 6, which its class 0 does not allow"),
    "token beyond": (logits(token=8), "logprob: row 2 has token 8, outside 0 to 7"),
}
FINE = (experts(GATHER, {}), experts(GROUPED, {}), coded(4), logits(), logits(token=4))


@pytest.mark.parametrize("name", CASES)
def test_at_once_and_by_the_read_out(name: str) -> None:
    call, said = CASES[name]
    with pytest.raises(ValueError, match=said) as at_once:
        call()
    with ops.deferred():
        call()
        with pytest.raises(ValueError, match=said) as read_out:
            ops.fetch(there(torch.zeros(2)))
    assert str(read_out.value) == str(at_once.value)
    reached = False
    with pytest.raises(ValueError, match=said), ops.deferred():  # without a read-out, at the end of the block
        call()
        reached = True
    assert reached


def test_the_first_call_that_went_wrong_is_told() -> None:
    (first, said), (second, _) = CASES["code"], CASES["NaN"]
    with pytest.raises(ValueError, match=said), ops.deferred():
        FINE[0]()
        first()
        second()
        ops.fetch(there(torch.zeros(2)))


def test_nothing_is_told_of_what_is_right() -> None:
    """The control; results in a block are those outside, by the bit."""
    for call in FINE:
        alone = call()
        with ops.deferred():
            in_block = call()
            (got,) = ops.fetch(in_block[0] if isinstance(in_block, tuple) else in_block)
        assert torch.equal(got, (alone[0] if isinstance(alone, tuple) else alone).cpu())


def test_a_block_leaves_nothing_behind() -> None:
    with pytest.raises(KeyError), ops.deferred():
        CASES["NaN"][0]()
        raise KeyError
    with ops.deferred():
        FINE[0]()
        ops.fetch(there(torch.zeros(1)))
    with pytest.raises(RuntimeError, match="one block inside another"), ops.deferred(), ops.deferred():
        pass
    with pytest.raises(ValueError, match="code"):  # at once again
        CASES["code"][0]()


def test_read_out_keeps_types_and_shapes() -> None:
    parts = [torch.arange(3), torch.arange(3.0), torch.tensor([[True, False]]), torch.arange(5, dtype=torch.int32)]
    for a, b in zip(parts, ops.fetch(*map(there, parts)), strict=True):
        assert b.device.type == "cpu" and a.dtype == b.dtype and torch.equal(a, b)


# ---- upload ----


def test_what_is_sent_arrives_aligned() -> None:
    parts = (torch.arange(3), torch.rand(5, 3), torch.rand(7, 4).t(), torch.zeros(0, 80, dtype=torch.uint8))
    parts = (*parts, torch.tensor([True]), torch.arange(33, dtype=torch.uint8))
    segments = Segments.build([2, 0], [65, 0], [1, 70])
    own, sent = ops.upload(segments, (), *parts)
    for a, b in zip(parts, sent, strict=True):
        assert b.device.type == torch.device(device()).type and b.data_ptr() % 16 == 0
        assert a.dtype == b.dtype and torch.equal(a, b.cpu())
    assert own is not segments and torch.equal(own.position, segments.position)
    there_now = tables.tables_of(own, sent[0].device)
    assert there_now.segment.tolist() == [0] + [1] * 70 and there_now.whole is not None


def pages(table: list[list[int]]) -> PagedKV:
    key, value = torch.zeros(3, 1, 16, 64), torch.zeros(3, 1, 64, 16)
    return PagedKV(there(key), there(value), torch.tensor(table, dtype=torch.int32))


def test_pages_are_checked_on_the_host_before_anything_is_written() -> None:
    cache, segments = pages([[0, 1], [2, -1]]), Segments.build([1, 0], [60, 0], [3, 70])
    own, _ = ops.upload(segments, (cache.table,))
    assert tables.page_rows(own, cache, 100).tolist() == [[2, -1], [0, 1]]
    for wrong, said in (
        (Segments.build([1], [60], [5]), r"slot 1 \(segment 0\) sees positions 64 to 127"),
        (Segments.build([0], [120], [9]), "slot 0 .* sees positions 128"),
        (Segments.build([0, 2], [0, 3], [1, 1]), r"slot 2 \(segment 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            tables.page_rows(ops.upload(wrong, (cache.table,))[0], cache, 100)
        with pytest.raises(ValueError, match=said):
            tables.page_rows(wrong, cache, 100)  # not uploaded before
    with pytest.raises(ValueError, match=r"among 0\.\.2"):
        tables.page_rows(Segments.build([0], [0], [1]), pages([[3]]), 100)


def test_a_window_hides_pages_that_were_given_back() -> None:
    cache, late = pages([[-1, 1]]), Segments.build([0], [100], [1])
    own, _ = ops.upload(late, (cache.table,))
    tables.page_rows(own, cache, 30)
    with pytest.raises(ValueError, match="sees positions 0 to 63"):
        tables.page_rows(own, cache, 60)


def test_pages_of_one_pass_stay_with_it() -> None:
    """The caller's segments know nothing of the pass: what the table says later counts for a later call."""
    cache, segments = pages([[0, 1]]), Segments.build([0], [0], [1])
    own, _ = ops.upload(segments, (cache.table,))
    cache.table[0, 0] = 2
    assert tables.page_rows(own, cache, 9).tolist() == [[0, 1]]
    assert tables.page_rows(segments, cache, 9).tolist() == [[2, 1]]
