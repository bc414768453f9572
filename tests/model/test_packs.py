"""Copies of the weights: refreshed whole, refused when old, compared with the parameters, digested."""

from __future__ import annotations

import pytest
import torch

from kernels import ops
from kernels.errors import StaleWeightsError
from kernels.layout import Segments
from model.backbone.transformer import InteractionModel
from model.inputs import Inputs
from model.senses.video import Patches
from model.weights import packs
from model.weights.packs import StaleCopyError
from reward.learned.model import RewardModel
from tests.support.models import fresh_model


def forward(of: InteractionModel) -> torch.Tensor:
    none, dark = torch.empty(0, 80, dtype=torch.uint8), Patches.none(of.senses.patch)
    segments = Segments.build([0], [0], [3])
    return of.logits(of(Inputs.of(torch.tensor([1, 5, 7]), none, dark, segments, of.senses)))


@torch.no_grad()
def disturb(of: torch.nn.Module) -> None:
    """Other values of every parameter and buffer."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*of.parameters(), *of.buffers()):
        tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype) / 10)


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_no_module_can_be_forgotten(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = fresh_model(name)
    monkeypatch.setattr(getattr(one.layers[1], part), "repack", lambda: None)
    disturb(one)
    one.mark_changed()
    one.repack()
    with torch.no_grad(), pytest.raises(StaleWeightsError):
        forward(one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_repack_equals_a_fresh_pack_of_every_module(name: str, dtype: torch.dtype) -> None:
    one = fresh_model(name, dtype=dtype)
    forward(one).sum().backward()  # makes the transposed copies, too
    disturb(one)
    one.mark_changed()
    one.repack()
    other = InteractionModel(one.config, dtype)
    other.load_state_dict(one.state_dict())
    other.pack()
    assert packs.digest(one) == packs.digest(other)
    got, wanted = (
        torch.autograd.grad(forward(m).square().sum(), list(m.parameters()), allow_unused=True) for m in (one, other)
    )
    for a, b in zip(got, wanted, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
    for (name_a, a), (name_b, b) in zip(packs.packs(one), packs.packs(other), strict=True):
        assert name_a == name_b and a.data.keys() == b.data.keys()
        for buffer in b.data:
            assert torch.equal(a.data[buffer], b.data[buffer]), (name_a, buffer)
    packs.check(one)


@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_every_pack_that_is_made_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    for op in ("pack_linear", "pack_experts"):
        honest = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *parts, honest=honest: made.append(honest(*parts)) or made[-1])
    one = fresh_model(name)
    assert len(made) > 5 and {id(p) for p in made} == {id(p) for _, p in packs.packs(one)}
    assert all(p.weights is one.generation for _, p in packs.packs(one))


def test_a_pack_in_another_place_is_an_error() -> None:
    one = fresh_model("nano")
    one.layers[0].mlp.packed = (one.layers[0].mlp.packed.down,)  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"mlp\.packed is a tuple"):
        packs.check(one)


def test_every_kind_of_copy_is_found() -> None:
    made = fresh_model("tiny")
    names = [name for name, _ in packs.packs(made)]
    names += [f"{name}.packed.{f}" for name, m in made.named_modules() for f in packs._derived(m)]
    kinds = {name.split("packed.")[-1] for name in names}
    assert kinds == {
        *("packed", "qkvr", "out", "gate", "gate_up", "down"),
        *(f"model.vision_tower.encoder_layers.{i}.packed" for i in range(2)),
        *("kv_taps", "attn_taps", "mlp_taps", "scale", "bias"),
    }


def test_a_forgotten_module_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's repack does nothing: the ops refuse its packs; and where the count was spoilt too, the comparison
    names the copy."""
    one = fresh_model("tiny")
    monkeypatch.setattr(one.layers[1].self_attn, "repack", lambda: None)
    disturb(one)
    one.mark_changed()
    one.repack()
    with torch.no_grad(), pytest.raises(StaleWeightsError, match="linear: the weights were changed"):
        forward(one)
    packs.mark_current(one, one.generation)
    with torch.no_grad():
        forward(one)  # nothing shows
    with pytest.raises(StaleCopyError, match=r"layers\.1\.self_attn\.packed\.qkvr\.panels: .*not refreshed"):
        packs.check(one)


def test_a_stale_transpose_is_named() -> None:
    """Read by gradients only: log-probs would be right and every update wrong."""
    one = fresh_model("nano")
    forward(one).sum().backward()
    pack = one.layers[0].self_attn.packed.out
    pack.data["transposed"].view(-1)[3] += 1.0
    with pytest.raises(StaleCopyError, match=r"layers\.0\.self_attn\.packed\.out\.transposed"):
        packs.check(one)


def test_a_forgotten_derived_tensor_is_named() -> None:
    one = fresh_model("tiny")
    stale = one.layers[2].mlp.packed.scale.clone()
    disturb(one)
    one.mark_changed()
    one.repack()
    packs.check(one)
    one.layers[2].mlp.packed.scale = stale
    with pytest.raises(StaleCopyError, match=r"layers\.2\.mlp\.packed\.scale"):
        packs.check(one)


def test_a_change_that_nobody_told_is_refused_by_the_learner() -> None:
    one = fresh_model("nano")
    with torch.no_grad():
        one.lm_head.weight[3, 4] += 1.0
    with pytest.raises(StaleWeightsError, match="InteractionModel: the weights were changed"):
        forward(one)
    one.repack()
    forward(one)


def test_digest_is_of_what_is_multiplied() -> None:
    one = fresh_model("nano")
    before = packs.digest(one)
    assert before == packs.digest(fresh_model("nano"))
    next(packs.packs(one))[1].data["panels"].view(-1)[5] += 1.0
    assert packs.digest(one) != before
    with pytest.raises(StaleCopyError):
        packs.check(one)


def test_reward_models_copies_are_found_too() -> None:
    reward = RewardModel.build(fresh_model("nano"), ("timing",))
    names = [name for name, _ in packs.packs(reward)]
    assert "packed" in names and "backbone.packed" in names
    reward.backbone.mark_changed()
    with torch.no_grad(), pytest.raises(StaleWeightsError):
        ops.linear(torch.zeros(1, reward.heads.weight.shape[1]), reward._ready(), torch.float32)


def test_a_pack_alone_needs_no_model() -> None:
    packed = ops.pack_linear(torch.ones(3, 4))
    packed.weights.now += 1
    with pytest.raises(StaleWeightsError):
        ops.linear(torch.ones(1, 4), packed)
    ops.repack(packed)
    assert ops.linear(torch.ones(1, 4), packed).tolist() == [[4.0] * 3]
