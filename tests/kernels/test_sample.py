"""sample on each backend: agrees with logprob bit for bit, follows the distribution, keeps the row contract."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference import backend as reference
from tests.kernels.backend import ROWS, examples, native_only, ops, small
from tests.kernels.contract import SEEDS, assert_row_contract, generator, normal, threads
from tests.kernels.noise import exact_noise, key_of, noise_of_24_bits
from tests.kernels.test_logprob import classes, draw


def keys(seed: int, rows: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator(seed))


@given(rows=ROWS, vocab=st.sampled_from([1, 7, 256, 1100]), temperature=st.sampled_from([0.0, 0.7, 1.0]), seed=SEEDS)
@examples(12, 4)
def test_row_contract(rows: int, vocab: int, temperature: float, seed: int) -> None:
    allowed = classes(seed, 4, vocab)
    row_class, _ = draw(seed + 1, rows, 4, allowed)

    def all_three(logits: Tensor, key: Tensor, row_class: Tensor) -> Tensor:
        token, logp, digest = ops.sample(logits, temperature, key, allowed, row_class)
        digits = digest.view(torch.int16).view(-1, 4).float()
        return torch.cat([token.float()[:, None], logp[:, None], digits], 1)

    assert_row_contract(all_three, (normal(seed, rows, vocab) * 3, keys(seed + 2, rows), row_class), seed)


def test_control_global_generator() -> None:
    """Keys that count the rows of a call, as a shared generator does in libraries, make a row's token depend on the
    rows before it. The row alone has key 0; of equal logits it then takes another token than among 100 rows."""
    allowed = torch.ones(1, 50, dtype=torch.bool)

    def shared(logits: Tensor) -> Tensor:
        row = torch.arange(len(logits))
        return ops.sample(logits, 1.0, row, allowed, torch.zeros_like(row))[0].float()[:, None]

    with pytest.raises(AssertionError, match=r"permuted: .* differ"):
        assert_row_contract(shared, (torch.zeros(100, 50),), 0)


@given(rows=ROWS, vocab=st.sampled_from([7, 100, 256]), temperature=st.sampled_from([0.5, 1.0, 1.3]), seed=SEEDS)
@examples(12, 4)
def test_scored_as_logprob_scores(rows: int, vocab: int, temperature: float, seed: int) -> None:
    allowed = classes(seed, 4, vocab)
    row_class, _ = draw(seed + 1, rows, 4, allowed)
    logits = normal(seed, rows, vocab) * 3
    for used, scored in ((temperature, temperature), (0.0, 1.0)):
        token, logp, digest = ops.sample(logits, used, keys(seed, rows), allowed, row_class)
        assert bool(allowed[row_class, token].all())
        with threads(1):
            again, _, digest_again = ops.logprob(logits, token, scored, allowed, row_class)
        assert torch.equal(logp, again) and torch.equal(digest, digest_again)
        other = ops.logprob(logits, token, scored * 1.25, allowed, row_class)  # control
        assert vocab < 100 or not torch.equal(digest, other[2])


@native_only
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_follows_the_distribution(temperature: float) -> None:
    """Chi-square of 200,000 draws over 12 tokens against softmax, below the 1 - 1e-6 quantile for 11 degrees of freedom
    (about 49); keys are consecutive numbers, the least random there are. The control draws at another temperature."""
    logits = normal(3, 1, 12)
    rows = 200_000
    allowed, zero = torch.ones(1, 12, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    many = logits.expand(rows, 12).contiguous()

    def chi_square(at: float) -> float:
        token, _, _ = ops.sample(many, at, torch.arange(rows), allowed, zero)
        expected = torch.softmax(logits[0].double() / temperature, 0) * rows
        return float(((torch.bincount(token, minlength=12) - expected) ** 2 / expected).sum())

    assert chi_square(temperature) < 49 < chi_square(temperature * 1.05)


@native_only
def test_neighbouring_keys_are_independent() -> None:
    """Tokens of keys n and n + 1 over two equal logits: all four pairs alike often, within 5 standard deviations."""
    rows = 100_000
    args = torch.ones(1, 2, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    token, _, _ = ops.sample(torch.zeros(rows, 2), 1.0, torch.arange(rows), *args)
    pairs = torch.bincount(token[:-1] * 2 + token[1:], minlength=4)
    assert float((pairs - rows / 4).abs().max()) < 5 * math.sqrt(rows * 3 / 16)


@pytest.mark.parametrize("word", [1, 12345, 2**31, 2**36 + 1])
def test_an_improbable_token_is_drawn(word: int) -> None:
    """A key from which a token's word is small, so that its noise is 44 to 19: as much as that makes up for, and no
    more. Control: noise of 24 bits is 25 ln 2 at most, from any key, which is not enough."""
    vocab, token = 300, 123
    key = torch.tensor([key_of(word, token)])
    noise = reference.gumbel(key, vocab)[0]
    assert abs(float(noise[token]) - exact_noise(word)) < 1e-9
    others = torch.arange(vocab) != token
    allowed, zero = torch.ones(1, vocab, dtype=torch.bool), torch.tensor([0])
    for ahead in (0.1, -0.1):
        logits = torch.zeros(1, vocab)
        logits[0, token] = noise[others].max() - noise[token] + ahead
        assert bool(ops.sample(logits, 1.0, key, allowed, zero)[0] == token) == (ahead > 0)
        of_24_bits = noise_of_24_bits(key, torch.arange(vocab))
        assert logits[0, token] + 25 * math.log(2) < of_24_bits[others].max()


def test_same_tokens_as_the_definition() -> None:
    """The definition in float64 is the oracle. Another token only where two scores nearly tie, for the last bits of the
    log-prob, and of the noise where that is fp32 with our own log."""
    rows = small(3000, 60)
    allowed = classes(1, 3, 256)
    row_class, _ = draw(2, rows, 3, allowed)
    logits, key = normal(3, rows, 256) * 2, keys(4, rows)
    token, _, _ = ops.sample(logits, 0.9, key, allowed, row_class)
    expected, _, _ = reference.sample(logits.double(), 0.9, key, allowed, row_class)
    assert int((token != expected).sum()) <= rows // 1000
    other, _, _ = ops.sample(logits, 0.9, key + 1, allowed, row_class)  # control
    assert int((other != expected).sum()) > rows // 10


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [torch.nan, 1.0, torch.inf, 1.0]])
    allowed = torch.tensor([[True, True, True, True], [False, True, False, True]])
    token, logp, _ = ops.sample(logits, 0.0, torch.tensor([5, 6]), allowed, torch.tensor([0, 1]))
    assert token.tolist() == [1, 1]
    assert torch.allclose(logp[1], torch.tensor(-math.log(2)))  # scored at temperature 1
    long = normal(1, 50, 300)
    zero = torch.zeros(50, dtype=torch.int64)
    got, _, _ = ops.sample(long, 0.0, zero, torch.ones(1, 300, dtype=torch.bool), zero)
    assert torch.equal(got, long.argmax(1))
    longer = torch.zeros(1, 2500)
    longer[0, [1500, 2400]] = 1.0
    assert ops.sample(longer, 0.0, zero[:1], torch.ones(1, 2500, dtype=torch.bool), zero[:1])[0].tolist() == [1500]


def test_key_decides() -> None:
    logits, zero = normal(1, 1, 256).expand(64, 256).contiguous(), torch.zeros(64, dtype=torch.int64)
    allowed = torch.ones(1, 256, dtype=torch.bool)
    first, _, _ = ops.sample(logits, 1.0, keys(1, 64), allowed, zero)
    again, _, _ = ops.sample(logits, 1.0, keys(1, 64), allowed, zero)
    other, _, _ = ops.sample(logits, 1.0, keys(2, 64), allowed, zero)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_errors_name_the_row() -> None:
    allowed, zero = torch.tensor([[True, False]]), torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"sample: row 1 .*NaN"):
        ops.sample(torch.tensor([[0.0, 0.0], [torch.nan, 0.0]]), 1.0, zero, allowed, zero)
    with pytest.raises(ValueError, match="sample: row 0 has class 1"):
        ops.sample(torch.zeros(2, 2), 1.0, zero, allowed, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="temperature is -1"):
        ops.sample(torch.zeros(2, 2), -1, zero, allowed, zero)
    with pytest.raises(ValueError, match=r"key is torch\.float32"):
        ops.sample(torch.zeros(2, 2), 1.0, torch.zeros(2), allowed, zero)
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="no finite logit among the tokens that its class allows"):
        ops.sample(torch.zeros(2, 2), 1.0, zero, nothing, zero)
