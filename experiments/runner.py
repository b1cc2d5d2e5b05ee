"""What all experiments share: every setting with every seed, resumed, summarised, judged.

An experiment is a folder with a `run.py` that gives its settings (configurations by name) and its
claims to `main`, and is started from the root of the repository:

    python -m experiments.temperature.run --scale cpu

A run that has finished in `--scratch` is not run again, also for another experiment with the same
setting; one that was stopped goes on. The folder's results.json gets the part of the scale.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.pictures import Draw, dots
from supcon_jax import config as configuration
from supcon_jax.command import keep_compiled_programs, quieten
from supcon_jax.report import circumstances
from supcon_jax.train import train_and_evaluate

SCALES = ("smoke", "cpu", "gpu", "paper")
Values = dict[str, list[float]]  # "setting/metric" -> one number a seed
Measure = Callable[[Path, ConfigDict, dict[str, Any]], Mapping[str, float]]


class Claim(NamedTuple):
    """A claim of the paper as a difference of two quantities, both known for every seed.

    It is reproduced if the 95 % interval of the paired difference `first - second` over the seeds
    is above 0, not reproduced otherwise. The rule was fixed before the runs.

    Attributes:
      text: the claim, in a sentence.
      paper: the paper's numbers.
      first: quantity that the claim says is larger, "setting/metric" or a derived one.
      second: quantity that it says is smaller.
    """

    text: str
    paper: str
    first: str
    second: str


def accuracies(workdir: Path, config: ConfigDict, results: dict[str, Any]) -> Mapping[str, float]:
    """Test accuracies of a run, in per cent."""
    del workdir, config
    return {
        name: 100 * results["test"][name] for name in ("top1", "knn") if name in results["test"]
    }


def main(
    settings: Callable[[str, Path | None], dict[str, ConfigDict]],
    claims: Sequence[Claim] = (),
    *,
    measure: Measure = accuracies,
    derive: Callable[[Values], Values] = lambda values: {},
    draw: Draw = dots,
) -> None:
    """The command of an experiment.

    Args:
      settings: `(scale, data folder) -> {name: configuration}`; the seed is set here.
      claims: judged from the quantities, where the scale has them.
      measure: `(workdir, config, results) -> {metric: number}` of a finished run.
      derive: further quantities from those of all settings, one number a seed.
      draw: `(record, file)` draws the picture; here alone, the record also has "workdirs", the
        folders of each setting's runs, by its name.
    """
    script = Path(sys.modules["__main__"].__file__ or "")
    parser = argparse.ArgumentParser(
        description=(sys.modules["__main__"].__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--data", type=Path, help="folder with the data sets (see README.md)")
    parser.add_argument("--seeds", type=int, help="how many, from 0 (smoke: 2, else 3)")
    parser.add_argument("--scratch", type=Path, help="folder of the runs (runs/experiments/SCALE)")
    parser.add_argument("--only", nargs="+", help="settings, by name or its end (all)")
    parser.add_argument("--out", type=Path, help="folder of results.json (the script's)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after")
    options = parser.parse_args()
    seeds = options.seeds or (2 if options.scale == "smoke" else 3)
    scratch = options.scratch or Path("runs/experiments", options.scale)
    quieten()
    keep_compiled_programs()

    configs = {
        name: config
        for name, config in settings(options.scale, options.data).items()
        if options.only is None or any(name.endswith(end) for end in options.only)
    }
    if not configs:
        parser.error(f"no setting {options.only} at this scale")
    rows, begin = {}, time.monotonic()
    for seed in range(seeds):  # all settings of a seed first, so that a part is a fair comparison
        for name, config in configs.items():
            if time.monotonic() - begin > 60 * options.minutes:
                sys.exit("the time is over; the same command goes on")
            rows[name, seed] = finished(config, seed, scratch, measure)
            print(f"{name}  seed {seed}  {rows[name, seed]}", flush=True)
    record = summary(rows, list(configs), seeds, claims, derive)
    record["training_seconds"] = [
        training_seconds(workdir_of(config, seed, scratch))
        for config in configs.values()
        for seed in range(seeds)
    ]
    record |= {"command": _command(script, options), **circumstances()}
    out = options.out or (scratch if options.scale == "smoke" else script.parent)
    write(out / "results.json", options.scale, record)
    workdirs = {
        name: [workdir_of(config, seed, scratch) for seed in range(seeds)]
        for name, config in configs.items()
    }
    draw(record | {"workdirs": workdirs}, out / f"{options.scale}.png")
    print(table(record))


def finished(config: ConfigDict, seed: int, scratch: Path, measure: Measure) -> dict[str, float]:
    """The measurements of a run, which is run or finished where it has not been."""
    config, workdir = with_seed(config, seed), workdir_of(config, seed, scratch)
    file = workdir / f"{measure.__name__}.json"
    if not file.exists():
        try:
            found = dict(measure(workdir, config, trained(config, workdir)))
        except FloatingPointError as error:
            print(f"diverged: {error}", flush=True)
            found = {"diverged": 1.0}
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    """The configuration of one run of a setting."""
    config = config.copy_and_resolve_references()
    config.seed = seed
    return config


def workdir_of(config: ConfigDict, seed: int, scratch: Path) -> Path:
    """The folder of one run of a setting, which depends on all that the result depends on."""
    return scratch / configuration.config_hash(configuration.used(with_seed(config, seed)))


def trained(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """The results of a run, which is run where it has not been."""
    file = workdir / "results.json"
    if not file.exists():
        train_and_evaluate(config, workdir, pictures=False)
    return json.loads(file.read_text())


def training_seconds(workdir: Path) -> float | None:
    """What all stages of a run took; None for a run that diverged."""
    file = workdir / "results.json"
    if not file.exists():
        return None
    stages = json.loads(file.read_text())["stages"].values()
    return round(sum(stage["time/seconds"] for stage in stages), 1)


def summary(
    rows: Mapping[tuple[str, int], Mapping[str, float]],
    names: Sequence[str],
    seeds: int,
    claims: Sequence[Claim],
    derive: Callable[[Values], Values],
) -> dict[str, Any]:
    """Mean, standard deviation and values of every quantity, and the verdicts on the claims."""
    values: Values = {}
    for name in names:
        for metric in sorted({metric for seed in range(seeds) for metric in rows[name, seed]}):
            found = [rows[name, seed].get(metric, float("nan")) for seed in range(seeds)]
            values[f"{name}/{metric}"] = found
    values |= derive(values)
    return {
        "seeds": seeds,
        "quantities": {name: spread(found) for name, found in values.items()},
        "claims": [judged(c, values) for c in claims if {c.first, c.second} <= values.keys()],
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and (n - 1) standard deviation; null where a run has diverged."""
    numbers = np.asarray(values, float)
    sd = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    return {
        "mean": _rounded(numbers.mean()),
        "sd": _rounded(sd),
        "values": [_rounded(number) for number in numbers],
    }


