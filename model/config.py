"""Model shapes: presets of transformers' `InklingConfig`, and a check that this implementation supports one.

There is no configuration class of our own: any Inkling checkpoint's ``config.json`` can be read.

Two fields of text_config are ours, so that whatever loads a model computes the same function: ``global_window`` and
``global_first`` say how far global layers see (`window`, `first`; `model.context` sets them). Without them, or with
None and 0, they see all. ``voice_config`` is the shape of the model's voice (`model.voice`); most models have none.
transformers keeps fields that it does not know, but its own forward has no window there.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from transformers import InklingConfig, InklingTextConfig

from kernels import exact
from kernels.layout import CONV_TAPS, SPLIT_TOKENS
from model import published
from model.inputs import NONE, Senses
from model.program.ranges import Multiples, Range, shown
from model.program.reading import UnreadableError, as_record
from model.senses.video import CHANNELS, TIME_STEPS
from model.voice.config import VoiceConfig

MEL_CHANNELS = 80
MEL_BINS = 16
AUDIO_TOKEN_ID = 2
IMAGE_TOKEN_ID = 194
SMALL_PATCH = 16
"""Side of the video patches of the small presets, pixels."""

Preset = Literal["nano", "tiny", "base", "inkling_small"]
PRESETS: tuple[str, ...] = get_args(Preset)

_HEADS = Range(1, 4096)
_WIDTH = Range(1, 2**20)
TEXT_RANGES = {
    "vocab_size": Range(1, 2**24), "unpadded_vocab_size": Range(1, 2**24), "hidden_size": _WIDTH,
    "num_hidden_layers": Range(1, 1000), "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS,
    "head_dim": _HEADS, "swa_num_attention_heads": _HEADS, "swa_num_key_value_heads": _HEADS, "swa_head_dim": _HEADS,
    "sliding_window_size": _WIDTH, "d_rel": _HEADS, "rel_extent": _WIDTH, "max_position_embeddings": Range(1, 2**24),
    "log_scaling_n_floor": Range(1, 2**31), "log_scaling_alpha": Range(-1000, 1000), "intermediate_size": _WIDTH,
    "moe_intermediate_size": _WIDTH, "n_routed_experts": Range(1, 2**16), "num_experts_per_tok": Range(1, 2**16),
    "n_shared_experts": Range(0, 1000), "rms_norm_eps": Range(0, 1, open_low=True), "route_scale": Range(0, 1e6),
    "logits_mup_width_multiplier": Range(0, 1e6, open_low=True),
}  # fmt: skip
"""Ranges of a text config's fields."""
OPTIONAL = ("unpadded_vocab_size", "log_scaling_n_floor")
"""Those that may be None."""
CONTEXT_RANGES = {
    "global_window": Multiples(SPLIT_TOKENS, 2**24, of=SPLIT_TOKENS),
    "global_first": Multiples(0, 2**24, of=SPLIT_TOKENS),
}
"""Of our own fields of a text config, where it has them. Pages are freed whole, hence the multiples."""
AUDIO_RANGES = {"n_mel_bins": Range(MEL_CHANNELS, MEL_CHANNELS), "mel_vocab_size": Range(MEL_BINS, 65_536)}
VISION_RANGES = {
    "patch_size": Range(2, 1024), "temporal_patch_size": Range(TIME_STEPS, TIME_STEPS), "n_layers": Range(1, 64),
    "num_channels": Range(CHANNELS, CHANNELS),
}  # fmt: skip
LAYER_TYPES = {"layer_types": ("hybrid_sliding", "hybrid"), "mlp_layer_types": ("dense", "sparse")}
MOST_LAYERS = 10_000
"""Most layers or labels of any part of a config: the library makes lists of them before they can be checked."""
COUNTS = ("num_hidden_layers", "n_layers", "num_mtp_layers", "num_nextn_predict_layers", "num_labels")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
"""By the names that configs have for them."""


