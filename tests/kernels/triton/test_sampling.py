"""logprob and sample in Triton: row contract, digest, one function for both, oracle, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.triton import sampling
from tests.kernels.contract import SEEDS, assert_gradients, assert_row_contract, normal, uneven_sum
from tests.kernels.test_logprob import classes, digest_of, draw
from tests.kernels.test_sample import keys
from tests.kernels.triton.device import there

logprob, sample = there(sampling.logprob), there(sampling.sample)

ROWS = st.integers(1, 16)


def columns(first: Tensor, second: Tensor, digest: Tensor) -> Tensor:
    digits = digest.view(torch.int16).view(-1, 4).float()
    return torch.cat([first.float()[:, None], second[:, None], digits], 1)


@given(rows=ROWS, vocab=st.sampled_from([1, 7, 256, 1100]), seed=SEEDS)
@settings(max_examples=5)
def test_logprob_row_contract(rows: int, vocab: int, seed: int) -> None:
    allowed = classes(seed, 4, vocab)
    row_class, token = draw(seed + 1, rows, 4, allowed)

    def all_three(logits: Tensor, token: Tensor, row_class: Tensor) -> Tensor:
        # The contract's strangers mix rows: a token must stay one that its class allows.
        token = torch.where(allowed[row_class, token], token, 0)
        return columns(*logprob(logits, token, 0.8, allowed, row_class))

    assert_row_contract(all_three, (normal(seed, rows, vocab) * 3, token, row_class), seed)


@given(rows=ROWS, vocab=st.sampled_from([1, 7, 256, 1100]), temperature=st.sampled_from([0.0, 0.7, 1.0]), seed=SEEDS)
@settings(max_examples=5)
def test_sample_row_contract(rows: int, vocab: int, temperature: float, seed: int) -> None:
    allowed = classes(seed, 4, vocab)
    row_class, _ = draw(seed + 1, rows, 4, allowed)

    def all_three(logits: Tensor, key: Tensor, row_class: Tensor) -> Tensor:
        return columns(*sample(logits, temperature, key, allowed, row_class))

    assert_row_contract(all_three, (normal(seed, rows, vocab) * 3, keys(seed + 2, rows), row_class), seed)


def test_control_sum_by_row_count() -> None:
    """Log-probs from a sum whose pieces follow the row count."""
    with pytest.raises(AssertionError, match="differ"):
        assert_row_contract(
            lambda x: x - torch.log(uneven_sum(torch.exp(x), len(x)))[:, None], (normal(1, 40, 256),), 0
        )


@pytest.mark.parametrize("vocab", [7, 256, 2000])
def test_float64_oracle(vocab: int) -> None:
    """The difference to the maximum rounds at 2^-24 of |logit|, the sums at most as V / 16 steps would."""
    allowed = classes(1, 3, vocab)
    row_class, token = draw(2, 20, 3, allowed)
    logits = normal(3, 20, vocab) * 3
    logp, entropy, _ = logprob(logits, token, 0.7, allowed, row_class)
    oracle, entropy_oracle, _ = reference.logprob(logits.double(), token, 0.7, allowed, row_class)
    bound = (vocab / 16 + 64) * 2.0**-24
    assert float((logp - oracle).abs().max()) <= bound
    assert float((entropy - entropy_oracle).abs().max()) <= 4 * bound


@pytest.mark.parametrize("vocab", [1, 40, 1030])
def test_digest_is_the_hash_of_the_whole_row(vocab: int) -> None:
    """Computed here in Python integers from the log-prob of every token, -inf where not allowed."""
    allowed = classes(5, 3, vocab)[2:]
    logits = normal(6, 1, vocab)
    minus_inf = int(torch.tensor(-torch.inf).view(torch.int32)) & 0xFFFFFFFF
    mine = allowed[0].nonzero()[:, 0]
    one = logits.expand(len(mine), vocab).contiguous()
    logp, _, digest = logprob(one, mine, 0.9, allowed, torch.zeros_like(mine))
    bits = [minus_inf] * vocab
    for v, value in zip(mine.tolist(), logp.view(torch.int32).tolist(), strict=True):
        bits[v] = value & 0xFFFFFFFF
    assert set(digest.tolist()) == {digest_of(bits)}
    bits[int(mine[-1])] ^= 1  # one ulp of one log-prob
    assert digest_of(bits) != int(digest[0])


@pytest.mark.parametrize(("vocab", "temperature"), [(7, 0.5), (100, 1.0), (1100, 1.3)])
def test_scored_as_logprob_scores(vocab: int, temperature: float) -> None:
    allowed = classes(3, 4, vocab)
    row_class, _ = draw(4, 20, 4, allowed)
    logits = normal(5, 20, vocab) * 3
    for used, scored in ((temperature, temperature), (0.0, 1.0)):
        token, logp, digest = sample(logits, used, keys(6, 20), allowed, row_class)
        assert bool(allowed[row_class, token].all())
        again, _, digest_again = logprob(logits[3:], token[3:], scored, allowed, row_class[3:])
        assert torch.equal(logp[3:], again) and torch.equal(digest[3:], digest_again)
        other = logprob(logits, token, scored * 1.25, allowed, row_class)  # control
        assert vocab < 100 or not torch.equal(digest, other[2])


def test_same_tokens_as_the_definition() -> None:
    """Both take the noise in float64: another token only where two scores tie but for the log-prob's last bits."""
    allowed = classes(1, 3, 256)
    row_class, _ = draw(2, 60, 3, allowed)
    logits, key = normal(3, 60, 256) * 2, keys(4, 60)
    token, _, _ = sample(logits, 0.9, key, allowed, row_class)
    expected, _, _ = reference.sample(logits.double(), 0.9, key, allowed, row_class)
    assert torch.equal(token, expected)
    other, _, _ = sample(logits, 0.9, key + 1, allowed, row_class)  # control
    assert not torch.equal(other, expected)


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [torch.nan, 1.0, torch.inf, 1.0]])
    allowed = torch.tensor([[True, True, True, True], [False, True, False, True]])
    token, logp, _ = sample(logits, 0.0, torch.tensor([5, 6]), allowed, torch.tensor([0, 1]))
    assert token.tolist() == [1, 1]
    assert torch.allclose(logp[1], torch.tensor(-math.log(2)))  # scored at temperature 1
    long = torch.zeros(1, 2500)
    long[0, [1500, 2400]] = 1.0
    zero = torch.zeros(1, dtype=torch.int64)
    assert sample(long, 0.0, zero, torch.ones(1, 2500, dtype=torch.bool), zero)[0].tolist() == [1500]


