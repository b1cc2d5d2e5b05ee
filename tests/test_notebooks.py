"""The notebooks run from top to bottom at the scale of a CPU, and are kept without outputs."""

import ast
import gc
import importlib
import json
import os
import re
import warnings
import zipfile

import nbformat
import pytest
from conftest import ROOT
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from supcon_jax import config
from supcon_jax.data.prepare import KNOWN
from supcon_jax.embed import read_features

NAMES = ("quickstart_tpu", "loss_tour", "your_data")
FOLDER = "experiments/notebooks"
GITHUB = "github.com/supcon-jax/supcon_jax"
COLAB = f"https://colab.research.google.com/{GITHUB.replace('.com', '')}/blob/main/{FOLDER}"


def read(name):
    return nbformat.read(ROOT / FOLDER / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    """The code of each cell, without what is IPython's."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return [re.sub(r"^( *)%.*$", r"\1pass", source, flags=re.MULTILINE) for source in cells]


def execute(name, folder, **parameters):
    """The notebook, executed in a folder by this interpreter, with other values of parameters."""
    notebook = read(name)
    for place, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", ()):
            assert all(f"{key} = " in cell.source for key in parameters)
            lines = [f"{key} = {value!r}" for key, value in parameters.items()]
            notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
            break
    # without a folder of kernels there is only ipykernel's own: this interpreter
    kernels = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    flags = os.environ["XLA_FLAGS"]  # one device, as most have
    environment = {
        **{key: value for key, value in os.environ.items() if key != "MPLBACKEND"},
        "XLA_FLAGS": re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags),
        "PYTHONPATH": str(ROOT),
    }
    client = NotebookClient(
        notebook, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    with warnings.catch_warnings():  # nbclient leaves sockets to the garbage collector
        warnings.filterwarnings("ignore", "(?i)unclosed", ResourceWarning)
        done = client.execute(env=environment)
        del client, manager
        gc.collect()
    return done


def outputs_of(notebook, kind):
    """Texts that all cells wrote to "stdout" or "stderr", or their pictures ("image/png")."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind == "image/png":
        return [output.data[kind] for output in outputs if kind in output.get("data", {})]
    return "".join(output.text for output in outputs if output.get("name") == kind)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_stripped(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    identifiers = [cell.id for cell in notebook.cells]
    assert len({*identifiers}) == len(identifiers)
    for cell in notebook.cells:
        assert not {*cell.metadata} - {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_short_and_names_no_machine(name):
    notebook = read(name)
    lines = [line for source in code_of(notebook) for line in source.splitlines() if line.strip()]
    assert 0 < len(lines) < 100
    text = "\n".join(cell.source for cell in notebook.cells)
    assert {*re.findall(r"[\"'` ]/\w[\w/]*", text)} <= {'"/content/drive'}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_and_its_links_lead_somewhere(name):
    cells, badge = read(name).cells, f"]({COLAB}/{name}.ipynb)"
    assert badge in cells[0].source
    assert badge in (ROOT / "README.md").read_text()
    text = "\n".join(cell.source for cell in cells)
    paths = re.findall(r"/supcon-jax/supcon_jax/(?:blob|tree)/main/([\w/.]+)", text)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert any(f'"supcon-jax[train] @ git+https://{GITHUB}"' in cell.source for cell in cells) == (
        name != "loss_tour"  # which needs the core installation only
    )


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_imports_is_there(name):
    tree = ast.parse("\n".join(code_of(read(name))))
    found = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("supcon_jax")
        for alias in node.names
    } | {
        ("supcon_jax", node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.value.id == "sj"
    }
    assert found
    for module, attribute in found:
        there = importlib.import_module(module)
        if not hasattr(there, attribute):
            importlib.import_module(f"{module}.{attribute}")


def test_the_data_of_the_quickstart_can_be_prepared():
    (setting,) = {
        name
        for source in code_of(read("quickstart_tpu"))
        for name in re.findall(r'"(cifar\w+)"', source)
    }
    assert config.load(setting).data.name in KNOWN


@pytest.mark.slow
def test_loss_tour(tmp_path):
    done = execute("loss_tour", tmp_path)
    assert len(outputs_of(done, "image/png")) == 7
    told = outputs_of(done, "stdout")
    by_numpy, by_us = re.findall(r"anchor 0: +([\d.]+)|supcon_loss: \[([\d.]+)", told)
    assert float(by_numpy[0]) == pytest.approx(float(by_us[1]), rel=1e-6)
    rows = re.findall(r"^ +\d+" + r" +(-?[\d.]+)" * 5 + "$", told, re.MULTILINE)
    excesses = [float(row[1]) for row in rows]
    assert len(rows) == 6 and excesses == sorted(excesses, reverse=True)
    assert excesses[0] > 1 and excesses[-1] < 0.01
    assert outputs_of(done, "stderr") == ""


@pytest.mark.slow
def test_quickstart(tmp_path):
    done = execute("quickstart_tpu", tmp_path, EPOCHS=12)
    run = tmp_path / "runs" / "quickstart"
    assert json.loads((run / "results.json").read_text())["test"]["top1"] > 0.6
    assert (run / "exported" / "encoder.safetensors").stat().st_size > 1e5
    assert len(outputs_of(done, "image/png")) == 5
    assert "linear probe" in outputs_of(done, "stdout")
    # bars that are drawn over themselves: four lines, two of stages and two of the evaluation
    bars = outputs_of(done, "stderr")
    assert bars.count("\r") > 10 and "WARNING" not in bars
    assert len([line for line in bars.split("\n") if "|" in line]) == 4


@pytest.mark.slow
def test_your_data(tmp_path):
    done = execute("your_data", tmp_path, EPOCHS=20)
    run = tmp_path / "runs" / "mine"
    assert json.loads((run / "results.json").read_text())["test"]["top1"] > 0.25
    assert read_features(run / "features.npz").rows.shape == (1797, 64)
    rows = (run / "classes.csv").read_text().splitlines()
    assert len(rows) == 9 and all("demonstration/digit " in row for row in rows[1:])
    with zipfile.ZipFile(tmp_path / "exported.zip") as archive:
        assert {"encoder.safetensors", "features.stablehlo", "card.json"} <= {*archive.namelist()}
    assert len(outputs_of(done, "image/png")) == 7
    difference = re.search(r"difference: ([\d.e-]+)", outputs_of(done, "stdout"))
    assert float(difference[1]) < 1e-4
    assert "image_size=8" in outputs_of(done, "stdout")
    assert "WARNING" not in outputs_of(done, "stderr")
