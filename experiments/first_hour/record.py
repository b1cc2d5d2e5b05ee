"""Walk through the first hour and write it down: every command with its output and time.

    python experiments/first_hour/record.py --photos imagenette160

Clones this repository into a temporary folder and types there what a new user types, with the
commands of that clone's own environment. PHOTOS is a folder PHOTOS/{train,val}/CLASS/IMAGE. Writes
docs/first_hour.md, and the screenshots of the explore page and of TensorBoard (screenshots.py).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SHOWN = 24  # lines of a long output
SHOOT = ["python", "-m", "experiments.first_hour.screenshots"]
NAMES = {
    "n01440764": "tench",
    "n02102040": "springer",
    "n02979186": "cassette_player",
    "n03000684": "chain_saw",
    "n03028079": "church",
    "n03394916": "french_horn",
    "n03417042": "garbage_truck",
    "n03425413": "gas_pump",
    "n03445777": "golf_ball",
    "n03888257": "parachute",
}


class Step(NamedTuple):
    """A command, and the words before it."""

    text: str
    command: str


ADDRESS = "https://github.com/supcon-jax/supcon_jax"  # on the page; a local copy is what is cloned
TRAIN = """python -m supcon_jax.train --config folder --config.data.dir=photos \\
  --workdir runs/photos --config.data.load_size=72 --config.data.image_size=64 \\
  --config.model.stem=imagenet --config.model.width=0.25 \\
  --config.supcon.batch_size=64 --config.supcon.epochs=30 --config.linear.epochs=30"""
STEPS = (
    Step(
        "## Clone, and the first run\n\n`make demo` makes an environment in `.venv`, trains on "
        "1,797 handwritten digits and draws two pictures ([what they show](first_run.md)).",
        "make demo",
    ),
    Step(
        "`doctor` says whether everything is there, and tests the loss on every device. The first "
        "line is for all commands from here on.",
        "source .venv/bin/activate\npython -m supcon_jax.doctor",
    ),
    Step(
        "## Your own photographs\n\nHere `photos` is a part of [Imagenette]"
        "(https://github.com/fastai/imagenette) (160 pixels): 300 photographs for training and "
        "120 for the test of each of ten classes, in folders `photos/SPLIT/CLASS` that were given "
        "readable names. Any folder of class folders will do. "
        "Everything can be left to `--config folder`; on two CPU cores smaller images, a narrower "
        "network and fewer epochs make it a matter of minutes, and of less accuracy; smaller "
        "batches, more steps in as many epochs, get away from the collapsed value sooner.",
        TRAIN,
    ),
    Step(
        "## What it has learnt",
        "python -m supcon_jax.evaluate --workdir runs/photos",
    ),
    Step(
        "## One page to look through\n\n`runs/photos/explore.html` opens in any browser, without "
        "a server: point at an image, click it for its neighbours, click a cell of the matrix for "
        "its images.",
        "python -m supcon_jax.explore --workdir runs/photos",
    ),
    Step(
        "![The page: map, neighbours, confusion matrix, hardest images](explore.png)\n\n"
        "## Features, search, classes\n\nA file of features is also an index to search in.",
        "python -m supcon_jax.embed --workdir runs/photos --images photos/val --out photos.npz",
    ),
    Step("", "python -m supcon_jax.search --query photos/val/QUERY --index photos.npz --count 5"),
    Step(
        "",
        "python -m supcon_jax.predict --workdir runs/photos --images photos/val/church "
        "--out church.csv\nhead -n 5 church.csv",
    ),
    Step(
        "A file that is no image is named and left out, and the exit status is 1.",
        "echo 'not an image' > broken.jpg\n"
        "python -m supcon_jax.predict --workdir runs/photos --images broken.jpg photos/val/QUERY",
    ),
    Step(
        "## To PyTorch, and anywhere else",
        "python -m supcon_jax.export --workdir runs/photos --out exported",
    ),
    Step(
        "The encoder in PyTorch, without this package ([the script]"
        "(../experiments/first_hour/in_pytorch.py)):",
        'pip install -q "torch==2.13.0"\n'
        "python experiments/first_hour/in_pytorch.py exported photos.npz",
    ),
    Step(
        "`features.stablehlo` has the weights inside and needs jax alone:",
        'python -c "\n'
        "import numpy as np\n"
        "from jax import export\n"
        "encode = export.deserialize(bytearray(open('exported/features.stablehlo', 'rb').read()))\n"
        "print(encode.call(np.zeros((5, 64, 64, 3), np.float32)).shape)\n"
        '"',
    ),
    Step(
        "## When something is wrong",
        "python -m supcon_jax.train --config folder --config.data.dir=photoz\n"
        "python -m supcon_jax.train --config digits --config.supcon.epoch=3\n"
        "python -m supcon_jax.embed --workdir runs/photoz --images photos/val --out photos.npz",
    ),
)
HEAD = """# The first hour

