"""Inkling's original names of weights, as its releases have them, and the weights of ours that they hold.

In the originals gate and up rows of an MLP are interleaved in one tensor. A weight of ours is then every second row of
it, or both kinds one after the other; said here by views, so that nothing is copied before it lies where it belongs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor

# Inkling's original names -> transformers' (transformers.conversion_mapping, "inkling_mm_model"), in this order.
RENAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^model\.llm\.embed_norm\.", "model.language_model.embed_tokens.embed_norm."),
        (r"^model\.llm\.embed\.", "model.language_model.embed_tokens."),
        (r"^model\.llm\.unembed\.", "lm_head."),
        (r"^model\.llm\.", "model.language_model."),
        (r"^model\.audio\.encoder\.", "model.audio_tower.embed_audio_tokens.embed_audio_tokens."),
        (r"^model\.audio\.final_norm\.", "model.audio_tower.norm."),
        (r"^model\.visual\.layers\.linear_(\d+)\.", r"model.vision_tower.encoder_layers.\1.projection."),
        (r"^model\.visual\.layers\.norm_(\d+)\.", r"model.vision_tower.encoder_layers.\1.layer_norm."),
        (r"^model\.visual\.", "model.vision_tower."),
        (r"\.attn\.wq_du\.", ".self_attn.q_proj."),
        (r"\.attn\.wk_dv\.", ".self_attn.k_proj."),
        (r"\.attn\.wv_dv\.", ".self_attn.v_proj."),
        (r"\.attn\.wr_du\.", ".self_attn.r_proj."),
        (r"\.attn\.wo_ud\.", ".self_attn.o_proj."),
        (r"\.attn\.([kv])_sconv\.weight$", r".self_attn.\1_sconv.conv1d.weight"),
        (r"\.attn\.", ".self_attn."),
        (r"\.(attn|mlp)_sconv\.weight$", r".\1_sconv.conv1d.weight"),
        (r"\.mlp_norm\.", ".post_attention_layernorm."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.experts\.w2_weight$", ".mlp.experts.down_proj"),
        (r"\.shared_w2_weight$", ".down_proj"),
        (r"\.mlp\.w2_md\.weight$", ".mlp.down_proj.weight"),
    )
]

Parts = tuple[tuple[Tensor, ...], int]
"""(views, axis): a weight is the views laid one after another along the axis."""


def renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Parts]]:
    """(transformers' name, parts) of each weight that a stored tensor holds. Raises RuntimeError or IndexError for a
    tensor that should interleave two, and is no multiple of two."""
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    if name.endswith(".mlp.experts.w13_weight"):
        yield name.replace("w13_weight", "gate_up_proj"), (_deinterleaved(tensor, 1), 1)
    elif name.endswith(".shared_w13_weight"):
        yield from _gate_and_up(name, "shared_w13_weight", "{}_proj", _deinterleaved(tensor, 1))
    elif name.endswith(".mlp.w13_dn.weight"):
        yield from _gate_and_up(name, "w13_dn.weight", "{}_proj.weight", _deinterleaved(tensor, 0))
    else:
        yield name, ((tensor,), 0)


def shape_of(parts: Parts) -> list[int]:
    """The weight's shape."""
    views, axis = parts
    shape = list(views[0].shape)
    if len(views) > 1:
        shape[axis] = sum(view.shape[axis] for view in views)
    return shape


def _deinterleaved(tensor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Rows gate 0, up 0, gate 1, … -> (gate rows, up rows)."""
    gate, up = tensor.unflatten(dim, (-1, 2)).unbind(dim + 1)
    return gate, up


def _gate_and_up(name: str, old: str, new: str, views: tuple[Tensor, Tensor]) -> Iterator[tuple[str, Parts]]:
    for part, view in zip(("gate", "up"), views, strict=True):
        yield name.replace(old, new.format(part)), ((view,), 0)