def preset(name: str) -> InklingConfig:
    """A fresh config. nano: 0.3M parameters, for the reward models of tiny policies. tiny: 2.5M parameters, for CPUs.
    base: 125M. inkling_small: Inkling-Small, 264B without vision and multi-token prediction; its numbers and their
    sources are in `model.published`. Raises ValueError for another name."""
    match name:
        case "nano":
            text = {
                "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
                "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 32,
                "layer_types": ["hybrid_sliding"] * 2 + ["hybrid"], "mlp_layer_types": ["dense"] * 3,
                "sliding_window_size": 128, "rel_extent": 512, "d_rel": 16, "intermediate_size": 128,
                "logits_mup_width_multiplier": 1.0, "max_position_embeddings": 32768,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 6,
            }  # fmt: skip
            return _config(text, patch=SMALL_PATCH, vision_layers=2)
        case "tiny":
            text = {
                "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
                "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32,
                "layer_types": ["hybrid_sliding"] * 3 + ["hybrid"],
                "sliding_window_size": 128, "rel_extent": 512, "d_rel": 16,
                "intermediate_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8,
                "num_experts_per_tok": 2, "n_shared_experts": 1, "route_scale": 2.0,
                "logits_mup_width_multiplier": 1.0, "max_position_embeddings": 32768,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 6,
            }  # fmt: skip
            return _config(text, patch=SMALL_PATCH, vision_layers=2)
        case "base":
            text = {
                "vocab_size": 32768, "hidden_size": 512, "num_hidden_layers": 12,
                "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
                "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "swa_head_dim": 64,
                "sliding_window_size": 512, "rel_extent": 1024, "d_rel": 16,
                "intermediate_size": 2048, "moe_intermediate_size": 256, "n_routed_experts": 16,
                "num_experts_per_tok": 4, "n_shared_experts": 1, "route_scale": 4.0, "logits_mup_width_multiplier": 2.0,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 6,
            }  # fmt: skip
            return _config(text, patch=40, vision_layers=1)
        case "inkling_small":
            tokens, vision = (
                published.values(part) for part in (published.INKLING_SMALL_TOKENS, published.INKLING_SMALL_VISION)
            )
            return _config(
                published.values(published.INKLING_SMALL_TEXT),
                patch=vision["patch_size"],
                vision_layers=vision["num_hidden_layers"],
                **tokens,
            )
        case _:
            raise ValueError(f"model preset {name!r} does not exist; choose one of {', '.join(PRESETS)}")


def _config(
    text: dict[str, object],
    patch: int,
    vision_layers: int,
    audio_token_id: int = AUDIO_TOKEN_ID,
    image_token_id: int = IMAGE_TOKEN_ID,
) -> InklingConfig:
    config = InklingConfig(
        text_config=InklingTextConfig(**text),  # type: ignore[arg-type]
        audio_config={"n_mel_bins": MEL_CHANNELS, "mel_vocab_size": MEL_BINS},
        vision_config={"patch_size": patch, "num_hidden_layers": vision_layers},
        audio_token_id=audio_token_id,
        image_token_id=image_token_id,
    )
    check(config)
    return config


def from_json(stored: dict[str, Any]) -> InklingConfig:
    """The config of a ``config.json``'s content. Raises ValueError, in one line, for what the library cannot take, and
    as `check` does."""
    for name, value in _entries(stored):
        if name.startswith("__") or callable(getattr(InklingConfig, name, None)):  # it would replace a method
            raise ValueError(f"a field cannot be called {shown(name)}")
        if name in COUNTS and value is not None and (problem := Range(0, MOST_LAYERS).problem(value)):
            raise ValueError(f"{name} is {shown(value)}: {problem}")
        if name in ("dtype", "torch_dtype") and value is not None and value not in list(DTYPES):
            raise ValueError(f"{name} is {shown(value)}; choose one of {', '.join(DTYPES)}")
    text = stored.get("text_config")
    if isinstance(text, dict) and {"dense_intermediate_size", "intermediate_size"} <= text.keys():
        # As Inkling's releases have it: the one is of dense layers, the other of experts. The library reads the first
        # and gives experts its default width.
        stored = stored | {"text_config": {"moe_intermediate_size": text["intermediate_size"]} | text}
    try:
        config = InklingConfig(**stored)
        json.dumps(config.to_dict())
    # Broad on purpose: the library sets each field by itself, and what it raises for a wrong one is open-ended.
    except Exception as error:
        raise ValueError(f"transformers refuses it ({' '.join(str(error).split())[:300]})") from None
    check(config)
    return config


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of everything that is named in a JSON value, however deep."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield name, inner
        yield from _entries(inner)
    for inner in value if isinstance(value, list) else ():
        yield from _entries(inner)


