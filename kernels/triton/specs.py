"""Every kernel of the Triton backend as it is launched; `kernels.tools.compile_report` compiles them ahead of time."""

from __future__ import annotations

from kernels.triton import (
    attention_backward,
    attention_forward,
    conv,
    elementwise,
    embedding,
    experts,
    linear,
    norm,
    optimizer,
    router,
    sampling,
)
from kernels.triton.launch import CompileSpec


def compile_specs() -> list[CompileSpec]:
    """In fp32 and in bf16, where a kernel takes both."""
    forward = (linear, experts, norm, conv, elementwise, embedding, attention_forward, router, sampling, optimizer)
    return [spec for module in (*forward, attention_backward) for spec in module.specs()]
