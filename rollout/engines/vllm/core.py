"""Starts vLLM for one model; `Core` is the only use that `rollout.engines.vllm.engine` makes of vLLM.

vLLM's core runs in this process or in one of its own, behind one client interface. Requests are sent to it directly, as
`EngineCoreRequest`: vLLM's front end has nothing to add to token ids and codes. These interfaces are private;
tests/rollout/vllm/private_api.json lists those that this package uses, and a test finds changes.

vLLM computes on the device that its build is for, which must be this program's. It has run on the CPU only: what it
does with this package on a GPU is not proven, but each step's identity check would end a run at the first wrong bit.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import safetensors.torch
import torch.distributed as dist

from kernels import dispatch
from kernels.errors import MetronomeError
from kernels.layout import SPLIT_TOKENS
from model.backbone.transformer import InteractionModel
from model.weights import checkpoint
from rollout.engines.vllm.guard import Guard, starting
from rollout.engines.vllm.process import (
    ENVIRONMENT,
    Functions,
    check_installed,
    memory_file,
    restoring_torch,
    start_folder,
    swap_functions,
)
from rollout.turn.vocabulary import Vocabulary

TIMEOUT_S = 600.0


class Core:
    """vLLM serving one model; engines of this model can share it.

    prefill_tokens: the most rows of one step; longer prefills take several steps.
    pages: size of the KV cache; by default enough for the whole context of every slot, so that vLLM never preempts.
    worker_process: whether vLLM runs in a process of its own, with a copy of the weights.
    timeout_s: seconds that this process may take to get ready, and for each answer.

    Raises MetronomeError for another version or build of vLLM, when it already runs in this process, or when its own
    cannot start. Whatever waits for that process raises MetronomeError when it is lost."""

    def __init__(
        self,
        model: InteractionModel,
        vocabulary: Vocabulary,
        *,
        slots: int,
        max_tokens: int,
        max_patches: int = 0,
        worker_process: bool = False,
        prefix_cache: bool = True,
        prefill_tokens: int = 2048,
        pages: int | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        check_installed()
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
        had_groups = dist.is_initialized()
        rows = max_tokens + 2  # the last sampled token and a forced end lie beyond the context
        start = starting(timeout_s) if worker_process else nullcontext()
        with start_folder(worker_process) as folder, restoring_torch() as vllm_functions, start:
            PolicyConfig.of(model.config, rows, max_patches).save_pretrained(folder)
            allowed = {"allowed": vocabulary.classes.allowed.cpu().contiguous()}
            safetensors.torch.save_file(allowed, folder / CLASSES)
            register()
            from vllm.engine.arg_utils import EngineArgs
            from vllm.v1.engine.core_client import EngineCoreClient
            from vllm.v1.executor import Executor

            from rollout.engines.vllm.pages import page_spec

            count = pages or slots * -(-rows // SPLIT_TOKENS)
            count += 1  # vLLM keeps one page for itself
            arguments = EngineArgs(
                model=str(folder),
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
            if dispatch.device().type != "cpu":  # else vLLM wants 92 % of the GPU to be free, of which it uses nothing
                arguments.gpu_memory_utilization = 0.01
            config = arguments.create_engine_config()
            self.client = EngineCoreClient.make_client(
                multiprocess_mode=worker_process,
                asyncio_mode=False,
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=False,
            )
            self._guard = Guard(self.client, timeout_s) if worker_process else None
            if worker_process:  # it says that it is ready before it has found the socket of its answers, in the folder
                with self._waiting():
                    self.client.reset_encoder_cache()
        self._finalizer = weakref.finalize(
            self, _shut_down, self.client, self._guard, vllm_functions, keep_groups=had_groups
        )
        self.steps, self.slots, self.opened = 0, slots, 0
        self.begun: dict[int, bool] = {}  # open session -> whether vLLM has its past
        self.weights_digest = ""
        if not worker_process:
            self.client.collective_rpc("share_model", args=(model,))
        self.publish()

    def publish(self) -> None:
        """Makes vLLM use the model's present weights. Raises MetronomeError when a worker process has received others,
        or sessions are open."""
        digest = checkpoint.weights_digest(self.model)
        if self.worker_process:
            with memory_file(safetensors.torch.save(checkpoint.weights(self.model))) as path, self._waiting():
                answer = tuple(self.client.collective_rpc("load_weights_file", args=(path,))[0])
            if answer != (dispatch.contract_id(), digest):
                raise MetronomeError(
                    f"vLLM's worker process holds weights {answer[1]} under contract {answer[0]}; it was sent {digest} "
                    f"under {dispatch.contract_id()}"
                )
        with self._waiting():
            self.client.reset_encoder_cache()
            dropped = self.client.reset_prefix_cache()
            if dropped:
                self.client.set_weight_version(digest)
        if not dropped:
            raise MetronomeError("vLLM could not drop its prefix cache; are sessions still open?")
        self.weights_digest = digest

    @property
    def free(self) -> int:
        """How many more sessions can be opened."""
        return self.slots - len(self.begun)

    def take(self) -> int:
        """Reserves a slot; returns the new session's number. Raises MetronomeError when every slot is taken."""
        if not self.free:
            raise MetronomeError(f"all {self.slots} sessions are open; close one or make the engine with more slots")
        self.opened += 1
        self.begun[self.opened] = False
        return self.opened

    def add(
        self,
        session: int,
        tokens: list[int],
        items: Sequence[Any],
        turn: dict[str, Any],
        *,
        max_tokens: int,
        stop: list[int],
    ) -> None:
        """Adds input to ``session`` and starts a micro-turn: token ids, and what of them is no text, ascending
        (`rollout.engines.vllm.items`). The micro-turn ends after ``max_tokens`` tokens or with one of ``stop``;
        ``turn``: fields of `rollout.engines.vllm.sampling.Turn`."""
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        request = EngineCoreRequest(
            request_id=str(session),
            prompt_token_ids=list(tokens),
            mm_features=list(items),
            sampling_params=SamplingParams(
                temperature=0.0,
                max_tokens=max_tokens,
                stop_token_ids=stop,
                detokenize=False,
                extra_args={"session": str(session), **turn},
            ),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            resumable=True,
        )
        with self._waiting():
            self.client.add_request(request)
        self.begun[session] = True

    def run(self, sessions: Sequence[int]) -> list[list[int]]:
        """Runs vLLM until each of ``sessions`` has ended its micro-turn; returns the tokens that each sampled. Raises
        MetronomeError when vLLM stops early, makes no progress or has other weights."""
        from vllm.v1.engine import FinishReason

        sampled: dict[str, list[int]] = {str(session): [] for session in sessions}
        unfinished, idle = set(sampled), 0
        while unfinished:
            with self._waiting():
                step = self.client.get_output()
            self.steps += 1
            idle = 0 if step.outputs else idle + 1
            if idle > 10_000:
                raise MetronomeError(
                    f"vLLM makes no progress: {len(unfinished)} sessions wait for pages that others hold"
                )
            for output in step.outputs:
                if step.weight_version != self.weights_digest:
                    raise MetronomeError(f"vLLM sampled from {step.weight_version}, published is {self.weights_digest}")
                sampled[output.request_id] += output.new_token_ids
                if output.finish_reason is None:
                    continue
                if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                    raise MetronomeError(f"vLLM ended session {output.request_id}: {output.finish_reason.name}")
                unfinished.discard(output.request_id)
        return list(sampled.values())

    def records(self, sessions: Sequence[int]) -> list[dict[int, Any]]:
        """What was sampled for each session since the last call: position -> `rollout.engines.vllm.policy.Record`."""
        names = [str(session) for session in sessions]
        with self._waiting():
            records: list[dict[int, Any]] = self.client.collective_rpc("take_records", args=(names,))[0]
        return records

    def drop(self, session: int) -> None:
        """Ends the session and frees its pages."""
        if self.begun.pop(session) and not self.lost:
            self.client.abort_requests([str(session)])

    def forget_pages(self) -> None:
        """Clears vLLM's caches after a step that failed: vLLM registers pages and embedded audio in them when it
        schedules a step, so they may have entries that were never computed. Open sessions keep their pages, which
        earlier steps wrote. In a process of its own vLLM ends with such a step, and there is nothing to clear."""
        if self.worker_process:
            return
        pages = self.client.engine_core.scheduler.kv_cache_manager
        pages.evict_blocks(set(range(len(pages.block_pool.blocks))))
        self.client.reset_encoder_cache()

    @property
    def open(self) -> bool:
        """Whether vLLM still runs."""
        return self._finalizer.alive and not self.lost

    @property
    def lost(self) -> str:
        """What became of vLLM's process, once it can be used no more; else ""."""
        return self._guard.lost if self._guard else ""

    def _waiting(self) -> AbstractContextManager[None]:
        """For calls that vLLM must answer."""
        return self._guard.waiting() if self._guard else nullcontext()

    def close(self) -> None:
        """Ends vLLM, and its process if it has one."""
        self._finalizer()


