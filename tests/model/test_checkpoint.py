"""Checkpoints go to transformers and come back, in its own and in Inkling's names; bad ones are refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InklingForConditionalGeneration

from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights.checkpoint import CheckpointError, load, load_into, save, weights_digest
from tests.model.cases import random_rows, twins, whole
from tests.support.models import fresh_model


@pytest.fixture
def tiny() -> InteractionModel:
    return fresh_model()


@pytest.mark.parametrize("shard", ["50KB", "1GB"])
@pytest.mark.parametrize("original_names", [True, False])
def test_transformers_checkpoint_loads_here(tmp_path: Path, shard: str, original_names: bool) -> None:
    ours, theirs = twins(4)
    theirs.save_pretrained(tmp_path, max_shard_size=shard, save_original_format=original_names)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "50KB")
    loaded = load(tmp_path)
    assert weights_digest(loaded) == weights_digest(ours)
    rows = random_rows(4)
    assert torch.equal(whole(loaded, rows), whole(ours, rows))


def test_ours_loads_in_transformers_vision_included(tmp_path: Path) -> None:
    _, theirs = twins(4)
    theirs.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    back, info = InklingForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = fresh_model("tiny", 3, dtype)
    save(model, tmp_path / "a")
    again = load(tmp_path / "a")
    assert again.dtype == dtype
    assert weights_digest(again) == weights_digest(model)
    other = fresh_model("tiny", 4, dtype)
    load_into(other, tmp_path / "a")
    assert weights_digest(other) == weights_digest(model)
    assert not [p.name for p in tmp_path.iterdir() if p.name != "a"], "a temporary folder was left"


def test_another_config_is_refused_by_field(tmp_path: Path, tiny: InteractionModel) -> None:
    save(tiny, tmp_path / "tiny")
    with pytest.raises(CheckpointError, match=r"text_config\.hidden_size: wanted \d+, stored 128"):
        load_into(twins(0)[0], tmp_path / "tiny")


def test_damage_is_named(tmp_path: Path, tiny: InteractionModel) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        load(tmp_path / "nowhere")
    save(tiny, tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    tensors = load_file(weights)
    save_file({k: v for k, v in tensors.items() if k != "lm_head.weight"}, weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load(tmp_path / "a")
    save_file(tensors | {"lm_head.weight": torch.zeros(3, 3)}, weights)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[3, 3\], not \[256, 128\]"):
        load(tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="is damaged"):
        load(tmp_path / "a")
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="'llama'"):
        load(tmp_path / "a")


def test_a_failed_save_leaves_the_old_one(tmp_path: Path, tiny: InteractionModel) -> None:
    save(tiny, tmp_path / "a")
    digest = weights_digest(tiny)
    tiny.passthrough["model.vision_tower.x"] = "not a tensor"  # type: ignore[assignment]
    with pytest.raises(Exception, match=r"str|Tensor"):
        save(tiny, tmp_path / "a")
    assert weights_digest(load(tmp_path / "a")) == digest


def test_the_digest_sees_one_bit_and_nothing_else(tiny: InteractionModel) -> None:
    digest = weights_digest(tiny)
    weight = tiny.model.language_model.norm.weight
    with torch.no_grad():
        weight[5] = torch.nextafter(weight[5], torch.tensor(torch.inf))
        assert weights_digest(tiny) != digest
        weight[5] = torch.nextafter(weight[5], torch.tensor(-torch.inf))
    assert weights_digest(tiny) == digest


def test_weights_come_from_the_seed_alone(tiny: InteractionModel) -> None:
    torch.manual_seed(99)
    again = InteractionModel(preset("tiny"))
    again.init_weights(0)
    assert weights_digest(again) == weights_digest(tiny)
    again.init_weights(1)
    assert weights_digest(again) != weights_digest(tiny)
