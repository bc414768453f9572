"""What is published of models whose presets are not our own, each number with its source.

Nothing was read from the hub itself: public ports quote its files, and two that do agree in every number. That the
count of parameters comes to the index's bytes exactly (`model.sizing.of_release`) speaks for all that decides a shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HUB = "config.json"
DEFAULT = "transformers' default"
SOURCES = {
    HUB: "that of thinkingmachines/Inkling-Small at commit 21152b5, as public ports quote it (after the colon, the "
    "field's name there where it has another)",
    DEFAULT: "of its InklingConfig; config.json does not say",
}
"""What the words in the tables below stand for."""

Sourced = dict[str, tuple[Any, str]]
"""A config's field -> (value, source)."""

GLOBAL_LAYERS = (5, 11, 17, 23, 29, 35, 41)

INKLING_SMALL_TEXT: Sourced = {
    "hidden_size": (4096, HUB),
    "num_hidden_layers": (42, HUB),
    "vocab_size": (201_024, HUB),
    "unpadded_vocab_size": (200_058, HUB),
    "max_position_embeddings": (1_048_576, f"{HUB}: model_max_length"),
    "num_attention_heads": (32, HUB),
    "num_key_value_heads": (8, HUB),
    "head_dim": (128, HUB),
    "swa_num_attention_heads": (32, HUB),
    "swa_num_key_value_heads": (8, HUB),
    "swa_head_dim": (128, HUB),
    "sliding_window_size": (512, HUB),
    "layer_types": (
        ["hybrid" if i in GLOBAL_LAYERS else "hybrid_sliding" for i in range(42)],
        f"{HUB}: local_layer_ids, the others are global",
    ),
    "mlp_layer_types": (["dense"] * 2 + ["sparse"] * 40, f"{HUB}: dense_mlp_idx 2"),
    "d_rel": (16, HUB),
    "rel_extent": (1024, HUB),
    "conv_kernel_size": (4, f"{HUB}: sconv_kernel_size"),
    "intermediate_size": (16_384, f"{HUB}: dense_intermediate_size"),
    "moe_intermediate_size": (2048, f"{HUB}: intermediate_size"),
    "n_routed_experts": (256, HUB),
    "num_experts_per_tok": (6, HUB),
    "n_shared_experts": (2, HUB),
    "route_scale": (8.0, HUB),
    "logits_mup_width_multiplier": (16.0, HUB),
    "log_scaling_n_floor": (128_000, HUB),
    "log_scaling_alpha": (0.1, HUB),
    "rms_norm_eps": (1e-6, HUB),
    "eos_token_id": (200_006, HUB),
}
INKLING_SMALL_AUDIO: Sourced = {"n_mel_bins": (80, HUB), "mel_vocab_size": (16, HUB)}
INKLING_SMALL_VISION: Sourced = {
    "patch_size": (40, HUB),
    "temporal_patch_size": (2, HUB),
    "num_channels": (3, f"{HUB}: n_channels"),
    "num_hidden_layers": (4, f"{HUB}: n_layers"),
}
INKLING_SMALL_TOKENS: Sourced = {"audio_token_id": (200_053, DEFAULT), "image_token_id": (200_054, DEFAULT)}


@dataclass(frozen=True)
class Release:
    """A published checkpoint, to compare a count with."""

    card_total: int  # parameters, rounded
    card_active: int
    index_bytes: int
    tensors: int
    predicting_layers: tuple[str, ...]  # kinds of the layers of multi-token prediction, which we do not build


INKLING_SMALL = Release(
    card_total=276_000_000_000,
    card_active=12_000_000_000,
    index_bytes=531_912_898_740,
    tensors=1048,
    predicting_layers=tuple("hybrid" if i in (1, 3) else "hybrid_sliding" for i in range(8)),
)
"""The model card; model.safetensors.index.json; mtp_config in config.json."""


def values(sourced: Sourced) -> dict[str, Any]:
    """Fresh values, without their sources."""
    return {name: list(value) if isinstance(value, list) else value for name, (value, _) in sourced.items()}
