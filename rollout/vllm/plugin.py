"""What vLLM loads at its start, in every process: our model class and its configuration class, under their names.

Declared under the entry point group ``vllm.general_plugins`` in pyproject.toml; vLLM may call `register` repeatedly.
"""

from __future__ import annotations

MODEL_TYPE = "metronome"
ARCHITECTURE = "MetronomePolicy"


def register() -> None:
    """Makes `ARCHITECTURE` and `MODEL_TYPE` known to vLLM and transformers."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from rollout.vllm.policy import Policy, PolicyConfig

    AutoConfig.register(MODEL_TYPE, PolicyConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, Policy)
