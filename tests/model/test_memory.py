"""Memory is asked for before it is taken: what does not fit is an error with a remedy, not a killed process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.errors import MetronomeError
from model.backbone.state import SessionState
from model.config import preset
from model.program import memory


def test_a_state_that_does_not_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(MetronomeError, match=r"1000000 sessions of up to 100000 tokens would take .* lower the number"):
        SessionState(preset("tiny"), 1_000_000, 100_000, torch.float32)


def test_what_fits_is_decided_by_the_bytes_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SessionState(preset("tiny"), 2, 512, torch.float32)
    taken = sum(
        x.nbytes for s in made.layers for x in (s.kv.key, s.kv.value, s.kv_conv, s.attn_conv, s.mlp_conv)
    )  # fmt: skip
    enough = int(taken / (1 - memory.RESERVED_FRACTION)) + 2
    for left, fits in ((enough, True), (enough - 4, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda left=left: left)
        if fits:
            SessionState(preset("tiny"), 2, 512, torch.float32)
        else:
            with pytest.raises(MetronomeError, match="GiB can be had"):
                SessionState(preset("tiny"), 2, 512, torch.float32)


def test_the_containers_limit_counts(tmp_path: Path) -> None:
    """The least of machine and control group, whose file cache counts as left."""
    meminfo, groups = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    groups.mkdir()
    assert memory.available_bytes(meminfo, groups) == 4000 * 1024
    (groups / "memory.max").write_text("max\n")
    assert memory.available_bytes(meminfo, groups) == 4000 * 1024
    (groups / "memory.max").write_text("1000000\n")
    (groups / "memory.current").write_text("700000\n")
    (groups / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    assert memory.available_bytes(meminfo, groups) == 400_000


def test_the_process_own_limit_counts(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 999999999999 kB\n")
    code = (
        "import sys, resource; from pathlib import Path; import torch; from model.program import memory;"
        f"read = lambda: memory.available_bytes(Path({str(meminfo)!r}), Path('/nowhere'));"
        "before = read(); resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30)); print(before, read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    before, after = map(int, done.stdout.split())
    assert before == 999999999999 * 1024 and 0 < after < 16 << 30
