"""Embeddings: tokens (RMS-normed) and dMel codes (one vector per channel and bin, summed, RMS-normed).

`Weight` and `AudioTable` only hold a parameter, so that parameter names are those of transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import InklingConfig

from kernels import ops

AUDIO_NORM_EPS = 1e-6  # a constant in transformers' audio tower too; no config field sets it


class Weight(nn.Module):
    """One parameter called ``weight``."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))


class TextEmbedding(Weight):
    """``weight`` [V, D], then RMS norm by ``embed_norm.weight`` [D]."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        text = config.text_config
        super().__init__(text.vocab_size, text.hidden_size, dtype=dtype)
        self.embed_norm = Weight(text.hidden_size, dtype=dtype)
        self.eps = text.rms_norm_eps

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [T] -> [T, D]."""
        return ops.rms_norm(F.embedding(tokens, self.weight), self.embed_norm.weight, self.eps)


class AudioTable(nn.Module):
    """[channels * bins, D], one level deeper than `Weight`, as transformers names it."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_audio_tokens = Weight(rows, width, dtype=dtype)


class AudioTower(nn.Module):
    """Embeds dMel codes: one table indexed ``code + channel * bins``, summed over channels, then RMS norm."""

    def __init__(self, config: InklingConfig, dtype: torch.dtype) -> None:
        super().__init__()
        audio, width = config.audio_config, config.text_config.hidden_size
        self.bins = audio.mel_vocab_size
        self.embed_audio_tokens = AudioTable(audio.n_mel_bins * self.bins, width, dtype)
        self.norm = Weight(width, dtype=dtype)

    def forward(self, codes: Tensor) -> Tensor:
        """codes uint8 [A, channels] -> [A, D]."""
        table = self.embed_audio_tokens.embed_audio_tokens.weight
        return ops.rms_norm(ops.embedding_sum(codes, table, self.bins), self.norm.weight, AUDIO_NORM_EPS)
