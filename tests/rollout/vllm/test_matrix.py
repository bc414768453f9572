"""The invariance matrix with vLLM among its engines: started and ended again and again in one process, 0 unequal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.backbone.transformer import InteractionModel
from model.config import preset
from model.weights import checkpoint
from rl.study import matrix
from rl.study.variants import Variant
from rollout.world.speech import SpeechBank

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_vllm_samples_what_the_learner_scores_in_both_types(tmp_path: Path) -> None:
    model = InteractionModel(preset("tiny"))
    model.init_weights(5)
    checkpoint.save(model, tmp_path / "model")
    items = matrix.scenarios(SpeechBank.load(), 2)
    for dtype in (torch.float32, torch.bfloat16):
        variant = Variant.load("ours", tmp_path / "model", dtype)
        many, single = (matrix.sampled(variant, "vllm", items, slots) for slots in (2, 1))
        for found in (matrix.compare_samplings(many, single), matrix.compare_with_learner(variant, many)):
            assert (found.num_unequal, found.rows_unequal) == (0, 0) and found.num_tokens > 100