def check(config: InklingConfig) -> None:
    """Raises ValueError for a config that Inkling allows but this implementation does not compute, and for one that is
    no model's."""
    text, audio, vision = config.text_config, config.audio_config, config.vision_config
    wrong = []
    voice(config)  # raises
    for part, limits in ((text, TEXT_RANGES), (audio, AUDIO_RANGES), (vision, VISION_RANGES)):
        for name, limit in limits.items():
            value = getattr(part, name)
            if not (value is None and name in OPTIONAL) and (problem := limit.problem(value)):
                wrong.append(f"{name} is {shown(value)}: {problem}")
    for name, limit in CONTEXT_RANGES.items():
        value = _context_field(text, name)
        if value is not None and (problem := limit.problem(value)):
            wrong.append(f"{name} is {shown(value)}: {problem}")
    for name, kinds in LAYER_TYPES.items():
        if strange := [kind for kind in getattr(text, name) if kind not in kinds]:
            wrong.append(f"{name} has {shown(strange[0])}, not one of {', '.join(kinds)}")
    if wrong:  # the rest computes with these
        raise ValueError("model config not supported: " + "; ".join(wrong[:5]))
    if global_sight(text)[0] is None and _context_field(text, "global_first"):
        wrong.append(f"global_first is {_context_field(text, 'global_first')}, but there is no global_window")
    if text.conv_kernel_size != CONV_TAPS:
        wrong.append(f"conv_kernel_size is {text.conv_kernel_size}, the kernels have {CONV_TAPS} taps")
    if text.hidden_act != "silu":
        wrong.append(f"hidden_act is {text.hidden_act!r}, the kernels compute 'silu'")
    if text.n_shared_experts < 1 and "sparse" in text.mlp_layer_types:
        wrong.append("n_shared_experts is 0; Inkling's router needs at least 1")
    if text.num_experts_per_tok > text.n_routed_experts:
        wrong.append(f"num_experts_per_tok is {text.num_experts_per_tok} of {text.n_routed_experts} n_routed_experts")
    if text.attention_dropout != 0:
        wrong.append(f"attention_dropout is {text.attention_dropout}; sampler and learner are one function only at 0")
    for kind in ("", "swa_"):
        heads, kv_heads = (getattr(text, f"{kind}num_{what}_heads") for what in ("attention", "key_value"))
        if heads % kv_heads:
            wrong.append(f"{kind}num_attention_heads is {heads}, no multiple of {kv_heads} key_value_heads")
    if (text.unpadded_vocab_size or 0) > text.vocab_size:
        wrong.append(f"unpadded_vocab_size is {text.unpadded_vocab_size} of a vocab_size of {text.vocab_size}")
    for name in ("audio_token_id", "image_token_id"):  # beyond the vocabulary: a model without that sense
        if problem := Range(0, 2**31 - 1).problem(getattr(config, name)):
            wrong.append(f"{name} is {shown(getattr(config, name))}: {problem}")
    if config.audio_token_id == config.image_token_id:
        wrong.append(f"audio_token_id and image_token_id are both {config.audio_token_id}")
    for name in LAYER_TYPES:
        if len(getattr(text, name)) != text.num_hidden_layers:
            wrong.append(f"{name} has {len(getattr(text, name))} entries for {text.num_hidden_layers} layers")
    if wrong:
        raise ValueError("model config not supported: " + "; ".join(wrong))


