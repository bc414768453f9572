"""The shape of the project: imports point one way, names shadow nothing, every recipe parses."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["kernels", "model", "rollout", "reward", "rl"]
RECIPES = sorted(p for p in (ROOT / "configs").glob("*.y*ml"))


def modules() -> list[Path]:
    return sorted(p for package in ORDER for p in (ROOT / package).rglob("*.py"))


def upward_imports(source: str, package: str) -> list[str]:
    """Imports, at any depth of ``source``, of packages that stand above ``package``, and relative ones."""
    above = set(ORDER[ORDER.index(package) + 1 :])
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module and not node.level else ["." * node.level]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [
            f"line {node.lineno}: {name}" for name in names if name.startswith(".") or name.split(".")[0] in above
        ]
    return found


def allowed(path: Path, found: str) -> bool:
    """The commands in package kernels start, read options and write as every other one does (`model.program`). They
    are programs that use the kernels; no kernel imports them."""
    command = path.name == "gpu_report.py" or path.parent.name == "tools"
    return command and path.is_relative_to(ROOT / "kernels") and ": model.program." in found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    upward = upward_imports(path.read_text(), path.relative_to(ROOT).parts[0])
    assert [found for found in upward if not allowed(path, found)] == []


def test_only_commands_among_the_kernels_may_use_the_program() -> None:
    wanted = "line 1: model.program.files"
    assert allowed(ROOT / "kernels/tools/bench.py", wanted)
    assert not allowed(ROOT / "kernels/ops.py", wanted)
    assert not allowed(ROOT / "kernels/tools/bench.py", "line 1: model.config")
    assert not allowed(ROOT / "model/tools/bench.py", wanted)


def test_no_kernel_imports_a_command() -> None:
    library = [p for p in (ROOT / "kernels").rglob("*.py") if p.parent.name != "tools" and p.name != "gpu_report.py"]
    for path in library:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if name.startswith(("kernels.tools", "kernels.gpu_report"))], path


@pytest.mark.parametrize(
    "source",
    [
        "import rl.step.loop",
        "from rollout.engines.session import Session",
        "def f():\n    import reward",
        "from . import x",
    ],
)
def test_upward_import_is_seen(source: str) -> None:
    assert upward_imports(source, "model")


def test_nothing_is_named_after_the_standard_library() -> None:
    top = [p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert not set(top) & sys.stdlib_module_names


def test_package_markers_are_empty() -> None:
    assert [p for p in modules() if p.name == "__init__.py" and p.read_text()] == []


def test_every_folder_of_modules_is_a_package() -> None:
    """setuptools leaves out a folder without ``__init__.py``: it would work here and be missing after an install."""
    assert [p for p in modules() if not (p.parent / "__init__.py").exists()] == []


def test_recipes_exist() -> None:
    assert ROOT / "configs/quickstart.yaml" in RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_recipe_parses(path: Path) -> None:
    from model.program.recipe import read_recipe
    from reward.evaluate import EvaluateConfig
    from reward.pairs import PairsConfig
    from reward.train import RewardTrainConfig
    from rl.config import TrainConfig

    commands = {"reward_backbone": TrainConfig, "reward_pairs": PairsConfig, "reward_evaluate": EvaluateConfig}
    commands |= {"reward_pairs_again": PairsConfig}
    kind = commands.get(path.stem, RewardTrainConfig if path.stem.startswith("reward_") else TrainConfig)
    required = ["--json", "report.json"] if kind is EvaluateConfig else []
    read_recipe("command", "", kind, ["--config", str(path), *required])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda p: p.name)
def test_launcher_config_parses(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    expected = "NO" if path.stem == "reward" else "DEEPSPEED"
    assert load_config_from_file(str(path)).distributed_type.value == expected


def test_kernels_is_ours() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "import kernels.ops; print(kernels.ops.__file__)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    assert Path(found) == ROOT / "kernels/ops.py"


def test_readme_opens_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    run = (
        "pip install -e . && accelerate launch --config_file configs/accelerate/cpu.yaml -m rl.train "
        "--config configs/quickstart.yaml"
    )
    first, second = text.find(f"    {run}\n"), text.find("    pip install -e '.[test]' && pytest\n")
    assert 0 < first < second < 1500


def test_hooks_are_local() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