def test_what_is_not_allowed_does_not_count() -> None:
    allowed = torch.zeros(2, 40, dtype=torch.bool)
    allowed[0, [3, 20]] = allowed[1, 39] = True
    logits, row_class = normal(1, 2, 40), torch.tensor([0, 1])
    before = logprob(logits, torch.tensor([20, 39]), 1.0, allowed, row_class)
    logits[0, [0, 4, 39]] = torch.tensor([torch.nan, torch.inf, 1e30])
    after = logprob(logits, torch.tensor([20, 39]), 1.0, allowed, row_class)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert after[0][1] == 0 and after[1][1] == 0  # one token allowed: certain


@pytest.mark.parametrize("vocab", [7, 1100])
def test_gradients(vocab: int) -> None:
    """Of log-prob and entropy together, relative to the greatest gradient; 0 for tokens that are not allowed."""
    allowed = classes(1, 3, vocab)
    row_class, token = draw(2, 20, 3, allowed)

    def both(logits: Tensor) -> Tensor:
        run = reference.logprob if logits.dtype == torch.float64 else logprob
        logp, entropy, _ = run(logits, token, 0.7, allowed, row_class)
        return torch.stack([logp, entropy])

    assert_gradients(both, both, (normal(3, 20, vocab) * 2,), 4, 4e-6)
    logits = normal(3, 20, vocab).requires_grad_()
    logprob(logits, token, 0.7, allowed, row_class)[0].sum().backward()
    assert logits.grad is not None and bool((logits.grad[~allowed[row_class]] == 0).all())


def test_impossible_tokens_have_no_gradient() -> None:
    """An allowed logit of -inf: log-prob -inf for it, and no NaN in anyone's gradient."""
    logits = torch.tensor([[0.5, -torch.inf, 1.0]], requires_grad=True)
    allowed, zero = torch.ones(1, 3, dtype=torch.bool), torch.tensor([0])
    logp, entropy, _ = logprob(logits, torch.tensor([0]), 1.0, allowed, zero)
    (logp + entropy).sum().backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all()) and logits.grad[0, 1] == 0
    assert logprob(logits.detach(), torch.tensor([1]), 1.0, allowed, zero)[0] == -torch.inf


def test_no_rows() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert sample(torch.zeros(0, 5), 1.0, none, torch.ones(1, 5, dtype=torch.bool), none)[0].shape == (0,)


def test_errors_name_the_row() -> None:
    allowed, row_class = classes(1, 3, 40), torch.tensor([0, 1, 2, 0])
    allowed[2] = False
    allowed[2, 5] = True
    good, token = normal(1, 4, 40), torch.tensor([0, 0, 5, 0])

    def run(
        logits: Tensor = good, token: Tensor = token, row_class: Tensor = row_class, temperature: float = 1.0
    ) -> None:
        logprob(logits, token, temperature, allowed, row_class)

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
    with pytest.raises(ValueError, match="temperature is -1"):
        sample(good, -1, token, allowed, row_class)
    nothing = torch.zeros(1, 40, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sample: row 0 .*no finite logit"):
        sample(good, 1.0, token, nothing, torch.zeros(4, dtype=torch.int64))