def voice(config: InklingConfig) -> VoiceConfig | None:
    """The shape of the model's voice; None for a model without. Raises ValueError for a field that is no voice's."""
    stored = getattr(config, "voice_config", None)
    if stored is None:
        return None
    try:
        if unknown := sorted(stored.keys() - {f.name for f in fields(VoiceConfig)}):
            raise UnreadableError("", f"{unknown[0]} is no field of a voice")
        return as_record(json.dumps(stored), VoiceConfig)
    except (AttributeError, TypeError, UnreadableError) as error:
        problem = error.problem if isinstance(error, UnreadableError) else f"is {shown(stored)}, no mapping"
        raise ValueError(f"voice_config: {problem}") from None


def senses(config: InklingConfig) -> Senses:
    """How a model of this config takes what is no text."""
    spoken = voice(config)
    own = NONE if spoken is None else spoken.token
    return Senses(config.audio_token_id, config.image_token_id, config.vision_config.patch_size, own)


def with_voice(config: InklingConfig, shape: VoiceConfig) -> InklingConfig:
    """A copy of ``config`` whose model has a voice of this shape."""
    out = copy.deepcopy(config)
    out.voice_config = asdict(shape)
    check(out)
    return out


def is_sliding(text: InklingTextConfig, layer: int) -> bool:
    return text.layer_types[layer] == "hybrid_sliding"


def _context_field(text: InklingTextConfig, name: str) -> Any:
    """The value of a field of `CONTEXT_RANGES`, which a config may lack."""
    return getattr(text, name, None)


def global_sight(text: InklingTextConfig) -> tuple[int | None, int]:
    """(window, first) of global layers: query i sees key j if and only if j <= i and (j < first or i - j < window).

    The first positions stay in sight for ever (attention sinks: Xiao et al. 2023, arXiv 2309.17453), of the others the
    last ``window``; (None, 0) is all. Positions stay absolute and nothing is numbered anew: beyond its extent the
    learned relative bias is 0 as ever."""
    return _context_field(text, "global_window"), _context_field(text, "global_first") or 0


def window(text: InklingTextConfig, layer: int) -> int | None:
    """Number of positions that a row of this layer attends to, its own included, besides the `first`; None for all
    before it."""
    return text.sliding_window_size if is_sliding(text, layer) else global_sight(text)[0]


def first(text: InklingTextConfig, layer: int) -> int:
    """Number of a session's first positions that every later row of this layer attends to, however far away."""
    return 0 if is_sliding(text, layer) else global_sight(text)[1]


def most_keys(text: InklingTextConfig) -> int | None:
    """The most keys that a row of a global layer sees, its own included; None where that is not bounded."""
    reach, kept = global_sight(text)
    return None if reach is None else kept + reach


def heads(text: InklingTextConfig, layer: int) -> tuple[int, int, int]:
    """(query heads, key heads, head width) of a layer; global and sliding layers differ in them."""
    if is_sliding(text, layer):
        return text.swa_num_attention_heads, text.swa_num_key_value_heads, text.swa_head_dim
    return text.num_attention_heads, text.num_key_value_heads, text.head_dim


def log_scale_table(text: InklingTextConfig) -> torch.Tensor | None:
    """The factor on attention scores of global layers by position i, fp32 [max positions]; None when the config turns
    it off: tau_i = 1 + log_scaling_alpha * ln(max((i + 1) / log_scaling_n_floor, 1)), as in transformers' Inkling.

    i + 1 is the number of keys that the query sees. Under a window it does not grow beyond `most_keys`, the table ends
    there, and every later row takes the last factor, in sessions of any length (`log_scale`).

    A table made by our own logarithm: a library's result may depend on the processor and on a value's place in a vector
    register."""
    if text.log_scaling_n_floor is None:
        return None
    position = np.arange(1, (most_keys(text) or text.max_position_embeddings) + 1, dtype=np.float64)
    ratio = np.maximum(position / text.log_scaling_n_floor, 1.0)
    return torch.from_numpy(1 + text.log_scaling_alpha * exact.ln_of(ratio)).float()


def log_scale(text: InklingTextConfig, table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The factors, fp32 [T], of rows at these positions [T]; ``table``: `log_scale_table`'s, both on the CPU. Raises
    IndexError for a position beyond max_position_embeddings where no window bounds the keys."""
    most = most_keys(text)
    return table[position if most is None else position.clamp(max=most - 1)]
