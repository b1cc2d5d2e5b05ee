"""What all experiments share: every setting with every seed, resumed, summarised, judged.

An experiment is a folder with a `run.py` that gives its settings (configurations by name) and its
claims to `main`, and is started from the root of the repository:

    python -m experiments.temperature.run --scale cpu

A run that has finished in `--scratch` is not run again, also for another experiment with the same
setting; one that was stopped goes on. The folder's results.json gets the part of the scale: all
that `--scratch` knows of it, so that a scale can be run in parts (`--only`, `--seeds`).
"""

import argparse
import hashlib
import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.claims import Claim, Values, judged, spread, table
from experiments.pictures import Draw, dots
from supcon_jax import config as configuration
from supcon_jax.command import keep_compiled_programs, quieten
from supcon_jax.interruption import Stopped
from supcon_jax.report import circumstances
from supcon_jax.stages import Data, open_data
from supcon_jax.train import train_and_evaluate
from supcon_jax.workdir import write_json, write_whole

SCALES = ("smoke", "cpu", "gpu", "paper")
Measure = Callable[[Path, ConfigDict, dict[str, Any]], Mapping[str, float]]


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
    diverged: Callable[[ConfigDict], float] = lambda config: float("nan"),
    draw: Draw = dots,
    apart: bool = False,
) -> None:
    """The command of an experiment.

    Args:
      settings: `(scale, data folder) -> {name: configuration}`; the seed is set here.
      claims: judged from the quantities, where the scale has them.
      measure: `(workdir, config, results) -> {metric: number}` of a finished run.
      derive: further quantities from those of all settings, one number a seed; called once all
        settings have a seed.
      diverged: what every metric of a run that diverged counts as there.
      draw: `(record, file)` draws the picture of all settings; here alone, the record also has
        "workdirs", the folders of each setting's runs, by its name.
      apart: the runs are in a folder of `--scratch` of their own: those of other experiments have
        not kept what `measure` needs.
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
    out = options.out or (scratch if options.scale == "smoke" else script.parent)
    if apart:
        scratch /= script.parent.name
    quieten()
    keep_compiled_programs()

    configs = settings(options.scale, options.data)
    chosen = {
        name: config
        for name, config in configs.items()
        if options.only is None or name.endswith(tuple(options.only))
    }
    if not chosen:
        parser.error(f"no setting {options.only} at this scale")
    ended = run_all(chosen, seeds, scratch, measure, options.minutes)
    runs = known(configs, scratch, measure)
    if any(runs.values()):
        rows = {name: [run.pop("values") for run in found] for name, found in runs.items()}
        stand_ins = {name: diverged(config) for name, config in configs.items()}
        record = summary(rows, claims, derive, stand_ins)
        record |= {"runs": {name: found for name, found in runs.items() if found}}
        record |= {"command": _command(script, options), **circumstances()}
        write(out / "results.json", options.scale, record, list(configs))
        print(table(record))
    if not ended:
        sys.exit("stopped, or the time is over; the same command goes on")
    if all(runs.values()):
        workdirs = {name: [scratch / r["config"] for r in found] for name, found in runs.items()}
        picture(draw, record | {"workdirs": workdirs}, out / f"{options.scale}.png")


def run_all(
    configs: Mapping[str, ConfigDict], seeds: int, scratch: Path, measure: Measure, minutes: float
) -> bool:
    """Run and measure what has not been; False if it was stopped or the time was over before."""
    begin = time.monotonic()
    try:
        for seed in range(seeds):  # all settings of a seed first: a part is a fair comparison
            for name, config in configs.items():
                if time.monotonic() - begin > 60 * minutes:
                    return False
                values = finished(config, seed, scratch, measure)["values"]
                print(f"{name}  seed {seed}  {values or 'diverged'}", flush=True)
    except Stopped:
        return False
    return True


def known(
    configs: Mapping[str, ConfigDict], scratch: Path, measure: Measure
) -> dict[str, list[dict[str, Any]]]:
    """What `finished` has returned of each setting, from seed 0 to the first that is missing."""
    found = {}
    for name, config in configs.items():
        files = (measurement(config, seed, scratch, measure) for seed in count())
        found[name] = [json.loads(file.read_text()) for file in takewhile(Path.exists, files)]
    return found


def finished(config: ConfigDict, seed: int, scratch: Path, measure: Measure) -> dict[str, Any]:
    """A run and its measurements; it is run or finished where it has not been.

    Returns:
      "values" (empty if it diverged), the hash "config", the "commit" it was last started from, and
      the "seconds" of all its starts and of measuring.
    """
    file = measurement(config, seed, scratch, measure)
    if not file.exists():
        config, workdir, seconds = with_seed(config, seed), file.parent, 0.0
        values: dict[str, float] = {}
        try:
            results = trained(config, workdir)
            begin = time.monotonic()
            values = dict(measure(workdir, config, results))
            seconds = time.monotonic() - begin
        except FloatingPointError as error:
            print(f"diverged: {error}", flush=True)
        run = {
            "config": workdir.name,
            "commit": json.loads((workdir / "config.json").read_text())["commit"],
            "seconds": round(seconds + spent(workdir), 1),
        }
        write_json(file, run | {"values": values})
    return json.loads(file.read_text())


def measurement(config: ConfigDict, seed: int, scratch: Path, measure: Measure) -> Path:
    """The file of a run's measurements, another one after the code of the measure has changed."""
    folder = Path(inspect.getfile(measure)).parent
    return workdir_of(config, seed, scratch) / f"{measure.__name__}-{hash_of(folder)}.json"