From nothing to features of your own photographs in PyTorch, as recorded by
[record.py](../experiments/first_hour/record.py): every command with its real output and time, on
two CPU cores. Long outputs are shortened (`...`). Python, git and photographs of your own are all
that is needed.
"""


def shortened(output: str) -> str:
    """The output as a log file has it, lines in the middle left out where there are many."""
    lines = [line.rstrip()[:110] for line in output.splitlines() if line.strip()]
    lines = [
        line for line in lines if not line.startswith(("WARNING: Location", "[notice]"))
    ]  # pip
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN // 2], "...", *lines[-SHOWN // 2 :]]
    return "\n".join(lines)


def words(text: str) -> list[str]:
    """The paragraphs of a text; those that are no headings or pictures are filled."""
    parts = text.split("\n\n") if text else []
    return [part if part[0] in "#!" else textwrap.fill(part, 110) for part in parts]


def typed(command: str, place: Path, environment: dict[str, str]) -> list[str]:
    """A command, how long it took, and what it said."""
    print(command, flush=True)
    start = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    seconds = time.monotonic() - start
    took = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    said = shortened(re.sub(rf"{re.escape(str(place))}/?", "", done.stdout))
    print(said, took, sep="\n", flush=True)
    return [f"```bash\n{command}\n```", f"({took})", f"```\n{said}\n```"]


def bring(photos: Path, place: Path) -> None:
    """Copy the photographs, under readable names of their classes."""
    for folder in photos.glob("*/*"):
        name = NAMES.get(folder.name, folder.name)
        shutil.copytree(folder, place / "photos" / folder.parent.name / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write down the first hour.")
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of what is written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch, "supcon_jax")
        copy = f"{ROOT} {place.name}"  # whatever this checkout is called
        clone = typed(f"git clone {copy} && cd {place.name}", Path(scratch), dict(os.environ))
        bring(options.photos, place)
        commit = ["git", "-C", str(place), "rev-parse", "--short=12", "HEAD"]
        head = subprocess.run(commit, capture_output=True, text=True, check=True).stdout.strip()
        environment = {**os.environ, "XDG_CACHE_HOME": str(Path(scratch, "cache"))}
        environment["PATH"] = f"{place}/.venv/bin:{environment['PATH']}"
        environment.pop("PYTHONPATH", None)
        query = f"church/{min(os.listdir(place / 'photos' / 'val' / 'church'))}"
        text = [HEAD.rstrip(), *(part.replace(copy, ADDRESS) for part in clone)]
        for step in STEPS:
            command = step.command.replace("QUERY", query)
            text += [*words(step.text), *typed(command, place, environment)]
        for name, of in (("explore", "runs/photos/explore.html"), ("tensorboard", "runs/demo")):
            shoot = [*SHOOT, name, str(place / of), "--out", str(options.out / f"{name}.png")]
            subprocess.run(shoot, cwd=place, env=environment, check=True)
    text.append(f"Recorded at commit {head}, Python {sys.version.split()[0]}, 2 CPU cores.")
    (options.out / "first_hour.md").write_text("\n\n".join(text) + "\n")


if __name__ == "__main__":
    main()
