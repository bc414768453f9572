"""logprob on each backend: row contract, digest, oracle, gradients, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import backend as reference
from tests.kernels.backend import ROWS, examples, ops, small
from tests.kernels.contract import (
    SEEDS,
    assert_gradients,
    assert_row_contract,
    generator,
    normal,
    telling,
    uneven_sum,
)

MASK64 = 2**64 - 1


def classes(seed: int, count: int, vocab: int) -> Tensor:
    """Classes that allow nearly all, half, and few tokens; token 0 always."""
    share = torch.tensor([0.97, 0.5, 0.05])[torch.arange(count) % 3]
    allowed = torch.rand(count, vocab, generator=generator(seed)) < share[:, None]
    allowed[:, 0] = True
    return allowed


def draw(seed: int, rows: int, count: int, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """(row classes, tokens that their classes allow)"""
    row_class = torch.randint(0, count, (rows,), generator=generator(seed))
    return row_class, torch.multinomial(allowed[row_class].float(), 1, generator=generator(seed + 1))[:, 0]


@given(rows=ROWS, vocab=st.sampled_from([1, 7, 16, 256, 1100]), seed=SEEDS)
@examples(12, 4)
def test_row_contract(rows: int, vocab: int, seed: int) -> None:
    allowed = classes(seed, 4, vocab)
    row_class, token = draw(seed + 1, rows, 4, allowed)

    def both(logits: Tensor, token: Tensor, row_class: Tensor) -> Tensor:
        # The contract's strangers mix rows: a token must stay one that its class allows.
        token = torch.where(allowed[row_class, token], token, 0)
        logp, entropy, digest = ops.logprob(logits, token, 0.8, allowed, row_class)
        digits = digest.view(torch.int16).view(-1, 4).float()
        return torch.cat([logp[:, None], entropy[:, None], digits], 1)

    assert_row_contract(both, (normal(seed, rows, vocab) * 3, token, row_class), seed)


def test_control_sum_by_row_count() -> None:
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda x: x - torch.log(uneven_sum(torch.exp(x), len(x)))[:, None], (telling(40, 256, 0, -17.5),), 0
        )


@pytest.mark.parametrize("vocab", [7, 256, 2000])
def test_float64_oracle(vocab: int) -> None:
    """The difference to the maximum rounds at 2^-24 of |logit|, the sum (V / 16 steps a lane) and log at a few ulp."""
    allowed = classes(1, 3, vocab)
    rows = small(60, 20)
    row_class, token = draw(2, rows, 3, allowed)
    logits = normal(3, rows, vocab) * 3
    logp, entropy, _ = ops.logprob(logits, token, 0.7, allowed, row_class)
    oracle, entropy_oracle, _ = reference.logprob(logits.double(), token, 0.7, allowed, row_class)
    bound = (vocab / 16 + 64) * 2.0**-24
    assert float((logp - oracle).abs().max()) <= bound
    assert float((entropy - entropy_oracle).abs().max()) <= 4 * bound


def splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def digest_of(row: list[int]) -> int:
    total = sum(splitmix64((v << 32) | bits) for v, bits in enumerate(row)) & MASK64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("vocab", small([1, 7, 40, 256, 1030], [1, 40, 1030]))
def test_digest_is_the_hash_of_the_whole_row(vocab: int) -> None:
    """Computed here in Python integers from the log-prob of every token, -inf where not allowed."""
    allowed = classes(5, 3, vocab)
    logits, minus_inf = normal(6, 3, vocab), int(torch.tensor(-torch.inf).view(torch.int32)) & 0xFFFFFFFF
    for row in small((0, 1, 2), (2,)):
        mine = allowed[row].nonzero()[:, 0]
        one = logits[row : row + 1].expand(len(mine), vocab).contiguous()
        logp, _, digest = ops.logprob(one, mine, 0.9, allowed, torch.full((len(mine),), row))
        bits = [minus_inf] * vocab
        for v, value in zip(mine.tolist(), logp.view(torch.int32).tolist(), strict=True):
            bits[v] = value & 0xFFFFFFFF
        assert set(digest.tolist()) == {digest_of(bits)}
        changed = list(bits)
        changed[int(mine[-1])] ^= 1  # one ulp of one log-prob
        assert digest_of(changed) != digest_of(bits)


def test_digest_notices_one_log_prob() -> None:
    """Another token's logit moved by 2^-20, an ulp or two of its log-prob: the chosen token's log-prob stays what it
    was, which is why comparing it alone proves little, and the digest changes."""
    logits, allowed = normal(1, 1, 256), torch.ones(1, 256, dtype=torch.bool)
    token, zero = torch.tensor([3]), torch.tensor([0])
    logp, _, digest = ops.logprob(logits, token, 1.0, allowed, zero)
    kept = 0
    for v in (0, 17, 100, 200, 255):
        moved = logits.clone()
        moved[0, v] += 2.0**-20
        other, _, changed = ops.logprob(moved, token, 1.0, allowed, zero)
        kept += int(torch.equal(other, logp))
        assert not torch.equal(changed, digest)
    assert kept > 0
    assert torch.equal(ops.logprob(logits.clone(), token, 1.0, allowed, zero)[2], digest)


def test_what_is_not_allowed_does_not_count() -> None:
    allowed = torch.zeros(2, 40, dtype=torch.bool)
    allowed[0, [3, 20]] = allowed[1, 39] = True
    logits, row_class = normal(1, 2, 40), torch.tensor([0, 1])
    before = ops.logprob(logits, torch.tensor([20, 39]), 1.0, allowed, row_class)
    logits[0, [0, 4, 39]] = torch.tensor([torch.nan, torch.inf, 1e30])
    after = ops.logprob(logits, torch.tensor([20, 39]), 1.0, allowed, row_class)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert after[0][1] == 0 and after[1][1] == 0  # one token allowed: certain


@pytest.mark.parametrize("vocab", [7, small(256, 1100)])
def test_gradients(vocab: int) -> None:
    """Of log-prob and entropy together, relative to the greatest gradient; 0 for tokens that are not allowed."""
    allowed = classes(1, 3, vocab)
    rows = small(90, 20)
    row_class, token = draw(2, rows, 3, allowed)

    def both(logits: Tensor) -> Tensor:
        run = reference.logprob if logits.dtype == torch.float64 else ops.logprob
        logp, entropy, _ = run(logits, token, 0.7, allowed, row_class)
        return torch.stack([logp, entropy])

    assert_gradients(both, both, (normal(3, rows, vocab) * 2,), 4, 4e-6)
    logits = normal(3, rows, vocab).requires_grad_()
    ops.logprob(logits, token, 0.7, allowed, row_class)[0].sum().backward()
    assert logits.grad is not None and bool((logits.grad[~allowed[row_class]] == 0).all())


def test_impossible_tokens_have_no_gradient() -> None:
    """An allowed logit of -inf: log-prob -inf for it, and no NaN in anyone's gradient."""
    logits = torch.tensor([[0.5, -torch.inf, 1.0]], requires_grad=True)
    allowed = torch.ones(1, 3, dtype=torch.bool)
    logp, entropy, _ = ops.logprob(logits, torch.tensor([0]), 1.0, allowed, torch.tensor([0]))
    (logp + entropy).sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and logits.grad[0, 1] == 0
    assert ops.logprob(logits, torch.tensor([1]), 1.0, allowed, torch.tensor([0]))[0] == -torch.inf


