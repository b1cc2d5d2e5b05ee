"""Tables and pictures of finished runs, side by side.

    python -m supcon_jax.report runs/digits-supcon runs/digits-cross_entropy --out runs/demo

Prints the table; the folder gets curves.png and embedding.png.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from supcon_jax import command
from supcon_jax.evaluation.tsne import tsne
from supcon_jax.logs import read_metrics

MAP_POINTS = 2000  # most test images in the 2-D map
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
LABELS = {"supcon": "SupCon", "simclr": "SimCLR", "cross_entropy": "cross-entropy"}


def circumstances() -> dict[str, Any]:
    """Hardware, versions and commit, for the records."""
    devices = jax.devices()
    return {
        "hardware": {
            "devices": len(devices),
            "kind": devices[0].device_kind,
            "cores": os.cpu_count(),
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
    first, *_ = results["stages"].values()
    seconds = sum(stage["time/seconds"] for stage in results["stages"].values())
    return (
        _name(workdir),
        f"{results['test']['top1']:.2%}" if "top1" in results["test"] else "-",
        f"{results['test']['knn']:.2%}",
        f"{first['passes']:,}",
        f"{seconds:.1f} s",
        f"{first['time/images_per_s']:,.0f}",
    )


def _results(workdir: Path) -> dict[str, Any]:
    file = workdir / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{workdir} has no results.json: the run has not finished there")
    return json.loads(file.read_text())


def _name(workdir: Path) -> str:
    """The recipe, with what the folder's name says beyond it: "cross-entropy (equal epochs)"."""
    first = _results(workdir)["recipe"][0]
    tail = workdir.name.split(f"-{first}")[-1].strip("-_ ")
    label = LABELS.get(first, first)
    return f"{label} ({tail.replace('_', ' ')})" if tail and tail != workdir.name else label


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
        first = _results(workdir)["recipe"][0]
        records = [r for r in read_metrics(workdir) if r["stage"] == first]
        passes = _results(workdir)["stages"][first]
        per_step = passes["passes"] / passes["steps"] / 1000
        color = f"C{place}"

        def curve(key: str, records: list = records, per_step: float = per_step) -> tuple:
            points = [(r["step"] * per_step, r[key]) for r in records if key in r]
            return tuple(zip(*points, strict=True)) or ((), ())

        axes[0].plot(*curve("loss"), color=color, label=_name(workdir))
        for key, style in (("collapsed", ":"), ("floor", "--")):
            if any(key in r for r in records):
                axes[0].plot(*curve(key), style, color=color, lw=1, label=f"{key} value")
        axes[1].plot(
            *curve("heldout/knn"), color=color, marker=".", label=f"{_name(workdir)}, k-NN"
        )
        if any("heldout/top1" in r for r in records):
            axes[1].plot(
                *curve("heldout/top1"), "--", color=color, label=f"{_name(workdir)}, classifier"
            )
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
    titles = titles or [f"{_name(w)}: k-NN {_results(w)['test']['knn']:.1%}" for w in workdirs]
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = len(workdirs)
    figure = Figure(figsize=(4.6 * columns + 0.8, 4.4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    for axis, workdir, title in zip(axes[0], workdirs, titles, strict=True):
        saved = np.load(workdir / "embedding.npz")
        points = tsne(saved["features"])
        classes = np.unique(saved["labels"])
        colors = colormaps["tab10" if len(classes) <= 10 else "turbo"]
        colors = colors.resampled(max(len(classes), 10))
        for place, label in enumerate(classes):
            of_class = points[saved["labels"] == label]
            axis.scatter(*of_class.T, s=9, color=colors(place), label=str(saved["names"][label]))
        axis.set(title=title, xticks=[], yticks=[])
    if len(classes) <= 20:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(file, dpi=110)
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    description = "Tables and pictures of finished runs."
    parser = command.parser("report", description, "RUN [RUN ...] --out FOLDER")
    parser.add_argument("workdirs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    options = parser.parse_args(arguments)
    with command.running(options.debug):
        print(table(options.workdirs))
        print("pictures:", ", ".join(map(str, draw(options.workdirs, options.out))))


if __name__ == "__main__":
    main()
