"""No library decides a bit on the way from a recording to a weight: a scan of the sources on that way.

libm, MKL, BLAS and the vector code of numpy and torch round their transcendental functions and order their sums by
processor and version. So these sources may use single IEEE operations (+ - * / of elements, numpy's and math's square
root), integers, `math.fsum`, `decimal`, and what `kernels` defines; anything else stands in `ALLOWED` with its reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("kernels", "model", "rollout", "reward", "rl")
_LEARNED = tuple(f"learned/{name}.py" for name in ("calibrate", "human", "preference"))


def _files(package: str, *left_out: str) -> list[str]:
    """A package's sources with those of its rooms; ``left_out``: files and rooms that decide no bit of a weight."""
    paths = sorted(str(p.relative_to(ROOT)) for p in (ROOT / package).rglob("*.py") if p.name != "__init__.py")
    return [p for p in paths if not any(p == f"{package}/{x}" or p.startswith(f"{package}/{x}/") for x in left_out)]


SCANNED = [
    *(f"kernels/{name}.py" for name in ("exact", "fourier", "dmel", "reference/dmel", "noise", "reference/noise")),
    *(f"kernels/{name}.py" for name in ("adamw", "layout", "ops")),
    *_files("kernels/cpu", "library.py"),
    *_files("model", "info.py", "program", "voice/sound.py"),  # what is heard; targets come from voice/mel.py
    *_files("rollout", "bench", "engines/vllm", "record/timeline.py", "show.py"),
    *_files("reward", "study", "evaluate.py", "hacks.py", "pairs.py", "explain.py", "voice/table.py", *_LEARNED),
    *_files("rl/step"),
    *_files("rl/learner"),
    "rl/warmstart.py",
    "rl/minimal.py",
    "rl/reference.py",
]

TRANSCENDENTAL = (
    "exp exp2 expm1 log log2 log10 log1p pow power float_power cbrt hypot "
    "sin cos tan asin acos atan atan2 arcsin arccos arctan arctan2 sinc sinh cosh tanh erf erfc erfinv gamma lgamma "
    "sigmoid logsigmoid softmax log_softmax logsumexp logaddexp logcumsumexp softplus gelu silu elu selu mish rsqrt"
)
PRODUCTS = (
    "fft linalg matmul mm bmm mv addmm addmv addbmm baddbmm dot vdot inner outer einsum tensordot convolve correlate "
    "conv1d conv2d linear scaled_dot_product_attention cdist cov corrcoef optim hann_window hamming_window"
)
SUMS = (
    "sum nansum mean nanmean average std var norm vector_norm trace cumsum cumprod prod trapezoid fmean "
    "median quantile percentile"
)
FUSED = "lerp addcmul addcdiv"  # some builds fuse the product and the sum
RANDOM = (
    "normal standard_normal randn randn_like exponential standard_exponential gumbel laplace lognormal standard_gamma "
    "poisson binomial beta"
)
REFUSED = frozenset(" ".join((TRANSCENDENTAL, PRODUCTS, SUMS, FUSED, RANDOM)).split())

Place = tuple[str, str, str]  # file, function, what


@dataclass(frozen=True)
class Found:
    function: str  # "Class.method"; "" outside of functions
    what: str  # the refused name, "**", "@" or "builtin sum"
    line: int


