"""Published recipes on TPU slices: memory, operations, bytes and floor of a pre-training step.

    pip install "jax[tpu]"  # needs no TPU: its compiler works on any host
    python experiments/scaling/run.py --topology v5e:16x16 --config configs/resnet50.py
    python experiments/scaling/run.py --topology v5e:2x4 --remat --micro_batches 2 4 8
    python experiments/scaling/run.py --topology v5p:8x16x16 --batch 6144 65536 --loss_only
    python experiments/scaling/run.py --topology v5p:8x16x16 --plain

The whole step of the first stage is compiled for every topology, batch, exchange and block size,
and the objective's value and gradient alone beside it; --plain leaves out the augmentation, whose
lookups XLA counts as if each read its whole array. Nothing is run. One line of records.jsonl
is one compilation; what is there already is not compiled again. Writes table.md, its whole steps
into README.md, and scaling.png.
"""

import argparse
import importlib.metadata
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hardware import CHIPS, floor

HERE = Path(__file__).parent
RECORDS = HERE / "records.jsonl"
WRITTEN = ("records.jsonl", "table.md", "README.md", "scaling.png")
BEGIN, END = "<!-- from the records -->", "<!-- end of the records -->"
VIEWS, DIM = 2, 128  # of the published recipes
KEY = (
    "topology",
    "config",
    "batch",
    "exchange",
    "block_size",
    "remat",
    "micro_batches",
    "loss_only",
    "plain",
)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one case; sizes are of one chip, in bytes, and of one step."""
    from supcon_jax import config as configuration
    from supcon_jax import plan

    config = configuration.load(case["config"])
    name = config.stages[0]
    stage = config[name]
    stage.update(batch_size=case["batch"], micro_batches=case["micro_batches"])
    config.model.remat = case["remat"]
    if case["plain"]:
        stage.augment.update(name="crop_flip", flip=0.0)  # the host crops
    if stage.objective.name == "contrastive":
        stage.objective.update(exchange=case["exchange"], block_size=case["block_size"])
    mesh = plan.make_mesh(case["topology"])
    start = time.perf_counter()
    found = plan.plan_stage(config, name, mesh, step=not case["loss_only"])
    seconds = time.perf_counter() - start
    programs = {"step": found.step, "loss": found.loss}
    return {
        **case,
        "chips": mesh.size,
        "parameters": found.parameters,
        **{name: figures(one) for name, one in programs.items() if one},
        "cost_model": {name: round(sent) for name, sent in found.model.items()},
        "compile_seconds": round(seconds, 1),
    }


def figures(found: Any) -> dict[str, Any]:
    """A program's figures, or what it needs where it does not fit."""
    from supcon_jax.programs import DoesNotFitError, sent_by_kind

    if isinstance(found, DoesNotFitError):
        return {"fits": False, "peak": round(found.needed), "available": round(found.available)}
    kinds = sent_by_kind(found.collectives)
    sent = sum(size for _, size in kinds.values())
    return {
        "fits": True,
        "peak": found.peak,
        "arguments": found.arguments,
        "temporary": found.temporary,
        "flops": found.flops,
        "accessed": found.accessed,
        "sent": round(sent),
        "collectives": {kind: [count, round(size)] for kind, (count, size) in kinds.items()},
    }


def circumstances() -> dict[str, Any]:
    """Versions, commit and command of a record."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # What this script writes does not make the tree another one.
    changed = git("status", "--porcelain", "--", ":/", *(f":!{name}" for name in WRITTEN))
    packages = ("jax", "jaxlib", "libtpu", "flax", "optax")
    return {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else ""),
        "command": " ".join(["run.py", *sys.argv[1:]]),
    }


def read() -> list[dict[str, Any]]:
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return [{"micro_batches": 1, "plain": False, **json.loads(line)} for line in lines]


def table(shown: list[dict[str, Any]], records: list[dict[str, Any]]) -> str:
    """One row a shown record, in Markdown; floors need the others."""
    names = ["topology", "chips", "recipe", "images", "exchange", "block", "remat", "parts",
             "GB a chip", "TFLOP", "GB moved", "MB sent", "floor ms", "limit"]  # fmt: skip
    lines = [
        "| " + " | ".join(names) + " |",
        "| --- | ---: | --- | ---: | --- |" + " ---: |" * 8 + " --- |",
    ]
    moved = bytes_moved(records)
    for record in sorted(shown, key=_place):
        found = record["loss" if record["loss_only"] else "step"]
        recipe = Path(record["config"]).stem
        recipe += ", loss alone" * record["loss_only"] + ", plain" * record["plain"]
        block, remat = str(record["block_size"] or "auto"), "yes" if record["remat"] else "no"
        cells = [
            record["topology"],
            f"{record['chips']:,}",
            recipe,
            f"{record['batch']:,}",
            record["exchange"],
            block,
            remat,
            str(record["micro_batches"]),
        ]
        lines += ["| " + " | ".join([*cells, *_figures(record, found, moved)]) + " |"]
    return "\n".join(lines) + "\n"


def rewrite(readme: Path, records: list[dict[str, Any]]) -> None:
    """The whole steps between the page's marks; a plain one only where it is the only one."""
    whole = [record for record in records if not record["loss_only"]]
    augmented = {_of(record) for record in whole if not record["plain"]}
    shown = [r for r in whole if not (r["plain"] and _of(r) in augmented)]
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n\n{table(shown, records)}\n{END}{after}")


def _place(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["loss_only"], record["config"], record["topology"].partition(":")[0],
            record["chips"], record["batch"], record["exchange"], record["remat"],
            record["micro_batches"], record["plain"])  # fmt: skip


