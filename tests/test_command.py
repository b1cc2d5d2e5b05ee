"""How the commands behave in a terminal."""

import ast
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from short_runs import small

from supcon_jax import (
    command,
    doctor,
    embed,
    evaluate,
    explore,
    export,
    predict,
    report,
    search,
    terminal,
    train,
)
from supcon_jax.__main__ import COMMANDS
from supcon_jax.data import prepare


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
    assert done.stdout.startswith(("usage: python -m supcon_jax.", "Train and evaluate"))
    assert done.stdout.count("python -m supcon_jax.") >= (1 if name == "doctor" else 2)


def test_the_package_as_a_command_lists_the_commands():
    done = run("-m", "supcon_jax")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    package = ROOT / "supcon_jax"
    commands = {p for p in package.rglob("*.py") if "if __name__ ==" in p.read_text()}
    names = {".".join(p.relative_to(package).with_suffix("").parts) for p in commands}
    assert set(re.findall(r"supcon_jax\.([\w.]+)", done.stdout)) == names - {"__main__"}
    assert "    Class and probability of images, by the classifier of a finished run." in lines
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


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
        assert module in {f"supcon_jax.{name}" for name in COMMANDS}
        assert module.rpartition(".")[2] == script.removeprefix("supcon-")
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


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A finished run, images, and files that are not what they should be."""
    root = tmp_path_factory.mktemp("places")
    train.train_and_evaluate(small(), root / "run", pictures=False)
    (root / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).save(root / "images" / f"{i}.png")
    (root / "plain").write_text("not a folder")
    (root / "w.pth").write_text("no weights")
    features, _ = embed.embed_images(root / "run", [root / "images"])
    moved = {**features.of, "workdir": str(root / "gone")}
    for name, other in (
        ("good", features),
        ("short", features._replace(rows=features.rows[:, :5])),
        ("few", features._replace(paths=features.paths[:1])),
        ("moved", features._replace(of=moved)),
        ("anonymous", features._replace(of={})),
    ):
        embed.write_features(other, root / f"{name}.npz")
    whole = (root / "good.npz").read_bytes()
    (root / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (root / "folder.npz").mkdir()
    results = (root / "run" / "results.json").read_text()
    kept = (root / "run" / "embedding.npz").read_bytes()
    for name, texts in (
        ("damaged", (results[:40], kept)),
        ("bare", ("{}", kept)),
        ("unmapped", (results, None)),
        ("garbled", (results, b"not arrays")),
        ("cut", (results, kept[:300])),
    ):
        (root / name).mkdir()
        (root / name / "results.json").write_text(texts[0])
        (root / name / "metrics.jsonl").write_text("")
        if texts[1] is not None:
            (root / name / "embedding.npz").write_bytes(texts[1])
    return root


EMBED = "--workdir {run} --images {images} --out {new}/x.npz"
PREDICT = "--workdir {run} --images {images}"
BAD = [
    (embed, f"{EMBED} --feature projection", "--feature projection; did you mean --features?; see"),
    (embed, "--workdir {run} --images {images}", "required: --out; see --help"),
    (embed, f"{EMBED} --batch_size x", "--batch_size: invalid int value: 'x'; see --help"),
    (embed, f"{EMBED} --batch_size 0", "batch_size must be at least 1; got 0"),
    (embed, "--workdir {run} --images {images} --out {plain}/x.npz", "cannot write to {plain}: "),
    (embed, "--workdir {run} --images {images} --out {folder.npz}", "is a folder: --out needs"),
    (predict, f"{PREDICT} --batch_size -4", "batch_size must be at least 1; got -4"),
    (predict, f"{PREDICT} --out {{new}}/x.txt", "expected a .csv or .jsonl file; for another name"),
    (predict, f"{PREDICT} --out {{plain}}/x.csv", "cannot write to {plain}: "),
    (predict, f"{PREDICT} --format xml", "argument --format: invalid choice: 'xml'"),
    (
        search,
        "--query {images}/0.png --index {good.npz} --count 0",
        "count must be at least 1; got",
    ),
    (search, "--query {images}/9.png --index {good.npz}", "9.png: there is no such file"),
    (search, "--query {images} --index {good.npz}", "{images}: a folder, not an image"),
    (search, "--query {images}/0.png --index {short.npz}", "the index has 5: embed the images aga"),
    (search, "--query {images}/0.png --index {few.npz}", "few.npz is not a file of features of"),
    (search, "--query {images}/0.png --index {cut.npz}", "cut.npz is not a file of features of"),
    (search, "--query {images}/0.png --index {anonymous.npz}", "is not a file of features of"),
    (search, "--query {images}/0.png --index {moved.npz}", "/gone: say where it is by --workdir"),
    (explore, "--workdir {run} --out {new}/page.pdf", "page.pdf: expected an .html file"),
    (explore, "--workdir {run} --out {plain}/page.html", "cannot write to {plain}: "),
    (explore, "--workdir {images}", "no finished run in {images}"),
    (export, "--workdir {run} --out {plain}/new", "cannot write to {plain}/new: "),
    (
        report,
        "{damaged} --out {new}",
        "{damaged}/results.json is damaged or of another version; st",
    ),
    (report, "{bare} --out {new}", "{bare}/results.json is damaged or of another version; start"),
    (report, "{unmapped} --out {new}", "{unmapped} has no embedding.npz: the run has not finished"),
    (report, "{garbled} --out {new}", "{garbled}/embedding.npz is damaged or of another version"),
    (report, "{cut} --out {new}", "{cut}/embedding.npz is damaged or of another version; start"),
    (report, "{run} --out {plain}", "cannot write to {plain}: "),
    (doctor, "--debg", "unrecognized arguments: --debg; did you mean --debug?; see --help"),
    (prepare, "cifar11", "argument NAME: invalid choice: 'cifar11'"),
    (prepare, "cifar10 --from_di {new}", "--from_di {new}; did you mean --from_dir?; see --help"),
    (prepare, "cifar10 --from_dir {images} --data_dir {new}", "lacks cifar-10-binary.tar.gz: get"),
    (evaluate, "--workdir {run} --suit standard", "--suit standard; did you mean --suite?; see"),
    (evaluate, "--workdir {new} --config digits --weights {w.pth}", "w.pth: "),
    (
        evaluate,
        "--workdir {run} --suite transfer_linear --on folder:{gone}",
        "no image folder {gone}/train: expected {gone}/SPLIT/CLASS/IMAGE; --data_dir tells where",
    ),
]


@pytest.mark.parametrize(("module", "arguments", "message"), BAD)
def test_bad_input_is_one_line(places, tmp_path, capsys, module, arguments, message):
    def filled(text):
        names = {"new": tmp_path / "new"}
        return re.sub(r"{(.*?)}", lambda m: str(names.get(m[1], places / m[1])), text)

    with pytest.raises(SystemExit) as stopped:
        module.main(filled(arguments).split())
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert stopped.value.code == 1
    assert line.startswith("error: ") and filled(message) in line
    assert "Traceback" not in said.out


def test_bad_weights_of_a_training_are_one_line(places, tmp_path):
    weights = f"--config.model.weights={places / 'w.pth'}"
    done = run("-m", "supcon_jax.train", "--config", "digits:linear", weights,
               f"--workdir={tmp_path / 'run'}")  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"error: {places / 'w.pth'}: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config digits --workdir {tmp}/a[1]", "no checkpoint can be read from {tmp}/a[1], "),
        ("--config folder --workdir {tmp}/run", "no folder of images is given: set --config.data"),
    ],
)
def test_a_training_that_cannot_begin_is_one_line(tmp_path, flags, message):
    new = tmp_path / "new"
    done = run("-m", "supcon_jax.train", *flags.replace("{tmp}", str(new)).split())
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("error: " + message.replace("{tmp}", str(new)))
    assert not new.exists()


@pytest.mark.parametrize("debug", [False, True])
def test_the_traceback_of_an_error_is_for_debugging(tmp_path, debug):
    done = run("-m", "supcon_jax.report", str(tmp_path), "--out", str(tmp_path),
               *["--debug"] * debug)  # fmt: skip
    assert done.returncode == 1
    assert "results.json: the run has not finished" in done.stderr.splitlines()[-1]
    assert ("Traceback" in done.stderr) == debug
    assert (len(done.stderr.splitlines()) == 1) != debug


def test_a_missing_library_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped, command.running(debug=False):
        raise ModuleNotFoundError("No module named 'torch'; pip install torch")
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: No module named 'torch'; pip install torch\n"


def test_a_platform_that_is_not_here_is_one_line(monkeypatch, capsys):
    def devices():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: Unable to initialize backend 'cuda'\n"
    with pytest.raises(RuntimeError):
        doctor.main(["--debug"])


def test_ctrl_c_promises_nothing_where_nothing_is_kept(capsys):
    with pytest.raises(SystemExit) as stopped, command.running(debug=False):
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_while_libraries_load_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.quiet_when_interrupted(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    command.quiet_when_interrupted(ZeroDivisionError, ZeroDivisionError("a bug"), None)
    assert capsys.readouterr().err == "ZeroDivisionError: a bug\n"


def test_names_that_are_not_utf8_keep_apart():
    names = [terminal.shown(name.decode("utf-8", "surrogateescape")) for name in (
        b"caf\xe9", b"caf\xe8", "café".encode())]  # fmt: skip
    assert names == [r"caf\xe9", r"caf\xe8", "café"]


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
