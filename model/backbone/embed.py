"""From tokens and dMel codes to rows: normed text embedding, summed dMel embedding; and the plain weight holders.

The holders exist so that parameter names equal transformers': a `Weight` is a bare ``.weight``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import InklingConfig

from kernels import ops

AUDIO_NORM_EPS = 1e-6  # transformers' audio tower fixes it, whatever its config says


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
    """dMel codes to rows: one table indexed ``code + channel * bins``, summed over channels, then RMS norm."""

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
