"""The shape of the package: which way imports point, and what importing it loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "supcon_jax"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = [  # each may import from those before it
    {"losses", "terminal"},
    {"models", "data", "optimizers", "momentum", "config", "metrics"},
    {"objectives", "fitting", "state", "parallel", "micro_batches", "programs"},
    {"steps", "validation", "checkpoints", "summary_writer", "interruption", "workdir"},
    {"logs", "evaluation"},
    {"command"},
    {"report", "stages", "profiling"},
    {"plan", "trained"},
    {"train", "inference"},
    {"embed", "doctor", "export"},
    {"predict", "search"},
    {"transfer"},
    {"suites"},
    {"evaluate", "explore", "__main__"},
]


def part(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file):
    """Modules that a file imports at any depth, as dotted names."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_imports(file):
    names = [name.split(".") for name in imported(file) if name.startswith("supcon_jax.")]
    return {name[1] for name in names} - {part(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    if file == PACKAGE / "__init__.py":
        assert own_imports(file) == {"losses"}
        return
    level = next(i for i, layer in enumerate(LAYERS) if part(file) in layer)
    assert own_imports(file) <= set().union(*LAYERS[:level])


def test_losses_and_augmentations_stand_alone():
    for file in [*PACKAGE.glob("losses/*.py"), PACKAGE / "data" / "augment.py"]:
        assert not own_imports(file)


def test_only_its_own_modules_import_a_library():
    owners = {
        "clu": {"logs.py", "summary_writer.py"},
        "orbax": {"checkpoints.py"},
        "ml_collections": {
            "config.py",
            "evaluate.py",
            "fitting.py",
            "validation.py",
            "plan.py",
            "stages.py",
            "train.py",
            "trained.py",
            "transfer.py",
        },
        "flax": {"resnet.py", "vit.py", "heads.py", "build.py", "torch_weights.py", "state.py"},
        "absl": {"train.py", "command.py", "logs.py"},
    }
    for library, allowed in owners.items():
        users = {
            file.name
            for file in FILES
            if any(re.match(rf"{library}(\.|$)", name) for name in imported(file))
        }
        assert users <= allowed, library


def test_importing_the_package_loads_jax_and_nothing_heavier():
    code = "import sys, supcon_jax; print(*{name.split('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(run.stdout.split())
    assert "jax" in loaded
    heavy = {"tensorflow", "flax", "optax", "orbax", "clu", "grain", "sklearn", "ml_collections"}
    assert not loaded & heavy


def test_configuration_has_no_hidden_fields():
    """Every option is a field of `config.base()`: none is read with a default elsewhere."""
    for file in FILES:
        assert not re.search(r"config\w*(\.\w+)*\.get\(", file.read_text()), file


def test_stages_are_data():
    """No `if stage == ...`: what a stage does is in its configuration."""
    for file in FILES:
        assert not re.search(r"""stage(\.name)? ==|== ["'](supcon|linear|simclr)["']""",
                             file.read_text()), file  # fmt: skip


def test_pictures_do_not_touch_pyplot():
    """Its state is the user's: in a notebook, another backend hides all later pictures."""
    for file in FILES:
        assert not re.search(r"matplotlib\.use|pyplot", file.read_text()), file


def test_functions_stay_small():
    sizes = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                sizes[f"{file.name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert sizes["train.py:train_and_evaluate"] <= 100
    lengths = sorted(sizes.values())
    assert lengths[len(lengths) // 2] <= 20


def test_a_step_is_understood_from_four_files():
    names = ("steps.py", "objectives.py", "losses/supcon.py", "models/heads.py")
    lines = [line for name in names for line in (PACKAGE / name).read_text().splitlines()]
    assert len([line for line in lines if line.strip()]) < 600
