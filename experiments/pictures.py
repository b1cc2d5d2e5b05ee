"""The pictures of experiments, drawn from their records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Draw = Callable[[dict[str, Any], Path], None]


class Row(NamedTuple):
    """A quantity of a setting: what its name says after ": ", and the record's numbers."""

    name: str
    group: str
    found: dict[str, Any]


def curve(label: str, scale: str = "log") -> Draw:
    """Draws top-1, mean and standard deviation, against settings "NUMBER" or "NUMBER: LINE".

    Args:
      label: what the number is.
      scale: of the axis, "log" or "linear".

    Returns:
      `(record, file)`, which draws.
    """

    def draw(record: dict[str, Any], file: Path) -> None:
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for name, group, found in rows(record):
            number = float(name.removesuffix(f": {group}"))
            lines.setdefault(group, []).append((number, found["mean"], found["sd"]))
        figure, axis = _figure(5.5, 4)
        for line, points in lines.items():
            numbers, means, sds = zip(*sorted(points), strict=True)
            axis.errorbar(numbers, means, sds, marker=".", capsize=2, label=line or None)
        axis.set(xscale=scale, xlabel=label, ylabel="test top-1, %")
        axis.set_xticks(sorted({x for points in lines.values() for x, _, _ in points}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        if any(lines):
            axis.legend(frameon=False)
        _save(figure, file)

    return draw


def dots(record: dict[str, Any], file: Path) -> None:
    """Draws a row for each setting: its seeds as rings, their mean and standard deviation.

    A row for each metric where top-1 was not measured. What follows ": " in a row's name is its
    colour.
    """
    from matplotlib import colormaps

    drawn = rows(record)
    groups = list(dict.fromkeys(row.group for row in drawn))
    colors = colormaps["tab10"].colors
    figure, axis = _figure(6.5, 1.0 + 0.27 * len(drawn))
    for place, (_, group, found) in enumerate(drawn):
        color, values = colors[groups.index(group) % len(colors)], found["values"]
        axis.plot(values, [place] * len(values), "o", color=color, fillstyle="none", alpha=0.5)
        axis.errorbar(
            found["mean"], place, xerr=found["sd"], fmt="|", color=color, markersize=12, capsize=3
        )
    axis.set_yticks(range(len(drawn)), [row.name for row in drawn])
    axis.set_ylim(len(drawn) - 0.5, -0.5)  # the first on top
    axis.set_xlabel("test top-1, %")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, file)


def rows(record: dict[str, Any]) -> list[Row]:
    """What is drawn of a record; a setting with a run that diverged is not."""
    quantities = record["quantities"].items()
    top1 = any(name.endswith("/top1") for name, _ in quantities)
    drawn = []
    for quantity, found in quantities:
        setting, _, metric = quantity.rpartition("/")
        if not setting or found["mean"] is None or (top1 and metric != "top1"):
            continue
        name = setting if top1 else f"{setting}: {metric}"
        drawn.append(Row(name, name.partition(": ")[2], found))
    return drawn


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(width, height), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=110)
    plt.close(figure)
