"""Our forward against transformers' Inkling: fp32, text, audio and video, logits within 1e-5 of the largest."""

from __future__ import annotations

import pytest
import torch
from transformers import InklingForConditionalGeneration

from model.inputs import Inputs
from tests.model.cases import (
    Rows,
    pixel_values,
    random_config,
    random_rows,
    random_video,
    twins,
    whole,
)

CONFIGS = 24
BOUND = 1e-5


def test_the_configs_cover_what_they_should() -> None:
    texts = [random_config(seed).text_config for seed in range(CONFIGS)]
    assert {t.log_scaling_n_floor for t in texts} == {None, 20}
    assert {t.n_shared_experts for t in texts} == {1, 2}
    assert {kind for t in texts for kind in t.mlp_layer_types} == {"dense", "sparse"}
    assert all({"hybrid", "hybrid_sliding"} == set(t.layer_types) for t in texts)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def their_logits(model: InklingForConditionalGeneration, rows: Rows) -> torch.Tensor:
    pixels = pixel_values(rows, model.config.vision_config.patch_size) if len(rows.frames.sizes) else None
    output = model(input_ids=rows.tokens[None], audio_input_ids=rows.codes[None].long(), pixel_values=pixels)
    return output.logits[0]


@pytest.mark.parametrize("seed", range(CONFIGS))
@torch.no_grad()
def test_logits_equal_transformers(seed: int) -> None:
    ours, theirs = twins(seed)
    rows = random_video(seed, ours.senses.patch) if seed % 2 else random_rows(seed)
    wanted = their_logits(theirs, rows)
    got = ours.logits(whole(ours, rows))
    assert got.shape == wanted.shape
    assert relative_error(got, wanted) <= BOUND


@pytest.mark.parametrize("seed", [0, 3])
@torch.no_grad()
def test_on_both_backends(backend: str, seed: int) -> None:
    test_logits_equal_transformers.__wrapped__(seed)


@pytest.mark.parametrize("seed", [1, 2])
@torch.no_grad()
def test_bf16_is_near(seed: int) -> None:
    ours, theirs = twins(seed, torch.bfloat16)
    rows = random_rows(seed)
    wanted = theirs(input_ids=rows.tokens[None], audio_input_ids=rows.codes[None].long()).logits[0]
    error = (ours.logits(whole(ours, rows)) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
    assert error < 0.05  # 2^-8 a rounding, a few dozen roundings deep; an expert may flip in single rows


@torch.no_grad()
def test_the_bound_sees_a_wrong_weight() -> None:
    """Negative control: one weight off by a hundredth is far outside the bound."""
    ours, theirs = twins(0)
    rows = random_rows(0)
    wanted = theirs(input_ids=rows.tokens[None], audio_input_ids=rows.codes[None].long()).logits[0]
    ours.model.language_model.layers[0].self_attn.q_proj.weight[0, 0] += 0.01
    ours.repack()
    assert relative_error(ours.logits(whole(ours, rows)), wanted) > BOUND


def test_gradients_equal_transformers() -> None:
    """Every parameter's gradient of one cross entropy, within 1e-4 of that parameter's largest."""
    ours, theirs = twins(5)
    rows = random_video(5, ours.senses.patch)
    target = random_rows(6, len(rows.tokens)).tokens
    torch.nn.functional.cross_entropy(their_logits(theirs, rows), target).backward()
    torch.nn.functional.cross_entropy(ours.logits(whole(ours, rows)), target).backward()
    wanted = dict(theirs.named_parameters())
    for name, weight in ours.named_parameters():
        assert weight.grad is not None, name
        assert relative_error(weight.grad, wanted[name].grad) <= 1e-4, name


@torch.no_grad()
def test_two_sequences_in_one_call_equal_two_calls(backend: str) -> None:
    ours, _ = twins(7)
    a, b = random_rows(1, 60), random_rows(2, 33)
    both = ours(Inputs.cat([a, b], ours.senses))
    assert torch.equal(both[:60], whole(ours, a))
    assert torch.equal(both[60:], whole(ours, b))
