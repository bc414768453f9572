"""What `.ci/gpu` reports: whatever differs is seen, and nothing is taken for granted."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kernels import gpu_report
from kernels.errors import MetronomeError
from kernels.gpu_report import PORTABLE, collect, failed, readme, table

ROOT = Path(__file__).resolve().parents[3]
Files = dict[str, Any]

RUN = {"mismatch/num_unequal": 0, "mismatch/num_tokens": 3000, "weights_digest": "ab12"}
CASE = {"preset": "tiny", "dtype": "float32"}
STAGES = {name: f"{i:016x}" for i, name in enumerate(PORTABLE)}
GOOD: Files = {
    "machine": {"contract_id": "d46bc93b5a94b7d0", "gpu": "Card", "packages": {"torch": "2.11.0", "triton": "3.6.0"}},
    "rows_products": {"rows": {"linear": []}, "controls": {"product that splits K": ["1 rows from 0"]}},
    "rows_others": {"rows": {"rms_norm": []}, "controls": {}},
    "variants": {"shipped": {"fp32": []}, "variants": {"fp32": {"a": {"same_bits": True}, "b": {"error": "large"}}}},
    "quickstart": RUN,
    "audit": {"verdict": "identical", "headline": "0 of 900 sampled tokens differ"},
    "again": RUN,
    "resumed": RUN,
    "crossing": {"weights_digest": "ab12"},
    "fingerprint": {"stages": STAGES | {"step 0: gradient": "of this device"}},
    "latency": {
        "latency": [
            CASE | {"sessions": 48, "tick_ms": 41.26, "learn_ms": 365.0, "tokens": 90, "unequal": 0}
            | {"forwards": 3, "waits": {"embedded.py:203": 4}}
        ]
    },
    "graph": {"graph": [CASE | {"sessions": 1, "engine_ms": 15.7, "graph_ms": 0.365, "same_bits": True}]},
    "bench": {"bench": [{"op": "linear", "what": "forward bf16, 1", "ratio": r} for r in (0.5, 1.5, 4.0)]},
}  # fmt: skip
PARTS = [{"name": "quickstart", "status": 0, "seconds": 60}, {"name": "graph", "status": "left out", "seconds": 0}]
TESTS = '<testsuites><testsuite tests="3" failures="{0}" errors="0" skipped="1"/></testsuites>'


def report(folder: Path, files: Files, parts: list[dict[str, Any]] = PARTS, failures: int = 0) -> dict[str, Any]:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "parts.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
    (folder / "card.csv").write_text("NVIDIA H100 80GB HBM3, 580.1, 81559 MiB\n")
    (folder / "tests.xml").write_text(TESTS.format(failures))
    golden = folder / "golden"
    golden.write_text(json.dumps({"stages": STAGES | {"step 0: gradient": "of the CPU"}}))
    return collect(folder, golden)


def test_all_equal(tmp_path: Path) -> None:
    found = report(tmp_path, GOOD)
    assert failed(found) == []
    rows = readme(found)
    for text in (
        "NVIDIA H100 80GB HBM3", "torch 2.11.0, triton 3.6.0", "`d46bc93b5a94b7d0`", "2 of 2 hold", "1 of 1 caught",
        "0 of 3,000 tokens unequal, digest ab12", "the CPU's in 7 stages", "41.3 ms",
        "4 waits of the host in 3 forwards", "0.36 ms as a graph",
        "median 1.50, worst 4.00", "2 passed, 0 failed, 1 skipped",
    ):  # fmt: skip
        assert text in rows, text
    assert "left out" in table(found)
    json.dumps(found)


def change(*path: str, value: Any) -> Callable[[Files], None]:
    def changed(files: Files) -> None:
        at = files
        for name in path[:-1]:
            at = at[name]
        at[path[-1]] = value

    return changed


CONTROLS = {
    "row contract": change("rows_others", "rows", "rms_norm", value=["65 rows from 0"]),
    "its controls": change("rows_products", "controls", "product that splits K", value=[]),
    "shipped product": change("variants", "shipped", "fp32", value=["3 rows"]),
    "quickstart": change("quickstart", "mismatch/num_unequal", value=1),
    "audit": change("audit", "verdict", value="not_comparable"),
    "the same recipe again": change("again", value=RUN | {"weights_digest": "ab13"}),
    "resumed from its middle": change("resumed", value=RUN | {"weights_digest": "ab13"}),
    "read back on the CPU": change("crossing", "weights_digest", value="ab13"),
    "portable stages": change("fingerprint", "stages", value=STAGES | {"dMel codes": "another"}),
    "micro-turn, tiny float32, 48 sessions": change(
        "latency", "latency", value=[GOOD["latency"]["latency"][0] | {"unequal": 1}]
    ),
}


@pytest.mark.parametrize("part", CONTROLS)
def test_control_a_difference_fails(part: str, tmp_path: Path) -> None:
    files = copy.deepcopy(GOOD)
    CONTROLS[part](files)
    assert failed(found := report(tmp_path, files)) == [part]
    assert "**FAILED**" in readme(found)


def test_a_part_or_test_that_failed_fails_all(tmp_path: Path) -> None:
    assert failed(report(tmp_path, GOOD, [*PARTS, {"name": "bench", "status": 1, "seconds": 3}])) == ["part bench"]
    assert failed(report(tmp_path, GOOD, failures=1)) == ["tests of the ops"]


def test_no_controls_or_nothing_at_all_is_no_success(tmp_path: Path) -> None:
    files = GOOD | {"rows_products": {"rows": {"linear": []}, "controls": {}}}
    assert failed(report(tmp_path, files)) == ["its controls"]
    (tmp_path / "empty").mkdir()
    assert failed(collect(tmp_path / "empty", None)) == ["nothing was compared"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path, GOOD)
    file = tmp_path / "gpu"
    collecting = [str(file), "--collect", str(tmp_path), "--golden", str(tmp_path / "golden")]
    gpu_report.main(collecting)
    assert "all that was compared is equal" in capsys.readouterr().out
    gpu_report.main([str(file)])
    assert capsys.readouterr().out.startswith("|  | NVIDIA H100")
    (tmp_path / "again.json").write_text(json.dumps(RUN | {"weights_digest": "ab13"}))
    with pytest.raises(SystemExit) as ended:
        gpu_report.main(collecting)
    assert ended.value.code == 1
    with pytest.raises(MetronomeError, match="JSON"):
        gpu_report.main([str(tmp_path / "parts.jsonl")])


def test_portable_stages_are_stages_of_the_fingerprint() -> None:
    golden = list(json.loads((ROOT / "tests/golden/fingerprint.json").read_text())["stages"])
    assert tuple(golden[: len(PORTABLE)]) == PORTABLE and golden[len(PORTABLE)].startswith("step 0")
