"""The points of vLLM's private interfaces that `rollout.engines.vllm` leans on, as one line each.

``python -m tests.rollout.vllm.private_api`` writes them to private_api.json for the installed vLLM: to be run, and its
difference read, when the pinned version changes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")

POINTS = [
    "vllm:SamplingParams",
    "vllm:ModelRegistry.register_model",
    "vllm:ModelRegistry.get_supported_archs",
    "vllm.config:VllmConfig",
    "vllm.config:CompilationConfig",
    "vllm.engine.arg_utils:EngineArgs",
    "vllm.engine.arg_utils:EngineArgs.create_engine_config",
    "vllm.forward_context:ForwardContext",
    "vllm.forward_context:get_forward_context",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.bind_kv_cache",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_attn_backend",
    "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase.get_kv_cache_spec",
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_multimodal",
    "vllm.model_executor.models.interfaces:SupportsMultiModal.embed_input_ids",
    "vllm.multimodal:MULTIMODAL_REGISTRY.register_processor",
    "vllm.multimodal.inputs:MultiModalBatchedField",
    "vllm.multimodal.inputs:MultiModalFeatureSpec",
    "vllm.multimodal.inputs:MultiModalFieldElem",
    "vllm.multimodal.inputs:MultiModalKwargsItem",
    "vllm.multimodal.inputs:PlaceholderRange",
    "vllm.multimodal.processing:BaseProcessingInfo.get_supported_mm_limits",
    "vllm.multimodal.processing:BaseProcessingInfo.get_mm_max_tokens_per_item",
    "vllm.v1.attention.backend:AttentionBackend.get_name",
    "vllm.v1.attention.backend:AttentionBackend.get_impl_cls",
    "vllm.v1.attention.backend:AttentionBackend.get_builder_cls",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
    "vllm.v1.attention.backend:CommonAttentionMetadata",
    "vllm.v1.core.block_pool:BlockPool.evict_blocks",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks",
    "vllm.v1.core.sched.scheduler:Scheduler._update_request_as_session",
    "vllm.v1.core.sched.scheduler:Scheduler._handle_stopped_request",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request",
    "vllm.v1.engine:EngineCoreOutput",
    "vllm.v1.engine:EngineCoreOutputs",
    "vllm.v1.engine:EngineCoreRequest",
    "vllm.v1.engine:FinishReason",
    "vllm.v1.engine.core:EngineCoreProc.run_engine_core",
    "vllm.v1.engine.core_client:BackgroundResources",
    "vllm.v1.engine.core_client:EngineCoreClient.make_client",
    "vllm.v1.engine.core_client:InprocClient.abort_requests",
    "vllm.v1.engine.core_client:InprocClient.add_request",
    "vllm.v1.engine.core_client:InprocClient.collective_rpc",
    "vllm.v1.engine.core_client:InprocClient.get_output",
    "vllm.v1.engine.core_client:InprocClient.reset_encoder_cache",
    "vllm.v1.engine.core_client:InprocClient.reset_prefix_cache",
    "vllm.v1.engine.core_client:InprocClient.set_weight_version",
    "vllm.v1.engine.core_client:InprocClient.shutdown",
    "vllm.v1.engine.core_client:SyncMPClient.abort_requests",
    "vllm.v1.engine.core_client:SyncMPClient.add_request",
    "vllm.v1.engine.core_client:SyncMPClient.collective_rpc",
    "vllm.v1.engine.core_client:SyncMPClient.get_output",
    "vllm.v1.engine.core_client:SyncMPClient.reset_encoder_cache",
    "vllm.v1.engine.core_client:SyncMPClient.reset_prefix_cache",
    "vllm.v1.engine.core_client:SyncMPClient.set_weight_version",
    "vllm.v1.engine.core_client:SyncMPClient.shutdown",
    "vllm.v1.executor:Executor.get_class",
    "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "vllm.v1.kv_cache_interface:FullAttentionSpec.page_size_bytes",
    "vllm.v1.sample.logits_processor:BatchUpdate",
    "vllm.v1.sample.logits_processor:LogitsProcessor.__init__",
    "vllm.v1.sample.logits_processor:LogitsProcessor.apply",
    "vllm.v1.sample.logits_processor:LogitsProcessor.is_argmax_invariant",
    "vllm.v1.sample.logits_processor:LogitsProcessor.update_state",
    "vllm.v1.sample.logits_processor.builtin:process_dict_updates",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_streaming_request",
    "vllm.v1.worker.worker_base:WorkerBase.get_model",
]


def describe(point: str) -> str:
    """A function's signature, a record's fields, an enumeration's names; ``missing`` for what is not there."""
    module, _, path = point.partition(":")
    try:
        actual = importlib.import_module(module)
        for name in path.split("."):
            actual = inspect.getattr_static(actual, name) if inspect.isclass(actual) else getattr(actual, name)
    except (ImportError, AttributeError):
        return "missing"
    if isinstance(actual, (classmethod, staticmethod)):
        actual = actual.__func__
    if isinstance(actual, property):
        return "property"
    if inspect.isclass(actual):
        if hasattr(actual, "__struct_fields__"):
            return "fields " + " ".join(actual.__struct_fields__)
        if dataclasses.is_dataclass(actual):
            return "fields " + " ".join(field.name for field in dataclasses.fields(actual))
        if hasattr(actual, "__members__"):
            return "members " + " ".join(actual.__members__)
    return "takes " + " ".join(inspect.signature(actual).parameters)


def described() -> dict[str, str]:
    return {point: describe(point) for point in POINTS}


def moved(wanted: dict[str, str], actual: dict[str, str]) -> list[str]:
    """What differs, one line a point."""
    names = sorted(wanted.keys() | actual.keys())
    return [
        f"{name}: was {wanted.get(name, 'not listed')!r}, is {actual.get(name, 'not listed')!r}"
        for name in names
        if wanted.get(name) != actual.get(name)
    ]


if __name__ == "__main__":
    FILE.write_text(json.dumps(described(), indent=1) + "\n")
