"""How the commands behave in a terminal."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

COMMANDS = (
    "train",
    "evaluate",
    "embed",
    "predict",
    "search",
    "explore",
    "export",
    "report",
    "doctor",
    "data.prepare",
)


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        text=True,
        cwd=ROOT,
        check=False,
        capture_output=True,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_of_80_by_24(name):
    done = run("-m", f"supcon_jax.{name}", "--help")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert len(lines) <= 24 and max(map(len, lines)) < 80
    assert f"python -m supcon_jax.{name}" in done.stdout


def test_help_of_the_training_has_every_flag_and_recipe():
    text = run("-m", "supcon_jax.train", "--help", "--config=digits").stdout
    source = ast.parse((ROOT / "supcon_jax" / "train.py").read_text())
    defined = [
        node.args[0].value
        for node in ast.walk(source)
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("flags.DEFINE_")
    ]
    assert len(defined) > 8
    assert set(re.findall(r"--(\w+)", text)) == {*defined, "config"}
    names = re.search(r"NAME: (.*)RECIPE: (.*)", text, re.DOTALL)
    listed = [re.findall(r"\w+", part) for part in names.groups()]
    assert listed[0] == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert "simclr" in listed[1]


def test_every_console_script_is_a_command_that_exists():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for script, place in project["scripts"].items():
        module, function = place.split(":")
        assert module == f"supcon_jax.{script.removeprefix('supcon-')}"
        names = [
            node.name
            for node in ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()).body
            if isinstance(node, ast.FunctionDef)
        ]
        assert function in names


def test_a_reader_that_has_seen_enough_is_no_error():
    code = """
from supcon_jax import command
with command.running(debug=False):
    for line in range(100_000):
        print("a line of a long table")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout.readline() == b"a line of a long table\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (141, b"")


@pytest.mark.parametrize(
    ("error", "start"),
    [
        ("np.empty(2**60, np.uint8)", "error: Unable to allocate 1.00 EiB for an array"),
        ("raise_(MemoryError())", "error: out of memory. Less is needed"),
        (
            "raise_(jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory.\\nBuffers:'))",
            "error: RESOURCE_EXHAUSTED: Out of memory. Less is needed",
        ),
    ],
)
def test_too_little_memory_is_one_line_with_what_helps(error, start):
    code = f"""
import jax, numpy as np
from supcon_jax import command

def raise_(error):
    raise error

with command.running(debug=False):
    {error}
"""
    done = run("-c", code)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(start)
    assert " batch_size, --config.evaluation.batch_size " in line
    assert line.endswith("the same command with --plan --memory_gb=GB tells what fits")


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"doctor", "data.prepare"}))
def test_a_command_of_the_install_for_the_loss_alone_names_the_remedy(name):
    code = f"""
import runpy, sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname.split(".")[0] in TRAIN:
            raise ModuleNotFoundError(f"No module named '{{fullname}}'")

TRAIN = (
    "absl bokeh clu cv2 flax grain matplotlib ml_collections optax orbax PIL pyarrow safetensors "
    "sklearn tensorboard tensorflow_datasets tqdm"
).split()
sys.meta_path.insert(0, Missing())
runpy.run_module("supcon_jax.{name}", run_name="__main__")
"""
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (1, "")
    expected = "error: only the loss is installed here; the commands need supcon-jax[train]\n"
    assert done.stderr == expected
