"""Tables and pictures of finished runs, side by side.

    python -m supcon_jax.report runs/digits-supcon --out pictures/
    python -m supcon_jax.report runs/mine runs/other --out pictures/

Prints the table; the folder gets curves.png and embedding.png.
"""

import importlib.metadata
import json
import platform
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import numpy as np

from supcon_jax import command
from supcon_jax.data.decode import usable_cores
from supcon_jax.evaluation.tsne import tsne
from supcon_jax.logs import read_metrics
from supcon_jax.terminal import shown

MAP_POINTS = 2000  # most test images in the 2-D map
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
DAMAGED = (
    AttributeError,
    EOFError,
    IndexError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
    BadZipFile,
    zlib.error,
)  # what reading a damaged file raises
LABELS = {"supcon": "SupCon", "simclr": "SimCLR", "cross_entropy": "cross-entropy"}


def circumstances() -> dict[str, Any]:
    """Hardware, versions and commit, for the records."""
    devices = jax.devices()
    return {
        "hardware": {
            "devices": len(devices),
            "kind": devices[0].device_kind,
            "cores": usable_cores(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def save_embedding(
    workdir: Path, features: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> None:
    """Write the features of (at most `MAP_POINTS`) test images to `embedding.npz`."""
    chosen = np.sort(np.random.RandomState(0).permutation(len(labels))[:MAP_POINTS])
    np.savez_compressed(
        workdir / "embedding.npz", features=features[chosen], labels=labels[chosen], names=names
    )


def table(workdirs: Sequence[Path]) -> str:
    """The results of runs, one a line, at most 80 columns wide."""
    header = ("run", "top-1", "k-NN", "passes", "time", "images/s")
    rows = [header, *(_row(workdir) for workdir in workdirs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _row(workdir: Path) -> tuple[str, ...]:
    results = _results(workdir)
    return (
        results.name,
        "-" if results.top1 is None else f"{results.top1:.2%}",
        f"{results.knn:.2%}",
        f"{results.passes:,}",
        f"{results.seconds:.1f} s",
        f"{results.images_per_s:,.0f}",
    )


class Results(NamedTuple):
    """What the table and the pictures say of a run; of its first stage but for the scores.

    Attributes:
      name: the recipe, with what the folder's name says beyond it: "cross-entropy (equal epochs)".
      stage: the first.
      top1: of the classifier, where there is one.
      knn: accuracy.
      seconds: of all stages.
      images_per_s: through the encoder.
      passes: images through the encoder.
      steps: how many.
    """

    name: str
    stage: str
    top1: float | None
    knn: float
    seconds: float
    images_per_s: float
    passes: int
    steps: int


def _results(workdir: Path) -> Results:
    with _read_whole(workdir / "results.json") as file:
        results = json.loads(file.read_text())
        stage, test, stages = results["recipe"][0], results["test"], results["stages"]
        first = stages[stage]
        return Results(
            _name(workdir, stage),
            stage,
            test.get("top1"),
            test["knn"],
            sum(one["time/seconds"] for one in stages.values()),
            first["time/images_per_s"],
            first["passes"],
            first["steps"],
        )


@contextmanager
def _read_whole(file: Path) -> Iterator[Path]:
    """Around what reads a file of a run: where that fails, the file is named, and the remedy."""
    remedy = "start the run again with the same command"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} has no {file.name}: the run has not finished there; {remedy}"
        )
    try:
        yield file
    except DAMAGED as error:
        raise ValueError(f"{file} is damaged or of another version; {remedy}") from error


def _name(workdir: Path, recipe: str) -> str:
    tail = workdir.name.split(f"-{recipe}")[-1].strip("-_ ")
    label = LABELS.get(recipe, recipe)
    return f"{label} ({tail.replace('_', ' ')})" if tail and tail != workdir.name else label


def _in_picture(name: str) -> str:
    """A name as matplotlib takes it: no formula between dollar signs."""
    return shown(name).replace("$", r"\$")


def draw(workdirs: Sequence[Path], out: Path) -> list[Path]:
    """Write curves.png and embedding.png, the runs side by side, to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return [_draw_curves(workdirs, out / "curves.png"), draw_maps(workdirs, out / "embedding.png")]


def _draw_curves(workdirs: Sequence[Path], file: Path) -> Path:
    """Left: the loss of each stage, with its collapsed value and floor. Right: held-out scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for place, workdir in enumerate(workdirs):
        results = _results(workdir)
        records = [r for r in read_metrics(workdir) if r["stage"] == results.stage]
        per_step = results.passes / results.steps / 1000
        name, color = _in_picture(results.name), f"C{place}"

        def curve(key: str, records: list = records, per_step: float = per_step) -> tuple:
            points = [(r["step"] * per_step, r[key]) for r in records if key in r]
            return tuple(zip(*points, strict=True)) or ((), ())

        axes[0].plot(*curve("loss"), color=color, label=name)
        for key, style in (("collapsed", ":"), ("floor", "--")):
            if any(key in r for r in records):
                axes[0].plot(*curve(key), style, color=color, lw=1, label=f"{key} value")
        axes[1].plot(*curve("heldout/knn"), color=color, marker=".", label=f"{name}, k-NN")
        if any("heldout/top1" in r for r in records):
            axes[1].plot(*curve("heldout/top1"), "--", color=color, label=f"{name}, classifier")
    axes[0].set(title="training loss", xlabel="thousand images through the encoder", ylabel="nats")
    axes[1].set(title="held-out training images", xlabel=axes[0].get_xlabel(), ylabel="accuracy")
    for axis in axes:
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        axis.legend(fontsize=8, frameon=False, **below)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    return file


def draw_maps(workdirs: Sequence[Path], file: Path, titles: Sequence[str] | None = None) -> Path:
    """t-SNE of the test features of each run, at length 1 as the k-NN sees them.

    Args:
      workdirs: of the runs, each with its `embedding.npz`.
      file: gets the picture, the runs side by side.
      titles: of the runs; by default their recipe and k-NN accuracy.

    Returns:
      The file.
    """
    titles = titles or [f"{r.name}: k-NN {r.knn:.1%}" for r in map(_results, workdirs)]
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = len(workdirs)
    figure = Figure(figsize=(4.6 * columns + 0.8, 4.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    for axis, workdir, title in zip(axes[0], workdirs, titles, strict=True):
        features, labels, names = _embedding(workdir)
        points, classes = tsne(features), np.unique(labels)
        colors = colormaps["tab10" if len(classes) <= 10 else "turbo"]
        colors = colors.resampled(max(len(classes), 10))
        for place, label in enumerate(classes):
            of_class, name = points[labels == label], _in_picture(names[label])
            axis.scatter(*of_class.T, s=9, color=colors(place), label=name)
        axis.set(title=_in_picture(title), xticks=[], yticks=[])
    if len(classes) <= 20:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(file, dpi=110)
    return file


def _embedding(workdir: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features, labels and names of the classes, as `save_embedding` wrote them."""
    with (
        _read_whole(workdir / "embedding.npz") as file,
        np.load(file, allow_pickle=False) as saved,
    ):
        features, labels, names = saved["features"], saved["labels"], saved["names"].tolist()
        return features, labels, [names[label] for label in range(labels.max() + 1)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("report", __doc__)
    parser.add_argument(
        "workdirs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args(arguments)
    with command.running(options.debug):
        command.make_folder(options.out)
        print(table(options.workdirs))
        print("pictures:", ", ".join(map(str, draw(options.workdirs, options.out))))


if __name__ == "__main__":
    main()
