"""Every kernel of the Triton backend as it is launched; `kernels.tools.compile_report` compiles them ahead of time."""

from __future__ import annotations

from kernels.triton import (
    attention_backward,
    attention_forward,
    conv,
    elementwise,
    embedding,
    experts,
    gelu,
    linear,
    norm,
    optimizer,
    router,
    sampling,
)
from kernels.triton.launch import CompileSpec


def compile_specs() -> list[CompileSpec]:
    """In fp32 and in bf16, where a kernel takes both."""
    rows = (norm, conv, elementwise, gelu, embedding)
    rest = (attention_forward, router, sampling, optimizer, attention_backward)
    return [spec for module in (linear, experts, *rows, *rest) for spec in module.specs()]