def test_errors_name_the_row() -> None:
    allowed, row_class = classes(1, 3, 40), torch.tensor([0, 1, 2, 0])
    allowed[2] = False
    allowed[2, 5] = True
    good, token = normal(1, 4, 40), torch.tensor([0, 0, 5, 0])

    def run(
        logits: Tensor = good, token: Tensor = token, row_class: Tensor = row_class, temperature: float = 1.0
    ) -> None:
        ops.logprob(logits, token, temperature, allowed, row_class)

    run()
    for value, message in (
        (torch.nan, "row 2 .*NaN or \\+inf.*token 5"),
        (torch.inf, "row 2"),
        (-torch.inf, "row 2.*no finite"),
    ):
        bad = good.clone()
        bad[2, 5] = value
        with pytest.raises(ValueError, match=message):
            run(bad)
    with pytest.raises(ValueError, match="row 2 has token 6, which its class 2 does not allow"):
        run(token=torch.tensor([0, 0, 6, 0]))
    for wrong in (-1, 40):
        with pytest.raises(ValueError, match=f"row 3 has token {wrong}, outside 0 to 39"):
            run(token=torch.tensor([0, 0, 5, wrong]))
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=f"row 1 has class {wrong}; allowed has classes 0 to 2"):
            run(row_class=torch.tensor([0, wrong, 2, 0]))
    with pytest.raises(ValueError, match="overflows at this temperature"):
        run(good * 1e38, temperature=1e-3)
    for temperature in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="temperature"):
            run(temperature=temperature)
    with pytest.raises(ValueError, match=r"token is torch\.int32"):
        run(token=token.int())
    with pytest.raises(ValueError, match=r"logits is torch\.bfloat16"):
        run(good.bfloat16())
    with pytest.raises(ValueError, match=r"need contiguous bool \[classes, 39\]"):
        run(good[:, :39])
