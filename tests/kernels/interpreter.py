"""Triton's interpreter, several times faster: what it does anew at every call inside a kernel, it does once."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def quicken() -> None:
    """A kernel's launch swaps triton.language's functions for interpreted ones; a call of a function inside it (tl.sum
    is one too) looks through the whole language and swaps them again. Once a module is enough: what a launch swaps back
    the next launch swaps anew, and what a call swaps stays."""
    seen: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in seen:
            interpreter._patch_lang(self.fn)
            seen.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
