"""``python -m rl.audit``: see `rl.audit.command`."""

from __future__ import annotations

from model.program.startup import run_command

if __name__ == "__main__":
    run_command("rl.audit.command")
