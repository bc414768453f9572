"""What the engine asks of a vLLM worker beside generating, by vLLM's ``collective_rpc``: take these weights, hand over
what was sampled. The same calls in this process and in another one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from kernels import dispatch
from model.backbone.transformer import InteractionModel
from model.weights import checkpoint
from rollout.engines.vllm.policy import Policy, Record

if TYPE_CHECKING:
    from vllm.v1.worker.worker_base import WorkerBase as _Base
else:
    _Base = object


class WorkerExtension(_Base):
    """Mixed into vLLM's worker class by its ``worker_extension_cls``."""

    def policy(self) -> Policy:
        model = self.get_model()
        assert isinstance(model, Policy)
        return model

    def share_model(self, model: InteractionModel) -> None:
        """Same process: sample from the learner's own, packed model."""
        self.policy().models[:] = [model]

    def load_weights_file(self, path: str) -> tuple[str, str]:
        """Another process: take the weights in the file; returns the contract id here and the digest of what was
        loaded, for the engine to compare with its own."""
        policy = self.policy()
        tensors = load_file(path)
        if policy.models:
            model = policy.models[0]
            with torch.no_grad():
                model.load_state_dict(tensors)
            model.mark_changed()
            model.repack()
        else:
            model = InteractionModel(policy.config, policy.dtype)
            model.load_state_dict(tensors)
            model.requires_grad_(False)
            model.pack()
            policy.models[:] = [model]
        return dispatch.contract_id(), checkpoint.weights_digest(model)

    def take_records(self, sessions: list[str]) -> list[dict[int, Record]]:
        """What was sampled for each session since the last call, by position."""
        records = self.policy().records
        return [records.pop(session) for session in sessions]