@cache
def hash_of(folder: Path) -> str:
    """Eight hexadecimal digits that stand for the Python files of a folder."""
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:8]


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
        with timed(workdir):
            train_and_evaluate(config, workdir, pictures=False, data=opened(config))
    return json.loads(file.read_text())


def opened(config: ConfigDict) -> Data:
    """The data of a run: those of the last two data sets are kept, as many runs share them."""
    plain = config.copy_and_resolve_references().to_dict()
    return _opened(json.dumps({part: plain[part] for part in ("data", "evaluation")}))


@lru_cache(maxsize=2)
def _opened(parts: str) -> Data:
    return open_data(ConfigDict(json.loads(parts)))


@contextmanager
def timed(workdir: Path) -> Iterator[None]:
    """Adds the seconds of a block to those that the workdir knows, also where it is stopped."""
    before, begin = spent(workdir), time.monotonic()
    try:
        yield
    finally:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / "seconds.json", before + time.monotonic() - begin)


def spent(workdir: Path) -> float:
    """Seconds that all starts of a run took."""
    file = workdir / "seconds.json"
    return json.loads(file.read_text()) if file.exists() else 0.0


def summary(
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    claims: Sequence[Claim] = (),
    derive: Callable[[Values], Values] = lambda values: {},
    stand_ins: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Mean, standard deviation and values of every quantity, and the verdicts on the claims.

    Args:
      rows: of each setting the metrics of its runs, by seed from 0; none of a run that diverged.
      claims: see `main`.
      derive: see `main`.
      stand_ins: what a setting's runs that diverged count as in `derive`; NaN by default.
    """
    values = quantities(rows, claims)
    common = min(map(len, rows.values()))
    if common:
        counted = {}
        for quantity, found in values.items():
            stand_in = (stand_ins or {}).get(quantity.rpartition("/")[0], float("nan"))
            counted[quantity] = [stand_in if np.isnan(x) else x for x in found[:common]]
        values = values | derive(counted)
    return {
        "seeds": max(map(len, rows.values())),
        "quantities": {name: spread(found) for name, found in values.items()},
        "claims": [judged(c, values) for c in claims if {c.first, c.second} <= values.keys()],
    }


def quantities(
    rows: Mapping[str, Sequence[Mapping[str, float]]], claims: Sequence[Claim]
) -> Values:
    """The metrics of all settings; of a run that diverged, NaN for all that there are."""
    metrics = {metric for runs in rows.values() for run in runs for metric in run}
    for claim in claims:  # where all runs diverged, only the claims say what was measured
        for setting, _, metric in (claim.first.rpartition("/"), claim.second.rpartition("/")):
            metrics |= {metric} if setting in rows else set()
    return {
        f"{name}/{metric}": [run.get(metric, float("nan")) for run in runs]
        for name, runs in rows.items()
        for metric in sorted(metrics)
        if any(metric in run or not run for run in runs)
    }


def write(file: Path, scale: str, record: dict[str, Any], names: Sequence[str]) -> None:
    """Put the record of a scale beside those of the others.

    Args:
      file: results.json.
      scale: name of the record.
      record: replaces the one of this scale, unless that has more seeds of a setting: they are in
        another scratch, or were measured by other code. Then the process ends with a line.
      names: settings that the scale has now.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(file.read_text()) if file.exists() else {}
    before, after = (seeds_of(r) for r in (whole.get(scale, {"quantities": {}}), record))
    lost = [name for name in names if before.get(name, 0) > after.get(name, 0)]
    if lost:
        sys.exit(f"error: {file} has more seeds of {', '.join(lost)}; run them too, or give --out")
    write_whole(file, json.dumps(whole | {scale: record}, indent=1) + "\n")


def seeds_of(record: dict[str, Any]) -> dict[str, int]:
    """How many seeds a record has of each setting."""
    quantities = record["quantities"].items()
    return {name.rpartition("/")[0]: len(found["values"]) for name, found in quantities}


def picture(draw: Draw, record: dict[str, Any], file: Path) -> None:
    """Draw, where what it takes is installed."""
    try:
        draw(record, file)
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")


def _command(script: Path, options: argparse.Namespace) -> str:
    words = ["python", "-m", f"experiments.{script.parent.name}.run", "--scale", options.scale]
    if options.seeds:
        words += ["--seeds", str(options.seeds)]
    if options.only:
        words += ["--only", *options.only]
    return shlex.join(words)
