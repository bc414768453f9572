"""The rows of `model.info`: what a config's numbers come to, as plain dictionaries; sizes in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import InklingConfig

from model import config as shapes
from model import published
from model.backbone.size import empty, kept_bytes, pack_bytes, training_bytes, weight_bytes, zero_bytes
from model.backbone.state import session_bytes, state_parts
from model.backbone.transformer import InteractionModel, Layer
from model.program.reading import read_object

PARTS = {
    "text": (*shapes.TEXT_RANGES, "conv_kernel_size", "layer_types", "mlp_layer_types", "eos_token_id"),
    "audio": tuple(shapes.AUDIO_RANGES),
    "vision": tuple(published.INKLING_SMALL_VISION),
    "": tuple(published.INKLING_SMALL_TOKENS),
}
"""Fields that decide what is computed and stored, by the part of a config that has them; "" is the config itself."""
RELEASE_NAMES = {
    "max_position_embeddings": "model_max_length", "conv_kernel_size": "sconv_kernel_size",
    "layer_types": "local_layer_ids", "mlp_layer_types": "dense_mlp_idx", "num_channels": "n_channels",
    "intermediate_size": "dense_intermediate_size", "moe_intermediate_size": "intermediate_size",
    "num_hidden_layers": "n_layers",
}  # fmt: skip
"""Fields that Inkling's releases call otherwise."""
OURS, STORED = "this project", "its config.json"
TOWER = "model.vision_tower."


def numbers(config: InklingConfig, preset: str | None, folder: Path | None) -> list[dict[str, Any]]:
    """Each of a config's numbers with its source: the preset's, or the folder's ``config.json``."""
    return [
        {"part": part or "tokens", "number": name, "value": _value(config, part, name), "source": source}
        for part, names in PARTS.items()
        for name, source in zip(names, _sources(part, names, preset, folder), strict=True)
    ]


