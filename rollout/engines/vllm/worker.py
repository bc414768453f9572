"""Methods added to vLLM's worker, which the engine calls through ``collective_rpc``: to pass weights, and to fetch the
records of sampled tokens. They work in this process and in another one."""

from __future__ import annotations

import tempfile
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
        """The model that vLLM has built."""
        model = self.get_model()
        assert isinstance(model, Policy)
        return model

    def share_model(self, model: InteractionModel) -> None:
        """For a worker in this process: use the learner's own, packed model."""
        self.policy().models[:] = [model]

    def load_weights_file(self, path: str) -> tuple[str, str]:
        """For a worker in another process: load the weights in the file. Returns (this process's contract id, digest of
        the loaded weights), which the engine compares with its own."""
        tempfile.tempdir = None  # the folder that this process was started from is gone
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
            model.to(dispatch.device()).requires_grad_(False)
            model.pack()
            policy.models[:] = [model]
        return dispatch.contract_id(), checkpoint.weights_digest(model)

    def take_records(self, sessions: list[str]) -> list[dict[int, Record]]:
        """What was sampled for each session since the last call, by position."""
        records = self.policy().records
        return [records.pop(session) for session in sessions]
