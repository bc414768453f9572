"""`model.info`: the published numbers, and that every size it prints is what the program allocates."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import InklingConfig

from kernels.errors import MetronomeError
from kernels.layout import PackedExperts, Segments
from model import info, sizing
from model.backbone.size import (
    activation_bytes,
    empty,
    kept_bytes,
    model_bytes,
    pack_bytes,
    training_bytes,
    weight_bytes,
    zero_bytes,
)
from model.backbone.state import SessionState, session_bytes, state_bytes, state_parts
from model.backbone.transformer import InteractionModel
from model.config import PRESETS, from_json, preset
from model.published import INKLING_SMALL, SOURCES
from model.weights import packs
from model.weights.checkpoint import config_of, load, save
from tests.model.cases import random_config
from tests.support.models import fresh_model

RELEASED = {
    "architectures": ["InklingForConditionalGeneration"], "model_type": "inkling_mm_model", "eos_token_id": 200006,
    "text_config": {
        "model_max_length": 1048576, "torch_dtype": "bfloat16", "hidden_size": 4096, "num_hidden_layers": 42,
        "vocab_size": 201024, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "d_rel": 16,
        "rel_extent": 1024, "q_bias": False, "o_bias": False, "log_scaling_n_floor": 128000, "log_scaling_alpha": 0.1,
        "rms_norm_eps": 1e-6, "use_embed_norm": True, "local_layer_ids": [i for i in range(42) if i % 6 != 5],
        "dense_mlp_idx": 2, "use_sconv": True, "sconv_kernel_size": 4, "unpadded_vocab_size": 200058,
        "logits_mup_width_multiplier": 16.0, "final_logit_softcapping": None, "swa_head_dim": 128,
        "swa_num_attention_heads": 32, "swa_num_key_value_heads": 8, "sliding_window_size": 512,
        "n_routed_experts": 256, "num_experts_per_tok": 6, "n_shared_experts": 2, "shared_expert_sink": True,
        "dense_intermediate_size": 16384, "intermediate_size": 2048, "route_scale": 8.0, "use_gate_bias": True,
        "gate_activation": "sigmoid", "norm_after_topk": True, "use_global_scale": True,
    },
    "audio_config": {
        "decoder_dmodel": 4096, "n_mel_bins": 80, "mel_vocab_size": 16, "bias": False, "dmel_min_value": -7.0,
        "dmel_max_value": 2.0, "use_audio_norm": True, "audio_mode": "dmel",
    },
    "vision_config": {
        "vision_encoder_type": "hmlp", "decoder_dmodel": 4096, "patch_size": 40, "temporal_patch_size": 2,
        "n_channels": 3, "n_layers": 4, "use_vision_norm": True,
    },
}  # fmt: skip
"""The config.json of Inkling-Small's release, without what it says of multi-token prediction."""


# ---- Inkling-Small ----


def test_the_preset_is_what_the_releases_own_config_reads_as(tmp_path: Path) -> None:
    ours, theirs = preset("inkling_small"), from_json(RELEASED)
    for part, names in sizing.PARTS.items():
        for name in names:
            a, b = (getattr(getattr(c, f"{part}_config") if part else c, name) for c in (ours, theirs))
            if name != "eos_token_id":  # there it is a field of the whole
                assert a == b, name
    assert ours.text_config.eos_token_id == theirs.eos_token_id == 200006
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    found = {row["number"]: row["source"] for row in sizing.numbers(theirs, None, tmp_path) if row["part"] == "text"}
    assert {s.split(":")[0] for n, s in found.items() if n != "eos_token_id"} == {"its config.json"}
    assert found["moe_intermediate_size"] == "its config.json: intermediate_size"
    text = InklingConfig(**RELEASED).text_config
    assert text.moe_intermediate_size == 3072, "the library reads the experts' width now: `from_json` need not"


def test_its_weights_are_in_their_own_type(tmp_path: Path) -> None:
    model = fresh_model("nano", dtype=torch.bfloat16)
    save(model, tmp_path / "a")
    stored = json.loads((tmp_path / "a/config.json").read_text())
    for dtype, wanted in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        stored.pop("dtype", None)
        stored["text_config"] |= {"torch_dtype": dtype, "dtype": None}
        (tmp_path / "a/config.json").write_text(json.dumps(stored))
        assert load(tmp_path / "a").dtype == wanted


