"""Parser of commands whose arguments are plain options instead of a recipe's fields.

Each such command's module has a function ``parser`` that returns its `Parser`, and a ``main`` that takes the arguments.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from kernels.errors import MetronomeError


class Parser(argparse.ArgumentParser):
    """argparse's, but wrong arguments raise MetronomeError, which `model.program.startup.run_command` prints as one
    line, and options are not guessed from their beginnings."""

    def __init__(self, command: str, description: str | None) -> None:
        """``command``: the module's name, "rl.audit"; ``description``: its first paragraph is shown by ``--help``."""
        first = " ".join((description or "").strip().split("\n\n")[0].split())
        super().__init__(prog=f"python -m {command}", description=first, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's. Some versions of Python take ``--option=--`` for an empty list instead of a value."""
        given = list(sys.argv[1:] if args is None else args)
        for argument in given:
            if argument.endswith("=--"):
                self.error(f"argument {argument.removesuffix('=--')}: '--' is no value of it")
        return super().parse_known_args(given, namespace)

    def error(self, message: str) -> NoReturn:
        """Raises MetronomeError."""
        raise MetronomeError(f"{' '.join(message.split())}. `{self.prog} --help` lists the options")
