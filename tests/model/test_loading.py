"""Loading in parts: a model that keeps packed copies only has the bits of one that keeps its weights, too, and refuses
what needs them; no weight is in memory twice on the way."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kernels import ops
from kernels.errors import MetronomeError, StaleWeightsError
from model.backbone.size import UNPACKED, empty
from model.backbone.transformer import InteractionModel
from model.config import from_json, preset
from model.weights import packs
from model.weights.checkpoint import load, load_into, read_packs, save, weights, weights_digest
from tests.model.cases import random_rows, twins, whole
from tests.support.models import fresh_model

MOST = 1.15
"""Of a checkpoint's size, the memory that may be taken to load it."""


def assert_equal(one: InteractionModel, other: InteractionModel) -> None:
    """Equal digests of weights and copies, and equal bits of every copy and of every weight that both have."""
    assert weights_digest(one) == weights_digest(other) and packs.digest(one) == packs.digest(other)
    for (name, a), (other_name, b) in zip(packs.packs(one), packs.packs(other), strict=True):
        assert name == other_name and a.data.keys() == b.data.keys()
        assert all(torch.equal(a.data[buffer], b.data[buffer]) for buffer in b.data), name
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, weight in one.state_dict().items():
        assert weight.shape == other.state_dict()[name].shape and weight.dtype == other.state_dict()[name].dtype
        assert weight.is_meta or torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_packs_alone_have_the_same_bits(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    save(fresh_model(name, 3, dtype), tmp_path / "a")
    for wanted in (None, torch.float32, torch.bfloat16):
        usual, lean = load(tmp_path / "a", wanted), load(tmp_path / "a", wanted, keep_weights=False)
        assert_equal(lean, usual)
        rows = random_rows(4)
        with torch.no_grad():
            assert torch.equal(whole(lean, rows), whole(usual, rows))
        copied = {n for n, weight in lean.state_dict().items() if weight.is_meta}
        assert copied == {n for n, w in usual.named_parameters() if w.ndim >= 2 and not any(u in n for u in UNPACKED)}
        assert all(w.dtype == torch.float32 for n, w in lean.named_parameters() if "sconv" in n)
        assert lean.device == usual.device and not any(p.requires_grad for p in lean.parameters())


@pytest.mark.parametrize("shard", ["50KB", "1GB"])
@pytest.mark.parametrize("original_names", [True, False])
def test_shards_and_interleaved_names_too(tmp_path: Path, shard: str, original_names: bool) -> None:
    ours, theirs = twins(4)
    theirs.save_pretrained(tmp_path, max_shard_size=shard, save_original_format=original_names)
    lean = load(tmp_path, keep_weights=False)
    assert_equal(lean, ours)
    with torch.no_grad():
        assert torch.equal(whole(lean, random_rows(4)), whole(ours, random_rows(4)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    save(fresh_model(), folder)
    return folder


NEEDS: dict[str, Callable[[InteractionModel, Path], Any]] = {
    "repack": lambda model, _: model.repack(),
    "pack": lambda model, _: model.pack(),
    "a change of the weights": lambda model, _: model.mark_changed(),
    "a forward pass for gradients": lambda model, _: whole(model, random_rows(4)),
    "saving or sending": lambda model, folder: save(model, folder / "b"),
    "saving or sending the": lambda model, _: weights(model),
    "loading ": lambda model, folder: load_into(model, folder / "a"),
    "repack: the weights of this pack": lambda model, _: packs.check(model),
    "repack: ": lambda model, _: ops.repack(model.layers[0].self_attn.packed.out),
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_needs_weights_is_refused(tmp_path: Path, saved: Path, what: str) -> None:
    shutil.copytree(saved, tmp_path / "a")
    with pytest.raises(MetronomeError, match=rf"^{what}.*keep_weights\)$"):
        NEEDS[what](load(tmp_path / "a", keep_weights=False), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    NEEDS[what](load(tmp_path / "a"), tmp_path)  # the control


def test_no_digest_outlives_a_change(saved: Path) -> None:
    lean = load(saved, keep_weights=False)
    digest = weights_digest(lean)
    with torch.no_grad():
        lean.model.language_model.norm.weight[0] += 1
    with pytest.raises(MetronomeError, match="a digest after a change"):
        weights_digest(lean)
    lean = load(saved, keep_weights=False)
    assert weights_digest(lean) == digest
    with torch.no_grad():
        lean.layers[3].mlp.gate.e_score_correction_bias[0] += 1
    with pytest.raises(MetronomeError, match="a digest after a change"):
        weights_digest(lean)
    lean = load(saved, keep_weights=False)
    lean.generation.now += 1
    with torch.no_grad(), pytest.raises(StaleWeightsError):
        whole(lean, random_rows(4))


def test_weights_alone(saved: Path) -> None:
    plain, usual = load(saved, pack=False), load(saved)
    assert weights_digest(plain) == weights_digest(usual) and not list(packs.packs(plain))
    with pytest.raises(RuntimeError, match=r"call pack\(\)"):
        whole(plain, random_rows(4))
    plain.pack()
    assert_equal(plain, usual)


def test_packs_are_read_again_from_what_weights_gave(tmp_path: Path) -> None:
    """As a rollout worker reads each step's weights."""
    file, lean = tmp_path / "weights", empty(preset("tiny"), torch.float32)
    for seed in (0, 1):
        model = fresh_model(seed=seed)
        save_file(weights(model), file)
        read_packs(lean, file)
        assert_equal(lean, model)
        with torch.no_grad():
            assert torch.equal(whole(lean, random_rows(4)), whole(model, random_rows(4)))
    content = weights(model)
    for wrong, says in (
        ({"lm_head.weight": torch.zeros(1, 128)}, r"lm_head\.weight is \[1, 128\], not \[256, 128\]"),
        ({"lm_head.weight": torch.full((256, 128), torch.nan)}, r"of lm_head\.weight are not finite"),
        ({"more": torch.zeros(1)}, "more is unknown"),
    ):
        save_file(content | wrong, file)
        with pytest.raises(MetronomeError, match=says):
            read_packs(lean, file)
    for use in (lambda: whole(lean, random_rows(4)), lambda: weights_digest(lean)):
        with torch.no_grad(), pytest.raises(MetronomeError, match=r"^(linear: the weights|a digest after a change)"):
            use()  # a part of it is new
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MetronomeError, match="is damaged"):
        read_packs(lean, file)


# ---- memory ----


def large(dtype: torch.dtype, experts: int) -> dict[str, Any]:
    """A config of 24 layers and somewhat more than 2 GB; as JSON."""
    config = preset("base").to_dict()
    text = {"num_hidden_layers": 24, "vocab_size": 4096, "moe_intermediate_size": 256, "n_routed_experts": experts}
    config["text_config"] |= text | {"layer_types": None, "mlp_layer_types": None}
    return dict(json.loads(json.dumps(config)) | {"dtype": str(dtype).removeprefix("torch.")})


def shards(model: InteractionModel, most_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The weights of a model on the meta device, made up, a shard in memory at a time."""
    block, shard = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) / 20, dict[str, torch.Tensor]()
    for name, weight in model.state_dict().items():
        repeats = -(-weight.numel() // len(block))
        shard[name] = block.to(weight.dtype).repeat(repeats)[: weight.numel()].view(weight.shape).clone()
        if sum(tensor.nbytes for tensor in shard.values()) > most_bytes:
            yield shard
            shard = {}
    yield shard


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "experts"), [(torch.bfloat16, 112), (torch.float32, 56)])
def test_loading_takes_little_more_memory_than_the_checkpoint(tmp_path: Path, dtype: torch.dtype, experts: int) -> None:
    folder, files, content = tmp_path / "a", dict[str, str](), large(dtype, experts)
    folder.mkdir()
    try:
        (folder / "config.json").write_text(json.dumps(content))
        for i, shard in enumerate(shards(empty(from_json(content), dtype), 500_000_000)):
            save_file(shard, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
            files |= dict.fromkeys(shard, f"model-{i}.safetensors")
        del shard
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert size >= 2e9 and len(set(files.values())) >= 4
        taken = {
            json.dumps(options): json.loads(
                subprocess.run(
                    [sys.executable, "-m", "tests.model.peak", str(folder), json.dumps(options)],
                    check=True, capture_output=True, text=True,
                ).stdout
            )
            for options in ({"pack": False}, {"keep_weights": False}, {})
        }  # fmt: skip
    finally:
        shutil.rmtree(folder)
    assert len({one.pop("digest") for one in taken.values()}) == 1
    weights_only, packs_only, both = ({k: v / size for k, v in one.items()} for one in taken.values())
    print({name: {k: round(v / size, 3) for k, v in one.items()} for name, one in taken.items()})
    for one in (weights_only, packs_only):
        assert 0.95 < one["anonymous"] <= one["resident"] <= MOST
    assert 1.9 < both["anonymous"] < both["resident"] <= 2 * MOST  # the control: weights and copies