def _figures(record: dict[str, Any], found: dict[str, Any], moved: dict[Any, float]) -> list[str]:
    if not found["fits"]:
        return [f"needs {found['peak'] / 1e9:.1f} of {found['available'] / 1e9:.1f}", *["-"] * 5]
    memory, sent = f"{found['peak'] / 1e9:.3g}", f"{found['sent'] / 1e6:.1f}"
    program = "loss" if record["loss_only"] else "step"
    if (lower := least(record, program, moved)) is None:
        return [memory, "-", "-", sent, "-", "-"]
    seconds, limit = lower
    flops, touched = work(record, program, moved)
    return [
        memory,
        f"{flops / 1e12:.3g}",
        f"{touched / 1e9:.3g}",
        sent,
        f"{1e3 * seconds:.3g}",
        limit,
    ]


def bytes_moved(records: list[dict[str, Any]]) -> dict[Any, float]:
    """What the plain steps read and write, by what they are of."""
    plain = [record for record in records if record["plain"] and record["step"]["fits"]]
    return {_of(record): record["step"]["accessed"] for record in plain}


def _of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEY if name not in ("loss_only", "plain"))


def work(record: dict[str, Any], program: str, moved: dict[Any, float]) -> tuple[float, float]:
    """Operations of a program, and bytes of memory that it reads and writes.

    XLA counts the body of a loop once, so of the loss in blocks or around the ring the operations
    are those of its three products, 6 N^2 D over the chips, and the bytes at least its arguments
    and twice its other memory.
    """
    found = record[program]
    if program == "step":
        return found["flops"], moved[_of(record)]
    products = 6 * (VIEWS * record["batch"]) ** 2 * DIM / record["chips"]
    once = found["arguments"] + 2 * (found["peak"] - found["arguments"])
    return max(found["flops"], products), max(found["accessed"], once)


def least(
    record: dict[str, Any], program: str, moved: dict[Any, float]
) -> tuple[float, str] | None:
    """The floor of a program's time and its limit; None where the bytes are not known."""
    if program == "step" and (record["micro_batches"] > 1 or _of(record) not in moved):
        return None
    chip = CHIPS[record["topology"].partition(":")[0]]
    return floor(chip, *work(record, program, moved), record[program]["sent"])


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Floor of the time and memory against the chips: a line for each form at one batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, panels = plt.subplots(2, 2, figsize=(11, 9.5), sharex="col", layout="constrained")
    moved = bytes_moved(records)
    for column, (program, title) in enumerate((("step", "whole step"), ("loss", "loss alone"))):
        lines: dict[str, list[tuple[int, float, float]]] = {}
        for record in records:
            found = record.get(program)
            if not (found and found["fits"]) or (program == "step" and not record["plain"]):
                continue
            if (lower := least(record, program, moved)) is not None:
                point = (record["chips"], 1e3 * lower[0], found["peak"] / 1e9)
                lines.setdefault(_line(record, program), []).append(point)
        for place, (name, points) in enumerate(sorted(lines.items())):
            chips, floors, memory = zip(*sorted(set(points)), strict=True)
            style = dict(marker="os^v"[place % 4], color=f"C{place % 10}", alpha=0.8, label=name)
            panels[0][column].plot(chips, floors, **style)
            panels[1][column].plot(chips, memory, **style)
        numbers = sorted({chips for points in lines.values() for chips, _, _ in points})
        for panel, text in zip(
            panels[:, column], ("floor of its time, ms", "GB a chip"), strict=True
        ):
            panel.set(xscale="log", yscale="log", ylabel=text)
            panel.set_xticks(numbers, [f"{number:,}" for number in numbers])
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0][column].set_title(title)
        panels[1][column].set_xlabel("chips")
        below = dict(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
        panels[1][column].legend(fontsize=8, **below)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(record: dict[str, Any], program: str) -> str:
    generation = record["topology"].partition(":")[0]
    recipe = Path(record["config"]).stem if program == "step" else "loss"
    blocks = f", blocks of {record['block_size']}" if record["block_size"] else ""
    remat = ", remat" if record["remat"] and program == "step" else ""
    return f"{generation}, {recipe}, {record['batch']:,}, {record['exchange']}{blocks}{remat}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Pre-training steps compiled for TPU slices.")
    parser.add_argument("--topology", nargs="*", default=[], help="such as v5e:16x16")
    parser.add_argument("--config", default="configs/resnet50.py")
    parser.add_argument("--batch", type=int, nargs="+", help="images (the recipe's)")
    parser.add_argument("--exchange", nargs="+", default=["gather"], choices=("gather", "ring"))
    parser.add_argument("--block_size", type=int, nargs="+", default=[0], help="0: as in training")
    parser.add_argument("--remat", action="store_true", help="activations are computed again")
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1])
    parser.add_argument("--loss_only", action="store_true", help="not the whole step")
    parser.add_argument("--plain", action="store_true", help="without the augmentation")
    options = parser.parse_args()
    from supcon_jax import config as configuration

    recipe = configuration.load(options.config)
    batches = options.batch or [recipe[recipe.stages[0]].batch_size]
    for topology, batch, exchange, block_size, parts in itertools.product(
        options.topology, batches, options.exchange, options.block_size, options.micro_batches
    ):
        values = (topology, options.config, batch, exchange, block_size, options.remat, parts,
                  options.loss_only, options.plain)  # fmt: skip
        case = dict(zip(KEY, values, strict=True))
        if any(all(record[name] == case[name] for name in KEY) for record in read()):
            continue
        record = {**measure(case), **circumstances()}
        print(json.dumps(record), flush=True)
        with RECORDS.open("a") as file:
            file.write(json.dumps(record) + "\n")
    records = read()
    (HERE / "table.md").write_text(table(records, records))
    rewrite(HERE / "README.md", records)
    draw(records, HERE / "scaling.png")


if __name__ == "__main__":
    main()
