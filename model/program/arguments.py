"""Parser of commands whose arguments are plain options instead of a recipe's fields."""

from __future__ import annotations

import argparse
from typing import NoReturn

from kernels.errors import MetronomeError


class Parser(argparse.ArgumentParser):
    """As argparse's, but wrong arguments raise MetronomeError, which `model.program.startup.run_command` prints as one
    line."""

    def error(self, message: str) -> NoReturn:
        """Raises MetronomeError."""
        raise MetronomeError(f"{' '.join(message.split())}. `{self.prog} --help` lists the options")
