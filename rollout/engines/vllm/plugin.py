"""vLLM's plugin: registers our model class and its configuration class, in every process of vLLM.

Declared under the entry point group ``vllm.general_plugins`` in pyproject.toml; vLLM may call `register` repeatedly.
"""

from __future__ import annotations


def register() -> None:
    """Registers the model class with vLLM and the configuration class with transformers, under the names in
    `rollout.engines.vllm.policy`. Imports them when called: vLLM must be configured before it is first imported."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from rollout.engines.vllm.policy import ARCHITECTURE, MODEL_TYPE, Policy, PolicyConfig

    AutoConfig.register(MODEL_TYPE, PolicyConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, Policy)
