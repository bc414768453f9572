"""Checkpoints go to transformers and come back, in its own and in Inkling's names; bad ones are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import InklingForConditionalGeneration

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights.checkpoint import CheckpointError, load, load_into, save, weights_digest
from model.weights.finite import NotFiniteError
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


def test_ours_loads_in_transformers(tmp_path: Path) -> None:
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


def test_a_config_that_is_not_finite_is_not_written(tmp_path: Path, tiny: InteractionModel) -> None:
    save(tiny, tmp_path / "a")
    before = (tmp_path / "a/config.json").read_bytes()
    tiny.config.text_config.rms_norm_eps = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tiny, tmp_path / "a")
    assert (tmp_path / "a/config.json").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a"]
    load(tmp_path / "a")


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


def test_a_failed_save_leaves_the_old_one(
    tmp_path: Path, tiny: InteractionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tiny, tmp_path / "a")
    digest = weights_digest(tiny)

    def full(content: object, path: Path, **rest: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.weights.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, with an index of its one file."""
    folder = tmp_path_factory.mktemp("saved") / "a"
    save(fresh_model(), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    load(folder)  # the control
    return folder


TEXT, AUDIO = "text_config", "audio_config"


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("", [], "must be a JSON object"),
        ("", None, "must be a JSON object"),
        ("model_type", None, "model_type is None"),
        ("model_type", ["inkling_mm_model"], "model_type is"),
        ("dtype", "system", "dtype is 'system'; choose one of"),
        ("dtype", "float8", "dtype is 'float8'; choose one of"),
        ("dtype", 3, "dtype is 3; choose one of"),
        ("dtype", "float16", "dtype float16; float32 and bfloat16 are computed"),
        ("to_dict", 3, "cannot be called 'to_dict'"),
        ("__class__", 3, "cannot be called '__class__'"),
        ("attribute_map", 3, "config.json"),
        ("num_labels", 10**9, "num_labels is 1000000000"),
        ("audio_token_id", 2**31, "audio_token_id is 2147483648: give a number from 0"),
        ("audio_token_id", -1, "audio_token_id is -1"),
        (TEXT, [], "transformers refuses it"),
        (f"{TEXT}.dtype", "load", "dtype is 'load'"),
        (f"{TEXT}.hidden_size", -1, "hidden_size is -1: give a number from 1"),
        (f"{TEXT}.hidden_size", 0, "hidden_size is 0: give a number from 1"),
        (f"{TEXT}.hidden_size", 128.0, "transformers refuses it"),
        (f"{TEXT}.hidden_size", "128", "transformers refuses it"),
        (f"{TEXT}.hidden_size", True, "transformers refuses it"),
        (f"{TEXT}.hidden_size", 2**20, "does not fit its config"),
        (f"{TEXT}.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000: give a number from 0 to 10,000"),
        (f"{TEXT}.num_hidden_layers", 10**400, "has more than 64 bits"),
        (f"{TEXT}.num_hidden_layers", None, "transformers refuses it"),
        (f"{TEXT}.vocab_size", 0, "vocab_size is 0: give a number from 1"),
        (f"{TEXT}.sliding_window", -5, "sliding_window_size is -5"),
        (f"{TEXT}.num_attention_heads", 3, "num_attention_heads is 3, no multiple of 2"),
        (f"{TEXT}.num_experts_per_tok", 9, "num_experts_per_tok is 9 of 8"),
        (f"{TEXT}.unpadded_vocab_size", 257, "unpadded_vocab_size is 257 of a vocab_size of 256"),
        (f"{TEXT}.layer_types", ["hybrid"] * 3 + ["full_attention"], "layer_types has 'full_attention'"),
        (f"{TEXT}.layer_types", [None] * 4, "transformers refuses it"),
        (f"{TEXT}.rms_norm_eps", 0.0, "rms_norm_eps is 0.0"),
        (f"{TEXT}.route_scale", float("nan"), "NaN is no number"),
        (f"{AUDIO}.n_mel_bins", 79, "n_mel_bins is 79: give a number from 80 to 80"),
        (f"{AUDIO}.mel_vocab_size", 4, "mel_vocab_size is 4"),
    ],
)
def test_a_config_that_is_no_model(tmp_path: Path, saved: Path, where: str, value: object, says: str) -> None:
    shutil.copytree(saved, tmp_path / "a")
    content = json.loads((tmp_path / "a" / "config.json").read_text())
    at, *names = content, *where.split(".")
    for name in names[:-1]:
        at = at[name]
    at[names[-1]] = value
    (tmp_path / "a" / "config.json").write_text(json.dumps(content if where else value))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "a")
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ([], "index.json is damaged"),
        ({}, "weight_map: field required"),
        ({"weight_map": []}, "weight_map: "),
        ({"weight_map": {}}, "it names no file"),
        ({"weight_map": {"a": 3}}, "weight_map.a: "),
        ({"weight_map": {"a": "../../etc/passwd"}}, "'../../etc/passwd', which is no file of this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd', which is no file of this folder"),
        ({"weight_map": {"a": ".."}}, "is a folder"),
        ({"weight_map": {"a": ""}}, "is a folder"),
        ({"weight_map": {"a": "a\0b"}}, "control character"),
        ({"weight_map": {"a": "model-00001.safetensors"}}, "model-00001.safetensors is missing"),
        ({"weight_map": {"a": "model.safetensors", "b": "again.safetensors"}}, "comes twice"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, saved: Path, index: object, says: str) -> None:
    shutil.copytree(saved, tmp_path / "a")
    (tmp_path / "a" / "again.safetensors").write_bytes((tmp_path / "a" / "model.safetensors").read_bytes())
    path = tmp_path / "a" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path / "a")
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.int(), "lm_head.weight is of type I32, but weights are one of"),
        (lambda w: w.to(torch.float8_e5m2), "lm_head.weight is of type F8_E5M2"),
        (lambda w: w.flatten(), "lm_head.weight is [32768]"),
        (lambda w: w[:0], "lm_head.weight is [0, 128]"),
        (lambda w: w.index_fill(0, torch.tensor([3]), torch.nan), "128 of 32,768 values of lm_head.weight are not"),
        (lambda w: w.index_fill(0, torch.tensor([3]), -torch.inf), "are not finite: use another checkpoint"),
        (lambda w: w.double() * 1e300, "are not finite"),  # beyond fp32
    ],
)
def test_weights_that_are_none(
    tmp_path: Path, saved: Path, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    shutil.copytree(saved, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": change(tensors["lm_head.weight"])}, tmp_path / "a" / "model.safetensors")
    for act in (load, lambda folder: load(folder, keep_weights=False), lambda folder: load_into(fresh_model(), folder)):
        with pytest.raises(MetronomeError) as error:
            act(tmp_path / "a")
        assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, tiny: InteractionModel) -> None:
    save(tiny, tmp_path / "a")
    digest = weights_digest(tiny)
    with torch.no_grad():
        tiny.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"1 of 32,768 values of lm_head\.weight .* it was not saved"):
        save(tiny, tmp_path / "a")
    assert weights_digest(load(tmp_path / "a")) == digest
