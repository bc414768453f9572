"""The invariance matrix with vLLM among its engines: started and ended again and again in one process, 0 unequal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.weights import checkpoint
from rl.study import matrix
from rl.study.variants import Variant
from rollout.world.speech import SpeechBank
from tests.support.models import fresh_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_vllm_samples_what_the_learner_scores_in_both_types(tmp_path: Path) -> None:
    checkpoint.save(fresh_model(seed=5), tmp_path / "model")
    items = matrix.scenarios(SpeechBank.open(), 2)
    for dtype in (torch.float32, torch.bfloat16):
        variant = Variant.load("ours", tmp_path / "model", dtype)
        many, single = (matrix.sampled(variant, "vllm", items, slots) for slots in (2, 1))
        for result in (matrix.compare_samplings(many, single), matrix.compare_with_learner(variant, many)):
            assert (result.num_unequal, result.rows_unequal) == (0, 0) and result.num_tokens > 100
