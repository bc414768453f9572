"""`--resume` from a checkpoint that is not what the run saved: refused in one line before anything is written or read
further, and the checkpoint before it is named. Nothing that lies in a run's folder is executed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernels.errors import MetronomeError
from model.backbone.transformer import InteractionModel
from model.program.reading import read_json
from model.program.startup import prepare_process
from model.weights import manifest
from model.weights.checkpoint import weights_digest
from rl import run as run_module
from rl.config import TrainConfig
from rl.environment import computing
from rl.evaluate import HeldOut
from rl.folder import RunFolder
from rl.resume import Progress, save
from rl.run import Run, build_model
from rl.step.identity import Mismatch
from rl.train import parse
from tests.model.damage import DAMAGES, OPTIMIZER, Payload, edit_manifest, pickle_beside


class SavedLearner:
    """As much of a learner as a checkpoint takes."""

    def __init__(self, model: InteractionModel) -> None:
        self.model = model

    def save(self, folder: Path) -> None:
        (folder / OPTIMIZER).parent.mkdir()
        save_file({"exp_avg/lm_head.weight": self.model.lm_head.weight.detach().clone()}, folder / OPTIMIZER)
        (folder / "learner" / "state.json").write_text("{}")


def recipe(runs: Path) -> tuple[TrainConfig, bool, str]:
    return parse(["--runs", str(runs), "--name", "whole", "--model.preset", "nano", "--resume", "true"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with a run that was interrupted after step 4; its checkpoints written as a run writes them."""
    runs = tmp_path_factory.mktemp("runs")
    config, _, text = recipe(runs)
    folder = RunFolder.create(runs, config.name, text)
    folder.write_json("environment.json", computing())
    model = build_model(config)
    for step in (0, 2, 4):
        with torch.no_grad():
            model.lm_head.weight += 1.0
        progress = Progress(step, HeldOut({"": 0.5}, {}), Mismatch.total([]), 1.0, (), 1)
        save(folder, SavedLearner(model), progress)  # type: ignore[arg-type]
        for taken in range(len(folder.metrics()), step):
            folder.append_metrics({"step": taken, "weights_digest": weights_digest(model)})
    return runs


@pytest.fixture
def runs(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Itself, put back afterwards: its path is in the recipe."""
    kept = Path(shutil.copytree(made, made.with_name(f"{made.name}_kept"), dirs_exist_ok=True))
    monkeypatch.setattr(run_module, "environment", lambda: computing() | {"machine": "another one"})
    yield made
    shutil.rmtree(made)
    kept.rename(made)


def resumed(runs: Path) -> Run:
    config, resume, text = recipe(runs)
    return Run(config, text, resume)


def refused(runs: Path) -> str:
    with pytest.raises(MetronomeError) as error:
        resumed(runs)
    written = read_json(runs / "whole" / "environment.json")
    assert "machine" not in written, "something was written before the check"
    assert not list(runs.rglob("EXECUTED"))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_undamaged_one_is_taken(runs: Path) -> None:
    folder = RunFolder.reopen(runs, "whole")
    newest = folder.checkpoint_to_resume()
    assert newest is not None
    step, path = newest
    assert (step, path.name) == (4, "step_000004")
    files = json.loads((path / manifest.MANIFEST).read_text())["files"]
    assert list(files) == [
        "learner/optimizer.safetensors", "learner/state.json", "model/README.md", "model/config.json",
        "model/model.safetensors", "model/tokenizer.json", "model/tokenizer_config.json", "progress.json",
    ]  # fmt: skip
    assert resumed(runs).folder.metrics() == folder.metrics()


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_every_damage_is_refused_by_name(runs: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(runs / "whole/checkpoints/step_000004")
    said = refused(runs)
    assert re.search(says, said) and "whole is step_000002: to resume from it, move step_000004 away" in said
    shutil.rmtree(runs / "whole/checkpoints/step_000004")  # which is what the message says helps
    newest = RunFolder.reopen(runs, "whole").checkpoint_to_resume()
    assert newest is not None and newest[0] == 2


def test_a_file_beside_is_refused_and_never_executed(runs: Path) -> None:
    pickle_beside(runs / "whole/checkpoints/step_000004")
    assert "remove that file" in refused(runs)


def test_a_run_that_was_moved_keeps_its_checkpoints(runs: Path) -> None:
    """Name and place are not the recipe's sense; another seed, the control, is."""
    path, text = runs / "whole/checkpoints/step_000004", recipe(runs)[2]
    manifest.check(path, recipe=text.replace("name: whole", "name: other").replace(str(runs), "/elsewhere"))
    with pytest.raises(MetronomeError, match="saved by a run of another recipe"):
        manifest.check(path, recipe=text.replace("seed: 0", "seed: 1"))


def test_a_checkpoint_of_another_runs_recipe(runs: Path) -> None:
    edit_manifest(runs / "whole/checkpoints/step_000004", lambda content: content | {"recipe": "0" * 64})
    assert "saved by a run of another recipe" in refused(runs)


def test_a_step_that_is_not_the_folders_is_refused_even_in_a_forged_manifest(runs: Path) -> None:
    path = runs / "whole/checkpoints/step_000004"
    shutil.copy(path.with_name("step_000002") / "progress.json", path / "progress.json")
    manifest.write(path, path.name, recipe(runs)[2])
    run = resumed(runs)
    with pytest.raises(MetronomeError, match=r"progress\.json: says step 2, in the checkpoint of step 4"):
        run.resume(4, path)


def test_torch_executes_nothing_even_if_a_library_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace, file = tmp_path / "EXECUTED", tmp_path / "optim_states.pt"
    torch.save({"tensor": torch.ones(2), "extra": Payload(trace)}, file)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    torch.load(file)
    assert trace.exists(), "the control: the payload works"
    trace.unlink()
    prepare_process()
    for explicit in ({}, {"weights_only": False}):
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(file, **explicit)
    assert not trace.exists()