def test_the_count_is_the_releases_to_the_byte() -> None:
    config = preset("inkling_small")
    counted = sizing.counts(config, empty(config, torch.bfloat16))
    assert list(counted.values()) == [263_724_516_394, 11_173_890_602, 64_080_384]  # 12B active by the model card
    index, card = sizing.of_release(config, "inkling_small")
    assert "Nothing remains unexplained" in index and "10.0B more than the index holds" in card and "276.2B" in card
    config.text_config.swa_num_key_value_heads = 16  # the control
    assert "-688,537,600 bytes remain unexplained" in sizing.of_release(config, "inkling_small")[0]


def test_the_tensors_are_as_many_as_the_releases() -> None:
    model = empty(preset("inkling_small"), torch.bfloat16)
    own = [name for name in model.state_dict() if not name.startswith(sizing.TOWER)]
    # Gate and up of dense layers and of shared experts are one tensor there.
    apart = sum(name.endswith(("mlp.up_proj.weight", "shared_experts.up_proj")) for name in own)
    tower, predicting = 4 + 3 + 1, 20 * len(INKLING_SMALL.predicting_layers)
    assert len(own) - apart + tower + predicting == INKLING_SMALL.tensors


@pytest.mark.parametrize("name", PRESETS)
def test_every_number_has_a_source(name: str) -> None:
    rows = sizing.numbers(preset(name), name, None)
    assert len(rows) == sum(map(len, sizing.PARTS.values())) and all(row["source"] for row in rows)
    known = set(SOURCES) if name == "inkling_small" else {sizing.OURS}
    assert {row["source"].split(":")[0] for row in rows} == known


def test_tiny_suits_a_cpu() -> None:
    config = preset("tiny")
    counted = sizing.counts(config, empty(config, torch.float32))
    assert list(counted.values()) == [2_488_772, 889_092, 233_792]


# ---- sizes ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nano", "tiny"])
def test_weights_and_packs_are_what_a_model_allocates(name: str, dtype: torch.dtype) -> None:
    model, foreseen = fresh_model(name, dtype=dtype), empty(preset(name), dtype)
    assert weight_bytes(foreseen) == sum(w.nbytes for w in model.state_dict().values())
    copied = [pack for _, pack in packs.packs(model)]
    parts = [p for pack in copied for p in (sum(pack.groups, ()) if isinstance(pack, PackedExperts) else pack.parts)]
    assert pack_bytes(foreseen) == sum(part.nbytes for part in parts)
    padded = sum(buffer.nbytes for pack in copied for buffer in pack.data.values())
    assert pack_bytes(foreseen) <= padded < 1.1 * pack_bytes(foreseen)
    assert model_bytes(foreseen) == weight_bytes(foreseen) + pack_bytes(foreseen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("slots", "max_tokens", "max_rows"), [(1, 100, 1024), (5, 3000, 64)])
def test_keys_values_and_windows_are_what_sessions_allocate(
    slots: int, max_tokens: int, max_rows: int, dtype: torch.dtype
) -> None:
    for config in (preset("tiny"), random_config(3)):
        state = SessionState(config, slots, max_tokens, dtype, max_rows)
        kv = sum(layer.kv.key.nbytes + layer.kv.value.nbytes for layer in state.layers)
        past = sum(window.nbytes for windows in state.conv_windows for window in windows)
        assert state_parts(config, slots, max_tokens, dtype, max_rows) == (kv, past)
        assert state_bytes(config, slots, max_tokens, dtype, max_rows) == kv + past
        one_more = SessionState(config, slots + 1, max_tokens, dtype, max_rows)
        added = sum(layer.kv.key.nbytes + layer.kv.value.nbytes for layer in one_more.layers) - kv
        added += sum(window.nbytes for windows in one_more.conv_windows for window in windows) - past
        if max_rows <= max_tokens:
            assert added == session_bytes(config, max_tokens, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["tiny", "nano", *range(6)])
