"""The interaction model as vLLM sees it: one multimodal model, which is also its only cache layer.

vLLM schedules, batches and holds the pages; the arithmetic is `model.backbone.transformer.InteractionModel`'s, the same
forward that the embedded engine and the learner run. The weights do not come through vLLM's loader: the engine hands
over the learner's own model (in process) or a copy of it (in a worker process), see `rollout.engines.vllm.worker`.

A chunk's audio is one multimodal item, and so is its video, if any (`rollout.engines.vllm.items`); the towers embed
them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import InklingConfig, PretrainedConfig
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseProcessingInfo
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheSpec

from model.backbone.transformer import InteractionModel
from model.logprob import TokenClasses
from model.senses.video import Patches
from rollout.engines.vllm.items import AUDIO, FIELD, IMAGE, OWN, OWN_DATA_ROWS, unpacked
from rollout.engines.vllm.pages import PageBackend, Pages, page_spec, view_pages
from rollout.turn.grammar import AUDIO_ROWS, OWN_ROWS

MODEL_TYPE = "metronome"
ARCHITECTURE = "MetronomePolicy"
"""MODEL_TYPE is the name of `PolicyConfig` in transformers, ARCHITECTURE that of `Policy` in vLLM."""

CACHE_LAYER = "model.layers.0"
"""Name of the only KV cache layer that vLLM knows; vLLM requires a number in it."""

CLASSES = "classes.safetensors"
"""File in the model's folder with `TokenClasses.allowed`, bool [3, V], under the name ``allowed``."""

Record = tuple[int, float, int, bytes]
"""The record of one sampled token: token, log-prob, digest of the row, bytes of the hidden state (empty unless
kept)."""


class PolicyConfig(PretrainedConfig):
    """The configuration that vLLM reads, with Inkling's own under ``inkling``."""

    model_type = MODEL_TYPE

    def __init__(self, inkling: dict[str, Any] | None = None, max_patches: int = 0, **rest: Any) -> None:
        super().__init__(**rest)
        self.inkling = inkling or {}
        self.max_patches = max_patches

    @staticmethod
    def of(config: InklingConfig, rows: int, max_patches: int) -> PolicyConfig:
        """``rows``: context length; ``max_patches``: the most video patches of a micro-turn."""
        text = config.text_config
        return PolicyConfig(
            inkling=config.to_dict(),
            max_patches=max_patches,
            architectures=[ARCHITECTURE],
            hidden_size=text.hidden_size,
            vocab_size=text.unpadded_vocab_size or text.vocab_size,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=rows,
        )


class _Info(BaseProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {AUDIO: None, IMAGE: None, OWN: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {
            AUDIO: AUDIO_ROWS,
            IMAGE: max(1, self.ctx.model_config.hf_config.max_patches),
            OWN: OWN_ROWS,
        }


class _NoProcessor:
    """Stands for a processor in vLLM, which asks it for sizes only: chunks arrive as codes."""

    def __init__(self, info: _Info, dummy_inputs: None) -> None:
        self.info = info


@MULTIMODAL_REGISTRY.register_processor(_NoProcessor, info=_Info, dummy_inputs=lambda info: None)
class Policy(nn.Module, SupportsMultiModal, AttentionLayerBase):
    """vLLM's interface to the model; see the module's docstring. It outputs zeros until `models` has the model, that is
    while vLLM profiles memory."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = InklingConfig(**model_config.hf_config.inkling)
        self.dtype, self.device = model_config.dtype, vllm_config.device_config.device
        self.width, self.vocab = model_config.hf_config.hidden_size, model_config.hf_config.vocab_size
        self.classes = TokenClasses(load_file(Path(model_config.model) / CLASSES)["allowed"].to(self.device))
        self.models: list[InteractionModel] = []  # in a list, so that vLLM does not take the weights for its own
        self.pages: list[Pages] = []
        self.hidden: Tensor | None = None  # [R, D] of the rows that are being sampled
        self.records: dict[str, dict[int, Record]] = {}  # session -> position -> what was sampled there
        vllm_config.compilation_config.static_forward_context[CACHE_LAYER] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return PageBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return page_spec(self.config, self.dtype)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.pages = view_pages(kv_cache, self.config, self.dtype)

    def load_weights(self, weights: Any) -> set[str]:
        return set()

    def embed_multimodal(self, **kwargs: object) -> Tensor | list[Tensor]:
        """N items of one kind: codes uint8 [N, 4, 80] -> [N, 4, D], own sound likewise with a row more, or packed
        patches uint8 [N, B], or of each item uint8 [B], -> of each item [P, D]."""
        data, towers = kwargs[FIELD], self.models[0].model
        if isinstance(data, Tensor) and data.ndim == 3 and data.shape[1] == OWN_DATA_ROWS:
            codes = data[:, :OWN_ROWS].flatten(0, 1)
            token = torch.full((len(codes),), self.models[0].senses.own, device=codes.device)
            rows = towers.language_model.embed_tokens(token) + towers.audio_tower(codes)
            return rows.view(len(data), OWN_ROWS, self.width)
        if isinstance(data, Tensor) and data.ndim == 3:
            rows = towers.audio_tower(data.flatten(0, 1))
            return rows.view(*data.shape[:2], self.width)
        assert isinstance(data, Tensor | list | tuple)
        parts = [unpacked(item) for item in data]
        patches = Patches.cat(parts)
        device = self.models[0].device
        placed = (x.to(device) for x in (patches.pictures, patches.inside, patches.steps()))
        return list(towers.vision_tower(*placed).split([len(part) for part in parts]))

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | Tensor | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """input_ids [T] -> [T, D]; rows where ``is_multimodal`` are taken from ``multimodal_embeddings``, in order."""
        if not self.models:
            return torch.zeros(input_ids.shape[0], self.width, dtype=self.dtype, device=self.device)
        x = self.models[0].model.language_model.embed_tokens(input_ids.long())
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None
            x = x.index_copy(0, is_multimodal.to(x.device).nonzero()[:, 0], torch.cat(list(multimodal_embeddings)))
        return x

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor:
        """One step: inputs_embeds [T, D] and their positions [T] -> hidden states [T, D]."""
        assert inputs_embeds is not None
        steps = get_forward_context().attn_metadata
        if not self.models or steps is None:
            return torch.zeros_like(inputs_embeds)
        assert isinstance(steps, dict)
        rows = steps[CACHE_LAYER]
        states = [pages.state(rows) for pages in self.pages]
        return self.models[0].run(inputs_embeds, rows.segments(positions), states)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [R, D] of the rows to sample, in vLLM's order -> fp32 [R, V]."""
        self.hidden = hidden_states
        if not self.models:
            return torch.zeros(hidden_states.shape[0], self.vocab, device=self.device)
        return self.models[0].logits(hidden_states)