def _rounded(number: float) -> float | None:
    return round(float(number), 4) if np.isfinite(number) else None


def judged(claim: Claim, values: Values) -> dict[str, Any]:
    """The paired difference over the seeds, its 95 % interval (Student's t), and the verdict."""
    from scipy import stats

    differences = np.subtract(values[claim.first], values[claim.second])
    count = len(differences)
    half = float("inf")
    if count > 1:
        half = stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / np.sqrt(count)
    mean = float(differences.mean())
    return {
        **claim._asdict(),
        "difference": spread(differences),
        "interval": [_rounded(mean - half), _rounded(mean + half)],
        "verdict": "reproduced" if mean - half > 0 else "not reproduced",
    }


def write(file: Path, scale: str, record: dict[str, Any]) -> None:
    """Put the record of a scale beside those of the others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(whole | {scale: record}, indent=1) + "\n")


def table(record: dict[str, Any]) -> str:
    """The quantities and claims of a record, in Markdown.

    Settings against metrics, the shorter side across; curves ("... at epoch 4") are left out.
    """
    cells: dict[str, dict[str, str]] = {}
    alone = []
    for name, found in record["quantities"].items():
        mean, sd = found["mean"], found["sd"]
        number = "diverged" if mean is None else f"{mean:.2f} ± {sd:.2f}"
        setting, _, metric = name.rpartition("/")
        if not setting:
            alone.append(f"- {name}: {number}")
        elif " at epoch " not in metric:
            cells.setdefault(setting, {})[metric] = number
    columns = list(dict.fromkeys(metric for row in cells.values() for metric in row))
    corner = "setting"
    if len(columns) > len(cells):
        corner, rows = "metric", columns
        columns, cells = list(cells), {r: {c: cells[c].get(r, "") for c in cells} for r in rows}
    lines = [f"| {corner} | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for name, row in cells.items():
        lines.append(f"| {name} | {' | '.join(row.get(column, '') for column in columns)} |")
    if alone:
        lines += ["", *alone]
    if record["claims"]:
        lines += ["", *(f"- {verdict(claim)}" for claim in record["claims"])]
    return "\n".join(lines)


def verdict(claim: dict[str, Any]) -> str:
    """A claim that was judged, with the interval of its difference, in a sentence."""
    low, high = claim["interval"]
    interval = "no interval" if low is None or high is None else f"{low:+.2f} to {high:+.2f}"
    return f"{claim['text']}: **{claim['verdict']}** ({interval})"


def _command(script: Path, options: argparse.Namespace) -> str:
    given = {"scale": options.scale, "seeds": options.seeds}
    flags = " ".join(f"--{name} {value}" for name, value in given.items() if value)
    return f"python -m experiments.{script.parent.name}.run {flags}"