def _value(config: InklingConfig, part: str, name: str) -> str:
    value = getattr(getattr(config, f"{part}_config") if part else config, name)
    if isinstance(value, list):
        return ", ".join(f"{value.count(kind)} {kind}" for kind in dict.fromkeys(value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sources(part: str, names: Sequence[str], preset: str | None, folder: Path | None) -> Iterator[str]:
    if folder is not None:
        stored = read_object(folder / "config.json")
        within = stored.get(f"{part}_config") or {} if part else stored
        for name in names:
            other = RELEASE_NAMES.get(name)
            # A release's intermediate_size is that of its experts.
            if other in within and (name not in within or name == "intermediate_size"):
                yield f"{STORED}: {other}"
            else:
                yield STORED if name in within else published.DEFAULT
    elif preset == "inkling_small":
        sourced = {
            "text": published.INKLING_SMALL_TEXT,
            "audio": published.INKLING_SMALL_AUDIO,
            "vision": published.INKLING_SMALL_VISION,
            "": published.INKLING_SMALL_TOKENS,
        }[part]
        yield from (sourced[name][1] for name in names)
    else:
        yield from (OURS for _ in names)


def counts(config: InklingConfig, model: InteractionModel) -> dict[str, int]:
    """Numbers of parameters of a model on the meta device. Active: those that a row of text or audio uses, so only its
    routed experts and, of each embedding table, the rows that it reads. A patch of an image also uses the whole
    tower."""
    text = config.text_config
    total = active = tower = 0
    for name, weight in model.named_parameters():
        total += weight.numel()
        if name.startswith(TOWER):
            tower += weight.numel()
        elif ".mlp.experts." in name:
            active += weight.numel() // text.n_routed_experts * text.num_experts_per_tok
        elif name.endswith("embed_tokens.weight"):
            active += text.hidden_size
        elif name.endswith("embed_audio_tokens.weight"):
            active += text.hidden_size * config.audio_config.n_mel_bins
        else:
            active += weight.numel()
    return {"parameters": total, "active for a row": active, "vision tower, for image rows only": tower}


def predicting_parameters(config: InklingConfig, kinds: Sequence[str]) -> int:
    """Of Inkling's layers of multi-token prediction, which this program does not build: each is a dense layer behind a
    projection of two normed states side by side."""
    changed = config.to_dict()
    layers = {"num_hidden_layers": len(kinds), "layer_types": list(kinds), "mlp_layer_types": ["dense"] * len(kinds)}
    changed["text_config"] |= layers
    predicting, width = InklingConfig(**changed), config.text_config.hidden_size
    with torch.device("meta"):
        own = [p for i in range(len(kinds)) for p in Layer(predicting, i, torch.bfloat16).parameters()]
    return sum(p.numel() for p in own) + len(kinds) * (2 * width + 2 * width * width)


def of_release(config: InklingConfig, preset: str | None) -> list[str]:
    """How the count compares with what is published, a sentence each."""
    if preset != "inkling_small":
        return []
    release, model = published.INKLING_SMALL, empty(config, torch.bfloat16)
    own = {name: w.numel() for name, w in model.state_dict().items()}
    tower = sum(own.pop(name) for name in list(own) if name.startswith(TOWER))
    wide = sum(n for name, n in own.items() if name.endswith((".gate.global_scale", "e_score_correction_bias")))
    predicting = predicting_parameters(config, release.predicting_layers)
    stored = 2 * (sum(own.values()) + wide + tower + predicting)
    sparse = next(layer for layer in model.layers if hasattr(layer.mlp, "experts"))
    added = sum(p.numel() for p in sparse.mlp.parameters()) - sum(p.numel() for p in model.layers[0].mlp.parameters())
    dense = config.text_config.mlp_layer_types.count("dense")
    text = sum(own.values())
    difference = release.index_bytes - stored
    return [
        f"Published: {release.index_bytes:,} bytes in the index. Counted: {stored:,} bytes in bf16 (router biases and "
        f"scales in fp32): {text:,} numbers of text and audio, {tower:,} of the vision tower, {predicting:,} of "
        f"{len(release.predicting_layers)} layers of multi-token prediction, which this program does not build. "
        + ("Nothing remains unexplained." if not difference else f"{difference:,} bytes remain unexplained."),
        f"The model card's {release.card_total / 1e9:.0f}B is "
        f"{(release.card_total - (text + tower + predicting)) / 1e9:.1f}B more than the index holds. Why is not said "
        f"anywhere; with all {dense} dense layers counted as sparse, text and audio would be "
        f"{(text + dense * added) / 1e9:.1f}B.",
    ]


def weight_rows(dtype: str, model: InteractionModel) -> dict[str, Any]:
    weights, packs = weight_bytes(model), pack_bytes(model)
    return {"dtype": dtype, "weights": weights, "packed copies": packs, "both": weights + packs, "packed only": weights}


def session_rows(model: InteractionModel, sessions: Sequence[int], max_tokens: int) -> Iterator[dict[str, Any]]:
    for count in sessions:
        kv, convolution = state_parts(model.config, count, max_tokens, model.dtype)
        yield {
            "dtype": str(model.dtype).removeprefix("torch."),
            "sessions": count,
            "KV cache": kv,
            "convolution state": convolution,
            "total": kv + convolution,
            "of which one more adds": session_bytes(model.config, max_tokens, model.dtype),
        }


def training_rows(
    model: InteractionModel, stages: Sequence[int], gpus: Sequence[int], rows: int
) -> Iterator[dict[str, Any]]:
    kept = kept_bytes(model.config, rows, model.dtype)
    for stage in stages:
        for count in gpus if stage else [None]:  # without sharing their number does not matter
            processes = count or 1
            head = {"dtype": str(model.dtype).removeprefix("torch."), "zero_stage": stage, "gpus": count}
            formula = zero_bytes(model, stage, processes)
            if stage > 2:  # this program has no such learner
                none = dict.fromkeys(("weights", "packs", "masters", "optimizer", "gradient", "activations", "total"))
                yield head | none | {"formula": formula}
                continue
            held = training_bytes(model, stage, processes)
            yield head | {
                "weights": held.weights,
                "packs": held.packs,
                "masters": held.masters,
                "optimizer": held.optimizer,
                "gradient": held.gradient,
                "activations": kept,
                "total": held.total + kept,
                "formula": formula,
            }
