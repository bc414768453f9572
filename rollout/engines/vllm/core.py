"""Starts vLLM for one model and keeps its private parts in one place: `Core` is all that the engine knows of vLLM.

The same client interface drives a core in this process and one in a process of its own; requests are handed to it as
`EngineCoreRequest`, past vLLM's front end, which has nothing to add to ready token ids and codes. These are private
interfaces: tests/rollout/vllm/private_api.json lists those that this package leans on, and a test says which moved.
"""

from __future__ import annotations

import os
import tempfile
import time
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from kernels import dispatch
from kernels.errors import MetronomeError
from kernels.layout import SPLIT_TOKENS
from model.backbone.transformer import InteractionModel
from model.weights import checkpoint
from rollout.engines.vllm.process import ENVIRONMENT, Functions, check_version, restoring_torch, swap_functions
from rollout.turn.vocabulary import Vocabulary


class Core:
    """vLLM around one model; engines of one model can share it.

    prefill_tokens: most rows of one step; longer prefills go in several.
    pages: size of the cache; by default enough for every slot's whole context, so that nothing is ever preempted.
    worker_process: whether vLLM runs in a process of its own, with a copy of the weights.

    Raises MetronomeError for another version of vLLM, or when it already runs in this process."""

    def __init__(
        self,
        model: InteractionModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        max_tokens: int,
        worker_process: bool = False,
        prefix_cache: bool = True,
        prefill_tokens: int = 2048,
        pages: int | None = None,
    ) -> None:
        check_version()
        if not worker_process and any(core.open and not core.worker_process for core in _running.values()):
            raise MetronomeError(
                "vLLM already runs in this process for another model or with other settings, and it can only once: "
                "close that engine's core first, or give one of them a process of its own (worker_process)"
            )
        os.environ.update(ENVIRONMENT)
        from rollout.engines.vllm.plugin import register
        from rollout.engines.vllm.policy import CLASSES, PolicyConfig
        from rollout.engines.vllm.sampling import RowSampler
        from rollout.engines.vllm.worker import WorkerExtension

        self.model = model
        self.worker_process: bool = worker_process
        self.folder = tempfile.TemporaryDirectory(prefix="metronome-vllm-", dir=_memory_folder())
        place = Path(self.folder.name)
        rows = max_tokens + 2  # the last sampled token and a forced end lie beyond the context
        PolicyConfig.of(model.config, rows).save_pretrained(place)
        save_file({"allowed": vocabulary.classes.allowed.cpu().contiguous()}, place / CLASSES)
        with restoring_torch() as vllms:
            register()
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.core_client import EngineCoreClient
            from vllm.v1.executor import Executor

            from rollout.engines.vllm.pages import page_spec

            count = pages or slots * -(-rows // SPLIT_TOKENS)
            count += 1  # vLLM keeps one page for itself
            arguments = EngineArgs(
                model=str(place),
                dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                enforce_eager=True,
                block_size=SPLIT_TOKENS,  # type: ignore[arg-type]
                max_model_len=rows,
                max_num_seqs=slots,
                max_num_batched_tokens=max(prefill_tokens, slots),
                enable_chunked_prefill=True,
                enable_prefix_caching=prefix_cache,
                num_gpu_blocks_override=count,
                kv_cache_memory_bytes=count * page_spec(model.config, model.dtype).page_size_bytes,
                async_scheduling=False,
                mm_processor_cache_gb=0,
                skip_mm_profiling=True,
                logits_processors=[f"{RowSampler.__module__}:{RowSampler.__name__}"],
                worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
                distributed_executor_backend="uni",
                disable_log_stats=True,
            )
            config = arguments.create_engine_config()
            self.client = EngineCoreClient.make_client(
                multiprocess_mode=worker_process,
                asyncio_mode=False,
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=False,
            )
        self._finalizer = weakref.finalize(self, _shut_down, self.client, self.folder, vllms)
        self.steps, self.slots, self.opened = 0, slots, 0
        self.begun: dict[int, bool] = {}  # open session -> whether vLLM has its past
        self.weights_digest = ""
        if not worker_process:
            self.client.collective_rpc("share_model", args=(model,))
        self.publish()

    def publish(self) -> None:
        """The model's weights as they are now. Raises MetronomeError when a worker process did not get them whole."""
        digest = checkpoint.weights_digest(self.model)
        if self.worker_process:
            path = Path(self.folder.name) / f"{uuid.uuid4()}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}, path)
            answer = tuple(self.client.collective_rpc("load_weights_file", args=(str(path),))[0])
            path.unlink()
            if answer != (dispatch.contract_id(), digest):
                raise MetronomeError(
                    f"vLLM's worker process holds weights {answer[1]} under contract {answer[0]}; it was sent {digest} "
                    f"under {dispatch.contract_id()}"
                )
        self.client.reset_encoder_cache()
        if not self.client.reset_prefix_cache():
            raise MetronomeError("vLLM could not drop its prefix cache; are sessions still open?")
        self.client.set_weight_version(digest)
        self.weights_digest = digest

    @property
    def free(self) -> int:
        """How many more sessions can be opened."""
        return self.slots - len(self.begun)

    def take(self) -> int:
        """A number for a new session. Raises MetronomeError when every slot is taken."""
        if not self.free:
            raise MetronomeError(f"all {self.slots} sessions are open; close one or make the engine with more slots")
        self.opened += 1
        self.begun[self.opened] = False
        return self.opened

    def add(
        self,
        session: int,
        tokens: list[int],
        codes: Sequence[tuple[int, Tensor]],
        ask: dict[str, Any],
        *,
        most_tokens: int,
        stop: list[int],
    ) -> None:
        """One more input of ``session``: token ids, and for each chunk of audio among them the place of its first row
        and its codes. The micro-turn ends after ``most_tokens`` or with one of ``stop``; ``ask`` are the fields of
        `rollout.engines.vllm.sampling.Turn` that the session decides."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        self.client.add_request(
            EngineCoreRequest(
                request_id=str(session),
                prompt_token_ids=list(tokens),
                mm_features=[_audio(place, c) for place, c in codes],
                sampling_params=SamplingParams(
                    temperature=0.0,
                    max_tokens=most_tokens,
                    stop_token_ids=stop,
                    detokenize=False,
                    extra_args={"session": str(session), **ask},
                ),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                resumable=True,
            )
        )
        self.begun[session] = True

    def run(self, sessions: Sequence[int]) -> list[list[int]]:
        """Steps until every one of ``sessions`` has ended its micro-turn; the tokens that each sampled."""
        from vllm.v1.engine import FinishReason

        sampled: dict[str, list[int]] = {str(session): [] for session in sessions}
        going, idle = set(sampled), 0
        while going:
            step = self.client.get_output()
            self.steps += 1
            idle = 0 if step.outputs else idle + 1
            if idle > 10_000:
                raise MetronomeError(f"vLLM makes no progress: {len(going)} sessions wait for pages that others hold")
            for output in step.outputs:
                if step.weight_version != self.weights_digest:
                    raise MetronomeError(f"vLLM sampled from {step.weight_version}, published is {self.weights_digest}")
                sampled[output.request_id] += output.new_token_ids
                if output.finish_reason is None:
                    continue
                if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                    raise MetronomeError(f"vLLM ended session {output.request_id}: {output.finish_reason.name}")
                going.discard(output.request_id)
        return list(sampled.values())

    def records(self, sessions: Sequence[int]) -> list[dict[int, Any]]:
        """What was sampled for each session since the last call: position -> `rollout.engines.vllm.policy.Record`."""
        found: list[dict[int, Any]] = self.client.collective_rpc("take_records", args=([str(s) for s in sessions],))[0]
        return found

    def drop(self, session: int) -> None:
        """Gives the session's pages back."""
        if self.begun.pop(session):
            self.client.abort_requests([str(session)])

    def forget_pages(self) -> None:
        """After a step that failed: vLLM registers pages and embedded audio in its caches when it schedules a step, so
        entries may stand for what was never computed. All are dropped; open sessions keep their pages, which earlier
        steps wrote. A vLLM in a process of its own ends with such a step, and has nothing to forget."""
        if self.worker_process:
            return
        pages = self.client.engine_core.scheduler.kv_cache_manager
        pages.evict_blocks(set(range(len(pages.block_pool.blocks))))
        self.client.reset_encoder_cache()

    @property
    def open(self) -> bool:
        """Whether vLLM still runs."""
        return self._finalizer.alive

    def close(self) -> None:
        """Ends vLLM, and its process if it has one."""
        self._finalizer()


_running: weakref.WeakValueDictionary[tuple[Any, ...], Core] = weakref.WeakValueDictionary()
"""At most one of them in this process: ending one ends what vLLM keeps once a process."""


def shared_core(model: InteractionModel, vocabulary: Vocabulary, **options: Any) -> Core:
    """The core that runs for this model with these options of `Core`, with the model's present weights; started if
    there is none. It runs as long as somebody holds it."""
    key = (id(model), *sorted(options.items()))
    core = _running.get(key)
    if core is None or not core.open:
        core = _running[key] = Core(model, vocabulary, **options)
    elif core.weights_digest != checkpoint.weights_digest(model):
        core.publish()
    return core


def _shut_down(client: Any, folder: tempfile.TemporaryDirectory[str], vllms: Functions) -> None:
    """On a machine without an accelerator vLLM ends only with its own functions in place."""
    before = swap_functions(vllms)
    try:
        client.shutdown()
    finally:
        swap_functions(before)
        folder.cleanup()


def _memory_folder() -> str | None:
    """Where a file stays in memory, if the system has such a place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _audio(place: int, codes: Tensor) -> Any:
    """One chunk's codes uint8 [4, 80], whose rows begin at ``place``. Equal codes have equal names, so that vLLM's
    prefix cache tells chunks apart by what is heard in them."""
    import hashlib

    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFeatureSpec,
        MultiModalFieldElem,
        MultiModalKwargsItem,
        PlaceholderRange,
    )

    from rollout.engines.vllm.policy import CODES_FIELD

    name = hashlib.blake2b(codes.contiguous().numpy().tobytes(), digest_size=16).hexdigest()
    return MultiModalFeatureSpec(
        data=MultiModalKwargsItem({CODES_FIELD: MultiModalFieldElem(data=codes, field=MultiModalBatchedField())}),
        modality="audio",
        identifier=name,
        mm_position=PlaceholderRange(offset=place, length=len(codes)),
        mm_hash=name,
    )