_running: weakref.WeakValueDictionary[tuple[Any, ...], Core] = weakref.WeakValueDictionary()
"""Cores by model and options, for `shared_core`. At most one runs in this process, because shutting one down also ends
vLLM's per-process state."""


def shared_core(model: InteractionModel, vocabulary: Vocabulary, **options: Any) -> Core:
    """The running core for this model and these options of `Core`, or a new one, with the model's present weights. It
    is shut down when the last reference to it is gone."""
    key = (id(model), *sorted(options.items()))
    core = _running.get(key)
    if core is None or not core.open:
        core = _running[key] = Core(model, vocabulary, **options)
    elif core.weights_digest != checkpoint.weights_digest(model):
        core.publish()
    return core


def _shut_down(client: Any, guard: Guard | None, vllm_functions: Functions, *, keep_groups: bool) -> None:
    """Shuts vLLM down, with its replacements of torch's functions in place: without a GPU it needs them for that.
    ``keep_groups``: the default process group was there before vLLM, which would destroy it and then miss it."""
    destroy = dist.destroy_process_group

    def destroy_own(group: dist.ProcessGroup | None = None) -> None:
        if dist.is_initialized() and not (group is None and keep_groups):
            destroy(group)

    if guard is not None:
        guard.stop()
    before = swap_functions([*vllm_functions, (dist, "destroy_process_group", destroy_own)])
    try:
        client.shutdown()
    finally:
        swap_functions(before)