def test_activations_are_what_the_layers_keep(case: str | int, dtype: torch.dtype) -> None:
    config = preset(case) if isinstance(case, str) else random_config(case)
    config.text_config.log_scaling_n_floor = None  # a factor a row, which is no layer's
    model = InteractionModel(config, dtype)
    model.init_weights(0)
    model.pack()
    seen = {w.untyped_storage().data_ptr(): 0 for w in model.state_dict().values()}
    alive = []  # so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        alive.append(x)
        seen.setdefault(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
        return x

    x = torch.randn(90, config.text_config.hidden_size).to(dtype).requires_grad_(True)
    segments = Segments.build([0], [0], [90])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        for layer in model.layers:
            x = layer.run(x, segments, None, None, None)
    assert sum(seen.values()) == kept_bytes(config, 90, dtype)
    assert activation_bytes(config, 90, dtype) < sum(seen.values())


def test_zero_by_hand() -> None:
    """16 bytes a parameter in mixed precision; the paper's example of 7.5B on 64 GPUs: 120, 31.4, 16.6, 1.9 GB."""
    model = empty(preset("tiny"), torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    per_parameter = [zero_bytes(model, stage, 64) / count for stage in range(4)]
    # Convolution taps and biases are fp32 in ours.
    assert per_parameter == pytest.approx([16.0, 4.19, 2.22, 0.25], rel=0.02)
    assert [training_bytes(model, stage, 64).optimizer for stage in (1, 2)] == [12 * count // 64] * 2


# ---- the command ----


@pytest.mark.parametrize("name", PRESETS)
def test_it_prints(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["model.info", "--preset", name])
    info.main()
    out = capsys.readouterr().out
    assert "active for a row" in out and "Sessions of up to 4,096 rows" in out and "zero stage" in out
    assert ("531,912,898,740 bytes in the index" in out) == (name == "inkling_small")
    assert max(map(len, out.splitlines())) <= info.WIDTH or name == "inkling_small"


def test_its_file_has_the_bytes(tmp_path: Path) -> None:
    save(fresh_model("tiny", dtype=torch.bfloat16), tmp_path / "a")
    options = ["--sessions", "3,3,1", "--gpus", "1,4", "--zero", "1,3", "--dtype", "bfloat16", "--rows", "100"]
    info.main(["--checkpoint", str(tmp_path / "a"), *options, "--json", str(tmp_path / "b.json")])
    content, config = json.loads((tmp_path / "b.json").read_text()), config_of(tmp_path / "a")
    assert [row["sessions"] for row in content["sessions"]] == [3, 1]
    assert content["sessions"][0]["total"] == state_bytes(config, 3, 4096, torch.bfloat16)
    assert [(row["zero_stage"], row["gpus"]) for row in content["training"]] == [(1, 1), (1, 4), (3, 1), (3, 4)]
    held = training_bytes(empty(config, torch.bfloat16), 1, 4)
    assert content["training"][1]["total"] == held.total + kept_bytes(config, 100, torch.bfloat16)
    assert content["training"][2]["total"] is None and not math.isnan(content["training"][2]["formula"])
    sources = {row["source"] for row in content["numbers"]}
    assert sources == {"its config.json", "its config.json: n_layers"}
    assert content["release"] == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "one of the arguments --preset --checkpoint is required"),
        (["--preset", "tiny", "--checkpoint", "a"], "not allowed with"),
        (["--preset", "huge"], "'huge'"),
        (["--preset", "tiny", "--sessions", "1,0"], "'0': give a whole number from 1"),
        (["--preset", "tiny", "--gpus", "1,,2"], "'': give a whole number"),
        (["--preset", "tiny", "--zero", "4"], "'4': give a whole number from 0 to 3"),
        (["--preset", "tiny", "--dtype", "float16"], "'float16': choose float32 or bfloat16"),
        (["--checkpoint", "nowhere"], "there is no config.json"),
        (["--preset", "tiny", "--json", "/dev/null/x.json"], "--json"),
    ],
)
def test_what_it_refuses(options: list[str], says: str) -> None:
    with pytest.raises(MetronomeError) as error:
        info.main(options)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1
