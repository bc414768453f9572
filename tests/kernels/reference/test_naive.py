"""The naive backend computes the same model, only not the same bits; and nobody comes to it by accident."""

from __future__ import annotations

import pytest
import torch

from kernels import dispatch
from kernels.dispatch import contract_id, substituted
from kernels.errors import MetronomeError
from kernels.reference import naive
from model.backbone.state import SessionState
from model.backbone.transformer import InteractionModel
from tests.model.cases import ROWS, in_pieces, random_rows, twins, whole

BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # of the largest hidden value


def naive_twin(ours: InteractionModel) -> InteractionModel:
    """The same weights, packed for the naive backend; to be called within `substituted(naive)`."""
    model = InteractionModel(ours.config, ours.dtype)
    model.load_state_dict(ours.state_dict())
    model.pack()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_same_function_up_to_rounding(seed: int, dtype: torch.dtype) -> None:
    ours, _ = twins(seed, dtype)
    rows = random_rows(seed)
    wanted = whole(ours, rows)
    with substituted(naive):
        model = naive_twin(ours)
        uncached = whole(model, rows)
        pieces = []
        for lengths in ([ROWS], [64, ROWS - 64], [1] * ROWS):
            state = SessionState(model.config, 2, 256, model.dtype, max_rows=512)
            slot = [state.open() for _ in range(2)][1]
            pieces.append(in_pieces(model, rows, lengths, state, slot))
    for found in (uncached, *pieces):
        gap = (found - wanted).float().abs().amax(1) / wanted.float().abs().max()
        assert gap.median() < BOUND[dtype]  # a rounding may send single rows to another expert
    # Whether `pieces` have other bits than `uncached` depends on the machine's library; naive backend promises neither.


def test_gradients_are_those_of_our_kernels_up_to_rounding() -> None:
    ours, _ = twins(1)
    rows = random_rows(1)
    wanted = torch.autograd.grad(whole(ours, rows).square().mean(), list(ours.parameters()), materialize_grads=True)
    with substituted(naive):
        model = naive_twin(ours)
        found = torch.autograd.grad(
            whole(model, rows).square().mean(), list(model.parameters()), materialize_grads=True
        )
    for (name, _), a, b in zip(ours.named_parameters(), found, wanted, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm() + 1e-6, name


def test_updated_weights_are_read_after_repacking() -> None:
    ours, _ = twins(0)
    rows = random_rows(0)
    with substituted(naive), torch.no_grad():
        model = naive_twin(ours)
        before = whole(model, rows)
        for parameter in model.parameters():
            parameter.mul_(1.01)
        model.repack()
        fresh = naive_twin(model)
        assert torch.equal(whole(model, rows), whole(fresh, rows))
        assert not torch.equal(whole(model, rows), before)


def test_sampling_agrees_with_scoring_and_with_the_reference() -> None:
    from kernels.reference import backend as reference

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 97, generator=generator) * 3
    allowed = torch.rand(3, 97, generator=generator) < 0.6
    row_class = torch.randint(0, 3, (40,), generator=generator)
    key = torch.randint(-(2**62), 2**62, (40,), generator=generator)
    for temperature in (0.0, 0.7):
        token, logprob, digest = naive.sample(logits, temperature, key, allowed, row_class)
        assert torch.equal(token, reference.sample(logits, temperature, key, allowed, row_class)[0])
        again, entropy, same = naive.logprob(logits, token, temperature or 1.0, allowed, row_class)
        assert torch.equal(again, logprob) and torch.equal(same, digest)
        wanted = reference.logprob(logits, token, temperature or 1.0, allowed, row_class)
        torch.testing.assert_close(logprob, wanted[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entropy, wanted[1], rtol=1e-5, atol=1e-5)


def test_no_environment_selects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'naive' is not a backend"):
        dispatch.use_backend("naive")
    monkeypatch.setattr(dispatch, "_active", None)
    monkeypatch.setenv("METRONOME_BACKEND", "naive")
    with pytest.raises(ValueError, match="'naive' is not a backend"):
        dispatch.backend()


def test_it_has_a_contract_of_its_own_and_leaves_no_trace() -> None:
    before, ours = dispatch.backend(), contract_id()
    with pytest.raises(MetronomeError), substituted(naive):
        assert contract_id() != ours
        raise MetronomeError("even if the block fails")
    assert dispatch.backend() is before and contract_id() == ours
