"""The reference backend against plain torch in float64, its gradients against finite differences, and its own row
contract. It defines the ops, so these tests are the ones that say what the definition means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layout import SPLIT_TOKENS, PagedKV, Segments
from kernels.reference import backend as reference
from tests.kernels.contract import assert_row_contract, normal, uneven

F64 = torch.float64


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, rel: Tensor, proj: Tensor, scale: float, window: int | None, tau: Tensor | None
) -> Tensor:
    """One sequence by softmax over a dense matrix, as transformers does it."""
    rows, heads = q.shape[:2]
    k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
    distance = torch.arange(rows)[:, None] - torch.arange(rows)
    bias = torch.einsum("thc,cd->htd", rel, proj)
    bias = bias.gather(2, distance.clamp(0, proj.shape[1] - 1).expand(heads, -1, -1))
    score = scale * torch.einsum("ihd,jhd->hij", q, k) + bias.masked_fill(distance >= proj.shape[1], 0)
    if tau is not None:
        score = score * tau[:, None]
    hidden = (distance < 0) | (distance >= (window or rows))
    return torch.einsum("hij,jhd->ihd", score.masked_fill(hidden, -torch.inf).softmax(-1), v)


def attention_inputs(rows: int, dtype: torch.dtype = F64) -> list[Tensor]:
    shapes = [(rows, 4, 8), (rows, 2, 8), (rows, 2, 8), (rows, 4, 3), (3, 50)]
    return [normal(i, *shape).to(dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("window", [None, 1, 16, 70])
@pytest.mark.parametrize("scaled", [False, True])
def test_attention_is_a_softmax(window: int | None, scaled: bool) -> None:
    inputs = attention_inputs(150)
    tau = torch.linspace(1, 2, 150, dtype=F64) if scaled else None
    got = reference.attention(*inputs, Segments.build([0], [0], [150]), 0.3, window, 0, tau, None)
    assert torch.allclose(got, dense_attention(*inputs, 0.3, window, tau), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 70])
def test_attention_over_pages_equals_attention_at_once(window: int | None) -> None:
    inputs, proj = attention_inputs(150, torch.float32)[:4], attention_inputs(1, torch.float32)[4]
    at_once = reference.attention(*inputs, proj, Segments.build([0], [0], [150]), 0.3, window, 0, None, None)
    garbage = torch.nan  # what was never written must not be read
    kv = PagedKV(
        torch.full((5, 2, 8, SPLIT_TOKENS), garbage),
        torch.full((5, 2, SPLIT_TOKENS, 8), garbage),
        torch.tensor([[-1, -1, -1], [4, 0, 2]], dtype=torch.int32),
    )
    start = 0
    for length in (1, 62, 1, 1, 30, 55):
        rows = slice(start, start + length)
        piece = [t[rows] for t in inputs]
        got = reference.attention(*piece, proj, Segments.build([1], [start], [length]), 0.3, window, 0, None, kv)
        assert torch.equal(got, at_once[rows])
        start += length
    with pytest.raises(ValueError, match="no page for slot 0, position 0"):
        reference.attention(*(t[:1] for t in inputs), proj, Segments.build([0], [0], [1]), 0.3, None, 0, None, kv)


def test_attention_writes_all_keys_before_it_reads() -> None:
    """The first segment begins behind the page that the second one fills in the same call."""
    inputs, proj = attention_inputs(SPLIT_TOKENS + 2, torch.float32)[:4], attention_inputs(1, torch.float32)[4]
    whole = Segments.build([0], [0], [SPLIT_TOKENS + 2])
    at_once = reference.attention(*inputs, proj, whole, 0.3, None, 0, None, None)
    kv = PagedKV(
        torch.full((2, 2, 8, SPLIT_TOKENS), torch.nan),
        torch.full((2, 2, SPLIT_TOKENS, 8), torch.nan),
        torch.tensor([[1, -1], [1, 0]], dtype=torch.int32),
    )
    rows = [torch.cat((t[SPLIT_TOKENS:], t[:SPLIT_TOKENS])) for t in inputs]
    segments = Segments.build([1, 0], [SPLIT_TOKENS, 0], [2, SPLIT_TOKENS])
    got = reference.attention(*rows, proj, segments, 0.3, None, 0, None, kv)
    assert torch.equal(torch.cat((got[2:], got[:2])), at_once)


def test_linear_and_experts_are_products() -> None:
    x, w = normal(0, 7, 12).to(F64), normal(1, 5, 12).to(F64)
    packed = reference.pack_linear((w[:2], w[2:]))
    assert torch.allclose(reference.linear(x, packed, F64), x @ w.T, atol=1e-13)
    routed, gate, up = normal(2, 3, 6, 12).to(F64), normal(3, 1, 3, 12).to(F64), normal(4, 1, 3, 12).to(F64)
    experts = reference.pack_experts(((routed,), (gate, up)))
    weights = torch.cat((routed, torch.cat((gate, up), 1)))
    expert = torch.tensor([0, 3, 2, 2, 1, 3, 0, 0, 0, 1, 2, 3, 3, 1], dtype=torch.int32)
    wanted = torch.stack([weights[e] @ x[r // 2] for r, e in enumerate(expert.tolist())])
    assert torch.allclose(reference.expert_linear(x, experts, expert, 2), wanted, atol=1e-13)


def test_norm_conv_swiglu_gelu_combine_and_embedding() -> None:
    x, weight = normal(0, 9, 6).to(F64), normal(1, 6).to(F64)
    assert torch.allclose(reference.rms_norm(x, weight, 1e-6), F.rms_norm(x, (6,), weight, 1e-6))
    taps = normal(2, 6, 4).to(F64)
    conv = F.conv1d(F.pad(x.T, (3, 0)), taps[:, None], groups=6).T + x
    assert torch.allclose(reference.short_conv(x, taps, Segments.build([0], [0], [9]), None), conv)
    assert torch.allclose(reference.swiglu(x), F.silu(x[:, :3]) * x[:, 3:])
    assert torch.allclose(reference.gelu(x), F.gelu(x))
    share = normal(3, 3, 3).to(F64)
    assert torch.allclose(reference.moe_combine(x, share), torch.einsum("tj,tjd->td", share, x.view(3, 3, 6)))
    table, codes = normal(4, 4 * 5, 6).to(F64), torch.tensor([[0, 4, 2, 1], [3, 3, 0, 0]], dtype=torch.uint8)
    wanted = table[codes.long() + torch.arange(4) * 5].sum(1)
    assert torch.allclose(reference.embedding_sum(codes, table, 5), wanted)
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        reference.embedding_sum(codes, table[:16], 4)


def test_conv_state_carries_the_last_three_inputs() -> None:
    x, taps = normal(0, 9, 6), normal(1, 6, 4)
    whole = reference.short_conv(x, taps, Segments.build([0], [0], [9]), None)
    state = torch.full((2, 3, 6), torch.nan)
    pieces = [
        reference.short_conv(x[a:b], taps, Segments.build([1], [a], [b - a]), state)
        for a, b in ((0, 1), (1, 3), (3, 8), (8, 9))
    ]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(state[1], x[6:])
    assert state[0].isnan().all()


def test_route_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0, -1.0, 0.5]])  # four experts and one shared
    expert, weight = reference.route(logits, torch.tensor([0.0, 0.0, 0.0, 9.0]), 2, 1)
    assert expert.tolist() == [[0, 3, 4]], "the bias lifts 3; of the equal 0 and 2 the lower index wins"
    chance = torch.sigmoid(torch.tensor([[2.0, -1.0, 0.5]]))  # without the bias
    assert torch.allclose(weight, chance / chance.sum())


def test_logprob_is_a_masked_log_softmax() -> None:
    logits, allowed = normal(0, 4, 9).to(F64), normal(1, 2, 9) > -0.5
    row_class = torch.tensor([0, 1, 1, 0])
    token = allowed.int().argmax(1)[row_class]
    logp, entropy, digest = reference.logprob(logits, token, 0.7, allowed, row_class)
    whole = (logits / 0.7).masked_fill(~allowed[row_class], -torch.inf).log_softmax(1)
    assert torch.allclose(logp, whole.gather(1, token[:, None])[:, 0])
    assert torch.allclose(entropy, -(whole.exp() * whole.masked_fill(~allowed[row_class], 0)).sum(1))
    assert digest.unique().numel() == 4
    bad = logits.clone()
    bad[2, token[2]] = torch.nan
    with pytest.raises(ValueError, match="row 2 holds a NaN"):
        reference.logprob(bad, token, 0.7, allowed, row_class)
    with pytest.raises(ValueError, match="row 1 has token"):
        wrong = token.clone()
        wrong[1] = int((~allowed[1]).int().argmax())
        reference.logprob(logits, wrong, 0.7, allowed, row_class)


def test_splitmix64_is_the_published_one() -> None:
    """The first outputs from seed 1234567, as listed with the reference C code (Vigna, prng.di.unimi.it)."""
    states = [(1234567 + i * reference.GOLDEN + 2**63) % 2**64 - 2**63 for i in range(3)]  # as int64
    outputs = [int(word) % 2**64 for word in reference._mix(torch.tensor(states))]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_samples_follow_the_distribution() -> None:
    """20,000 draws against the probabilities: chi-square below the 99.9 % point of 7 degrees of freedom."""
    logits = normal(3, 1, 8)
    draws = 20_000
    keys = torch.arange(draws) * 1_000_003
    allowed, row_class = torch.ones(1, 8, dtype=torch.bool), torch.zeros(draws, dtype=torch.int64)
    token, logp, _ = reference.sample(logits.expand(draws, 8), 0.8, keys, allowed, row_class)
    expected = (logits[0] / 0.8).softmax(0) * draws
    assert ((token.bincount(minlength=8) - expected) ** 2 / expected).sum() < 24.3
    assert torch.allclose(logp, (logits[0] / 0.8).log_softmax(0)[token], atol=1e-6)


def test_gradients() -> None:
    def leaves(*tensors: Tensor) -> list[Tensor]:
        return [t.detach().clone().requires_grad_() for t in tensors]

    segments = Segments.build([0, 1], [0, 0], [5, 4])
    x, w, taps = leaves(normal(0, 9, 6).to(F64), normal(1, 4, 6).to(F64), normal(2, 6, 4).to(F64))
    check = torch.autograd.gradcheck
    assert check(lambda x, w: reference.linear(x, reference.pack_linear((w,)), F64), (x, w))
    assert check(lambda x, taps: reference.short_conv(x, taps, segments, None), (x, taps))
    assert check(lambda x, taps: reference.rms_norm(x, taps[:, 0], 1e-6), (x, taps))
    assert check(reference.swiglu, (x,))
    assert check(reference.gelu, (x,))
    shapes = [(4, 2, 2), (4, 1, 2), (4, 1, 2), (4, 2, 2), (2, 2)]
    small = leaves(*(normal(i, *shape).to(F64) for i, shape in enumerate(shapes)))
    tau, one = torch.linspace(1, 2, 4, dtype=F64), Segments.build([0], [0], [4])
    assert check(lambda *t: reference.attention(*t, one, 0.3, 3, 0, tau, None), small)
    allowed, row_class = torch.tensor([[True] * 5 + [False]]), torch.zeros(9, dtype=torch.int64)
    token = torch.arange(9) % 5
    assert check(lambda x: reference.logprob(x, token, 0.7, allowed, row_class)[:2], (x,))
    assert check(lambda x: reference.route(x, torch.zeros(4, dtype=F64), 2, 2)[1], (x,))


def test_keeps_the_row_contract() -> None:
    x, weight, w = normal(0, 70, 33), normal(1, 33), normal(2, 20, 33)
    packed = reference.pack_linear((w,))
    allowed = normal(3, 1, 33) > -1
    zero = torch.zeros(70, dtype=torch.int64)
    assert_row_contract(lambda x: reference.linear(x, packed, torch.float32), (x,), 0)
    assert_row_contract(lambda x: reference.rms_norm(x, weight, 1e-6), (x,), 1)
    assert_row_contract(lambda x: reference.swiglu(x[:, :32]), (x,), 2)
    assert_row_contract(reference.gelu, (x,), 2)
    assert_row_contract(lambda x: reference.route(x, torch.zeros(30), 4, 3)[1], (x,), 3)
    assert_row_contract(lambda x, c: reference.sample(x, 1.0, torch.arange(len(c)) * 0, allowed, c)[1], (x, zero), 4)


def test_the_contract_refuses_a_product_by_row_count() -> None:
    """Negative control."""
    packed = reference.pack_linear((normal(1, 64, 33),))
    product = uneven(lambda x: reference.linear(x, packed, torch.float32))
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(product, (normal(0, 70, 33),), 0)


def test_packs_of_another_backend_are_refused() -> None:
    packed = reference.pack_linear((normal(0, 4, 4),))
    packed.data["panels"] = torch.empty(1)
    with pytest.raises(ValueError, match="made by another backend"):
        reference.linear(normal(1, 1, 4), packed, torch.float32)
