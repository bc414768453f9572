"""The audit as a command.

    python -m rl.audit --run runs/quickstart
    python -m rl.audit --compare runs/a runs/b [--out FOLDER]
    python -m rl.audit --checkpoint runs/quickstart/checkpoints/step_000120 --matrix [--out FOLDER]

A run may be somebody else's: of the scenario families that its recipe names, only those shipped are imported, unless
``--trust-families`` is given; without it, episodes of others are re-scored, but not judged by their rules.

The first re-scores the run's saved episodes and writes RUN/audit/report.html and report.json; the second says whether
two runs are one run, bit for bit (RUN_A/audit/compare_B by default); the third measures invariance (`rl.study.matrix`),
of a model without a voice only.

A run on a GPU is audited there where one is, and so is its checkpoint; elsewhere its episodes are of another contract,
so *not comparable*. ``--device`` says otherwise.

Exit status 0, whatever the verdict; with ``--fail-on mismatch`` 1 when it is *different*, 2 when it is *not
comparable*, 3 when *nothing* was *compared*: no episode could be re-scored, two runs have nothing in common, no token
was measured. The verdict on a matrix is on our kernels; naive torch, which is to differ, is its control. Status 2 is
also that of every input that cannot be read: there is no statement to rely on, either.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from kernels.errors import MetronomeError
from model.placement import Device, Placement, PlacementConfig, add_device
from model.program.arguments import Parser
from model.program.folders import locked
from model.program.outputs import output_folder
from rl.audit.compare import compare_runs
from rl.audit.document import Report
from rl.audit.finding import Verdict, add_fail_on, leave
from rl.audit.records import check_run, read
from rl.audit.report import audit, statement
from rollout.scenarios.registry import shipped_only


def main(arguments: list[str] | None = None) -> None:
    """Raises SystemExit with the status that ``--fail-on`` asks for, MetronomeError for a folder that will not do."""
    given = parser().parse_args(arguments)
    if bool(given.checkpoint) != given.matrix:
        raise MetronomeError("--checkpoint and --matrix go together: name a checkpoint's folder and ask for its matrix")
    if given.run and given.out:
        raise MetronomeError("--out: the report of a run goes to RUN/audit; leave --out away")
    if given.compare and given.out and holds_audit(given.out):
        raise MetronomeError(f"--out {str(given.out)!r}: the run's own report is there; give another folder")
    if given.compare and given.device:
        raise MetronomeError("--device: two runs are compared by their files, without computing; leave --device away")
    with shipped_only("--trust-families", unless=given.trust_families) as refused:
        verdict = carry_out(given)
    for line in refused.values():
        print(line)
    leave(verdict, given.fail_on)


def carry_out(given: argparse.Namespace) -> Verdict:
    """Does what the options ask for, prints what was found, and returns the verdict."""
    for run in given.compare or [given.run] * bool(given.run):
        check_run(run)  # before anything is made in it
    if given.checkpoint:
        return measure(given.checkpoint, given.out, given.device)
    if given.compare:
        first, second = given.compare
        out = given.out or first / "audit" / f"compare_{second.resolve().name}"
        with locked(out):
            report: Report = compare_runs(first, second, out)
    else:
        out = given.run / "audit"
        enter_placement(given.run, given.device)
        with locked(out):
            report = audit(given.run)
    print(statement(report, out))
    return report.verdict


def holds_audit(folder: Path) -> bool:
    """Whether ``folder`` is RUN/audit, where a comparison's report would take the place of the run's."""
    place = folder.resolve()
    return place.name == "audit" and (place.parent / "config.yaml").is_file()


def enter_placement(run: Path, device: Device | None) -> None:
    """Computes on ``device``, or else where ``run`` did, if that can be: if not, says why."""
    config = read(run).config if (run / "config.yaml").is_file() else None
    dtype = "float32" if config is None else config.model.dtype
    if device is not None:
        Placement.enter(PlacementConfig(device), dtype)
    elif config is not None and config.placement.device == "cuda":
        try:
            Placement.enter(config.placement, dtype)
        except MetronomeError as error:
            print(f"The run was on a GPU; the audit is not, and so under another contract: {error}")


def measure(given: Path, out: Path | None, device: Device | None) -> Verdict:
    """The invariance matrix of a checkpoint (a step's folder or the model folder in it), into RUN/audit; returns the
    verdict on our kernels."""
    folder = given / "model" if (given / "model").is_dir() else given
    run = next((p for p in folder.resolve().parents if (p / "config.yaml").is_file()), folder.resolve().parent)
    enter_placement(run, device)
    from rl.study import matrix  # with all that it measures against: only where it is asked for

    with locked(out or run / "audit"):
        result = matrix.run(folder, out or run / "audit")
    return matrix.show(result.tables)


def parser() -> Parser:
    parser = Parser("rl.audit", "Says whether sampler and learner are equal.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--run", type=Path, metavar="RUN", help="a run's folder; the report goes to RUN/audit")
    what.add_argument(
        "--compare", type=Path, nargs=2, metavar=("RUN_A", "RUN_B"), help="are these one run, bit for bit?"
    )
    what.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a checkpoint's folder, with --matrix")
    parser.add_argument(
        "--matrix", action="store_true", help="measure what the checkpoint's log-probs are invariant to"
    )
    parser.add_argument("--out", type=output_folder(), metavar="FOLDER", help="where --compare and --matrix write")
    parser.add_argument(
        "--trust-families", action="store_true", help="import the modules of families that a run's recipe names"
    )
    add_device(parser)
    parser.set_defaults(device=None)  # where the run was
    add_fail_on(parser)
    return parser