def refused(source: str) -> list[Found]:
    """What a source uses that a library may round or order in its own way."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}  # local name -> the module or object that an import bound to it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return list(_walk(tree, "", modules))


def _walk(node: ast.AST, function: str, modules: dict[str, str]) -> Iterator[Found]:
    for child in ast.iter_child_nodes(node):
        if what := _what(child, modules):
            yield Found(function, what, getattr(child, "lineno", 0))
        inner = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{function}.{child.name}".lstrip(".")
        yield from _walk(child, inner, modules)


def _what(node: ast.AST, modules: dict[str, str]) -> str | None:
    match node:
        case ast.BinOp(op=ast.MatMult()) | ast.AugAssign(op=ast.MatMult()):
            return "@"
        case ast.BinOp(op=ast.Pow(), left=ast.Constant(value=int()), right=ast.Constant(value=int())):
            return None
        case ast.BinOp(op=ast.Pow()) | ast.AugAssign(op=ast.Pow()):
            return "**"
        case ast.Call(func=ast.Name(id="sum" | "pow" as name)) if name not in modules:
            return f"builtin {name}"  # Python 3.12 sums floats with compensation, 3.11 does not
        case ast.Call(func=ast.Attribute(attr="add" | "add_" | "sub" | "sub_" | "_foreach_add_"), keywords=keywords):
            return "alpha" if any(k.arg == "alpha" for k in keywords) else None
        case ast.Call(func=ast.Attribute(value=value, attr=attr)) if _module(value, modules) is None:
            # A method of some value; one of ours when it is called on self.
            return None if isinstance(value, ast.Name) and value.id == "self" else _name(attr, None)
        case ast.Attribute(value=value, attr=attr) if module := _module(value, modules):
            return _name(attr, module)
        case ast.ImportFrom(module=str(module), names=names):
            return next((what for a in names if (what := _name(a.name, module))), None)
    return None


def _module(value: ast.expr, modules: dict[str, str]) -> str | None:
    """The module (or imported object) that an expression names, or None for any other value."""
    match value:
        case ast.Name(id=name):
            return modules.get(name)
        case ast.Attribute(value=inner, attr=attr):
            return f"{module}.{attr}" if (module := _module(inner, modules)) else None
    return None


def _name(attr: str, module: str | None) -> str | None:
    """The refused name behind an attribute of ``module`` (None: a method), if it is one."""
    if module and module.split(".")[0] in OURS:
        return None
    name = attr.removeprefix("_foreach_").rstrip("_")
    if name == "sqrt":
        return None if module in ("numpy", "math") else name  # IEEE 754 rounds these; torch's are MKL's
    return name if name in REFUSED else None


DECIMAL = "of Decimal, which rounds correctly"
INTEGERS = "of integers"
RECORD = "a number for metrics.jsonl; nothing is learned from it"
ALLOWED: dict[Place, str] = {
    ("kernels/exact.py", "power_of_ten", "**"): DECIMAL,
    ("kernels/exact.py", "exp", "exp"): DECIMAL,
    ("kernels/exact.py", "_atan_of_inverse", "**"): DECIMAL,
    ("kernels/exact.py", "_unit", "**"): DECIMAL,
    ("kernels/layout.py", "Segments.build", "builtin sum"): INTEGERS,
    ("kernels/layout.py", "PackedLinear.build", "builtin sum"): INTEGERS,
    ("kernels/layout.py", "PackedExperts.build", "builtin sum"): INTEGERS,
    ("kernels/ops.py", "linear", "linear"): "ours, called through the backend",
    ("kernels/ops.py", "gelu", "gelu"): "ours, called through the backend",
    ("kernels/ops.py", "dot", "dot"): "ours, called through the backend",
    ("model/senses/audio.py", "mel_filters", "exp"): DECIMAL,
    ("model/inputs.py", "Inputs.part", "builtin sum"): INTEGERS,
    ("rollout/engines/session.py", "Session.frames_since", "builtin sum"): INTEGERS,
    ("model/senses/video.py", "Patches.part", "cumsum"): INTEGERS,
    ("model/senses/video.py", "Patches.steps", "cumsum"): INTEGERS,
    ("model/senses/video.py", "Frames.chunks", "builtin sum"): INTEGERS,
    ("model/weights/draws.py", "near_normal", "sum"): INTEGERS,
    ("model/weights/finite.py", "_not_finite", "builtin sum"): INTEGERS,
    ("model/weights/renames.py", "shape_of", "builtin sum"): INTEGERS,
    ("model/backbone/size.py", "weight_bytes", "builtin sum"): INTEGERS,
    ("model/backbone/size.py", "pack_bytes", "builtin sum"): INTEGERS,
    ("model/backbone/size.py", "TrainingBytes.total", "builtin sum"): INTEGERS,
    ("model/backbone/size.py", "training_bytes", "builtin sum"): INTEGERS,
    ("model/backbone/size.py", "zero_bytes", "builtin sum"): INTEGERS,
    ("model/sizing.py", "predicting_parameters", "builtin sum"): INTEGERS,
    ("model/sizing.py", "of_release", "builtin sum"): INTEGERS,
    ("model/backbone/state.py", "state_bytes", "builtin sum"): INTEGERS,
    ("model/backbone/state.py", "SessionState.global_pages_freed", "builtin sum"): INTEGERS,
    ("model/backbone/state.py", "state_parts", "builtin sum"): INTEGERS,
    ("model/backbone/state.py", "state_parts", "prod"): INTEGERS,
    ("model/backbone/state.py", "SessionState.extend", "builtin sum"): INTEGERS,
    ("rollout/engines/embedded.py", "SessionEngine._rows_to_sample", "builtin sum"): INTEGERS,
    ("rollout/scenarios/timespeak.py", "_nearly_normal", "builtin sum"): INTEGERS,
    ("reward/rules/turn_taking.py", "floor_items.takes", "builtin sum"): INTEGERS,
    ("reward/rules/timing.py", "take_over_rate", "builtin sum"): INTEGERS,
    ("reward/rules/content.py", "right_places", "builtin sum"): INTEGERS,
    ("reward/learned/corrupt.py", "corrupt", "builtin sum"): INTEGERS,
    ("rl/step/credit.py", "token_weights", "builtin sum"): INTEGERS,
    ("kernels/adamw.py", "AdamW", "optim"): "the class that DeepSpeed asks for; its update is an op of ours",
    ("reward/learned/prefixes.py", "last_hidden", "builtin sum"): INTEGERS,
    ("reward/learned/trainable.py", "Collator.batch", "builtin sum"): INTEGERS,
    (
        "reward/learned/graded.py",
        "GradedTrainer.compute_loss",
        "mean",
    ): "its value is not used; each term's gradient is 1 / P",
    (
        "reward/learned/corrupt.py",
        "Expert.of",
        "quantile",
    ): "two of the sorted values and one product and sum of elements",
    ("reward/train.py", "train", "builtin sum"): INTEGERS,
    ("reward/learned/graded.py", "GradedTrainer.training_step", "mean"): RECORD,
    ("reward/learned/settings.py", "optimizer", "optim"): "a field of TRL's arguments",
    ("rl/step/loop.py", "rewards", "sum"): RECORD,
    ("rl/step/identity.py", "Mismatch.total", "builtin sum"): RECORD,
    ("rl/step/identity.py", "compare", "sum"): RECORD,
    ("rl/step/identity.py", "compare", "expm1"): RECORD,
    ("rl/step/tree.py", "mean", "builtin sum"): INTEGERS,
    ("rl/warmstart.py", "likelihood", "builtin sum"): INTEGERS,
    ("rl/warmstart.py", "_mean_loss", "sum"): RECORD,
    ("rl/warmstart.py", "_mean_loss", "builtin sum"): RECORD,
    ("rl/reference.py", "metrics", "sum"): RECORD,
    ("rl/reference.py", "metrics", "expm1"): RECORD,
    ("rl/reference.py", "metrics", "builtin sum"): RECORD,
}
"""Each place that the scan finds and that may stay, with the reason."""


def places(file: str) -> dict[Place, list[int]]:
    found: dict[Place, list[int]] = {}
    for one in refused((ROOT / file).read_text()):
        found.setdefault((file, one.function, one.what), []).append(one.line)
    return found


@pytest.mark.parametrize("file", SCANNED)
def test_nothing_unaccounted_for(file: str) -> None:
    unknown = {
        f"{file}:{lines[0]}: {place[2]} in {place[1] or 'the module'}"
        for place, lines in places(file).items()
        if place not in ALLOWED
    }
    assert not unknown, f"may give other bits on another processor: {sorted(unknown)}"


def test_every_allowance_is_needed() -> None:
    used = {place for file in SCANNED for place in places(file)}
    assert not set(ALLOWED) - used, "no longer there: take these out of ALLOWED"


REFUSED_SOURCES = {
    "import numpy as np\ny = np.exp(x)": "exp",
    "import numpy as np\ny = np.log10(x)": "log10",
    "import numpy as np\ny = np.fft.rfft(x)": "fft",
    "import numpy as np\ny = map(np.sin, x)": "sin",
    "import numpy\ny = numpy.linalg.norm(x)": "norm",
    "import torch\ny = torch.sqrt(x)": "sqrt",
    "import torch\ny = x._foreach_sqrt_()": "sqrt",
    "y = x.sqrt_()": "sqrt",
    "y = x.float().mean(1)": "mean",
    "y = self.x.sum()": "sum",
    "y = sum(x)": "builtin sum",
    "y = x**0.5": "**",
    "y = a @ b": "@",
    "import math\ny = math.pow(x, 2)": "pow",
    "from math import exp\ny = exp(x)": "exp",
    "from torch.nn import functional as F\ny = F.softmax(x, -1)": "softmax",
    "y = x.addcdiv_(a, b)": "addcdiv",
    "y = x.add_(a, alpha=0.1)": "alpha",
    "y = rng.standard_normal(3)": "standard_normal",
    "y = rng.normal(1.0, 0.1)": "normal",
    "import torch\ny = torch.optim.AdamW(p)": "optim",
}
ACCEPTED_SOURCES = [
    "import numpy as np\ny = np.sqrt(x) + np.maximum(a * b, c / d)",
    "import math\ny = math.sqrt(2) + math.fsum(x)",
    "from kernels import exact\ny = exact.exp(x) + exact.total(z)",
    "from kernels import ops\ny = ops.linear(x, w)",
    "y = 2**31",
    "y = self.norm(x)",
    "y = x.add_(a)",
    "@decorated\ndef sum_of_squares(): pass",
]


@pytest.mark.parametrize("source", REFUSED_SOURCES, ids=lambda s: s.splitlines()[-1])
def test_control_refused(source: str) -> None:
    inside = "class A:\n    def f(self, x):\n" + "".join(f"        {line}\n" for line in source.splitlines())
    for text, function in ((source, ""), (inside, "A.f")):
        found = refused(text)
        assert REFUSED_SOURCES[source] in {one.what for one in found}, found
        assert all(one.function == function for one in found)


@pytest.mark.parametrize("source", ACCEPTED_SOURCES)
def test_control_accepted(source: str) -> None:
    assert refused(source) == []
