"""Presets, their names and shapes on the meta device, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import InklingForConditionalGeneration

from kernels.layout import Segments
from model.backbone.transformer import InteractionModel
from model.config import PRESETS, check, log_scale_table, preset
from model.inputs import Inputs
from model.senses.video import Patches
from tests.model.cases import random_config


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        ours = InteractionModel(preset(name)).state_dict()
        theirs = InklingForConditionalGeneration(preset(name)).state_dict()
    assert {key: tuple(t.shape) for key, t in ours.items()} == {key: tuple(t.shape) for key, t in theirs.items()}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("conv_kernel_size", 3, "conv_kernel_size is 3"),
        ("hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("n_shared_experts", 0, "n_shared_experts is 0"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1"),
        ("layer_types", ["hybrid"], "layer_types has 1 entries for 4 layers"),
    ],
)
def test_what_is_not_computed_is_refused(field: str, value: object, message: str) -> None:
    config = preset("tiny")
    setattr(config.text_config, field, value)
    with pytest.raises(ValueError, match=message):
        InteractionModel(config)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="'huge' does not exist; choose one of nano, tiny, base, inkling_small"):
        preset("huge")


def test_log_scaling_by_hand() -> None:
    text = random_config(0).text_config
    text.log_scaling_n_floor, text.log_scaling_alpha = 20, 0.1
    tau = log_scale_table(text)
    assert tau[19] == 1
    assert tau[39].item() == pytest.approx(1 + 0.1 * 0.6931471805599453)
    text.max_position_embeddings, text.log_scaling_n_floor, text.log_scaling_alpha = 1_000_000, 128_000, 0.1
    tau = log_scale_table(text)
    for i in (0, 127_999, 128_000, 131_071, 255_999, 777_777, 999_999):
        wanted = 1 + 0.1 * math.log(max((i + 1) / 128_000, 1.0))
        assert tau[i] == torch.tensor(wanted, dtype=torch.float64).float(), i
    text.log_scaling_n_floor = None
    assert log_scale_table(text) is None
    check(preset("tiny"))


def test_forward_before_pack_and_wrong_counts() -> None:
    model = InteractionModel(preset("tiny"))

    segments, none = Segments.build([0], [0], [2]), torch.empty(0, 80, dtype=torch.uint8)
    dark = Patches.none(model.senses.patch)
    with pytest.raises(RuntimeError, match=r"call pack\(\)"):
        model(Inputs.of(torch.tensor([1, 8]), none, dark, segments, model.senses))
    with pytest.raises(RuntimeError, match=r"call pack\(\)"):
        model.repack()
    model.init_weights(0)
    model.pack()
    with pytest.raises(ValueError, match="tokens has 3 rows, segments 2"):
        Inputs.of(torch.tensor([1, 8, 8]), none, dark, segments, model.senses)
    with pytest.raises(ValueError, match="1 audio tokens, but codes has 0 rows"):
        Inputs.of(torch.tensor([1, 2]), none, dark, segments, model.senses)
