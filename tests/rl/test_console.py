"""``metronome``: lists its verbs, imports for the chosen one only, hands arguments through."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kernels.errors import MetronomeError
from model.program import shipped
from model.program.recipe import read_recipe
from rl import console
from rl.config import TrainConfig

ROOT = Path(__file__).resolve().parents[2]


def metronome(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rl.console", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_verb_names_a_command() -> None:
    for verb in console.VERBS.values():
        spec = importlib.util.find_spec(verb.module)
        assert spec is not None and spec.origin is not None, verb.module
        source = Path(spec.origin)
        main = source.parent / "__main__.py" if source.name == "__init__.py" else source
        assert '__name__ == "__main__"' in main.read_text(), verb.module
        assert verb.launcher is None or shipped.shipped(verb.launcher) is not None


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_has_a_line_a_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    console.main(arguments)
    said = capsys.readouterr().out.splitlines()
    for name, verb in console.VERBS.items():
        assert [line for line in said if line.split()[:1] == [name] and line.endswith(verb.line)]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from rl import console; console.main(['--help']); "
        "assert not {'torch', 'numpy', 'accelerate', 'rich', 'model.program.recipe'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_an_unknown_verb_is_an_error() -> None:
    done = metronome("trian")
    assert done.returncode == 2 and done.stderr.startswith("error: no verb 'trian'; choose one of train, audit")
    assert metronome("--launch", "accelerate/cpu", "audit").returncode == 2


def test_arguments_go_through_and_so_does_the_status(tmp_path: Path) -> None:
    done = metronome("info", "--preset", "tiny", "--max-tokens", "100", cwd=tmp_path)
    assert done.returncode == 0 and "up to 100 rows" in done.stdout
    refused = metronome("show", str(tmp_path / "nothing"), cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and "nothing" in refused.stderr


def test_training_is_launched_with_the_shipped_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[list[str]] = []

    class Begun(Exception):
        pass

    def become(_: str, command: list[str]) -> None:
        begun.append(command)
        raise Begun

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "execv", become)
    with pytest.raises(Begun):
        console.main(["train", "--rl.steps", "3"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        console.main(["--launch", "mine.yaml", "train"])
    assert capsys.readouterr().err.startswith("error: --launch mine.yaml: there is no such file")
    Path("mine.yaml").write_text("num_processes: 1\n")
    with pytest.raises(Begun):
        console.main(["--launch", "mine.yaml", "train"])
    first, second = begun
    at = first.index("--config_file")
    assert yaml.safe_load(Path(first[at + 1]).read_text())["num_processes"] == 2
    assert first[at + 2 :] == ["-m", "rl.train", "--rl.steps", "3"] and second[at + 1] == "mine.yaml"


def test_on_a_gpu_one_process_trains_without_a_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shipped configuration has two processes, and each takes a GPU of its own."""
    begun: list[str] = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "execv", lambda _, command: begun.append("launcher"))
    monkeypatch.setattr(console.runpy, "run_module", lambda module, **_: begun.append(module))

    def last(*arguments: str) -> str:
        begun.clear()
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.setattr(sys, "argv", [])
        console.main(arguments)
        return begun[0]

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("placement:\n  device: cuda\n")
    assert last("train", "--placement.device", "cuda") == last("train", "--config", str(recipe)) == "rl.train"
    assert last("reward-train", "--placement.device=cuda", "--resume") == "reward.train"
    assert last("--launch", "accelerate/gpus", "train", "--placement.device", "cuda") == "launcher"
    assert last("train", "--config", str(recipe), "--placement.device", "cpu") == "launcher"
    assert last("train", "--placement.device", "cuda", "no option") == last("train") == "launcher"


def test_a_shipped_recipe_is_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (["--config", "reward_backbone"], ["--config=reward_backbone"]):
        assert read_recipe("rl.train", "", TrainConfig, given).config.name == "reward_backbone"
    assert "quickstart" in shipped.names()


def test_a_file_of_that_name_comes_first_and_no_recipe_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("name: mine\n")
    assert read_recipe("rl.train", "", TrainConfig, ["--config", "quickstart"]).config.name == "mine"
    for name in ("quickstrat", "../pyproject", "accelerate"):
        assert shipped.shipped(name) is None
        with pytest.raises(MetronomeError, match="recipe"):
            read_recipe("rl.train", "", TrainConfig, ["--config", name])
