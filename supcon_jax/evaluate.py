"""Evaluate a finished run: probes, robustness, calibration, transfer.

    python -m supcon_jax.evaluate --workdir runs/digits-supcon
    python -m supcon_jax.evaluate --workdir D --suite robustness few_shot
    python -m supcon_jax.evaluate --workdir D --features projection
    python -m supcon_jax.evaluate --workdir D --suite few_shot transfer_linear --on folder:PATH
    python -m supcon_jax.evaluate --workdir D --suite transfer_finetune --on tfds:dtd
    python -m supcon_jax.evaluate --workdir D --weights FILE --config resnet50 --data_dir PATH

Always of the run's last state. Results are added to D/evaluation.json, pictures to D/evaluation. A
suite that was interrupted goes on where it was, with the same command. --weights evaluates an
imported encoder as it is, on the data of a recipe; D is then a folder for the results.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from supcon_jax import command  # first: says what to install where nothing below is there

# isort: split
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax import report, transfer
from supcon_jax.evaluation.calibration import BINS
from supcon_jax.fitting import fit_to_images
from supcon_jax.suites import ANYWHERE, SEVERITIES, SUITES, TRANSFER, open_subject
from supcon_jax.trained import open_run, open_weights
from supcon_jax.workdir import claimed, write_json

ELSEWHERE = (*ANYWHERE, *TRANSFER)  # what --on is for


def evaluate(
    workdir: str | Path,
    suites: Sequence[str] = ("standard",),
    *,
    layer: str = "encoder",
    normalised: bool | None = None,
    data_dir: str | None = None,
    on: str | None = None,
    splits: Sequence[str] = (),
    metric: str | None = None,
    grid: transfer.Grid = transfer.PROTOCOL,
    imported: ConfigDict | None = None,
) -> dict[str, Any]:
    """Run evaluation suites on a finished run; results are added to `workdir/evaluation.json`.

    Args:
      workdir: of the run, or for the results of an imported encoder.
      suites: names in `SUITES`.
      layer: whose features: "encoder", or "projection" of a contrastive stage.
      normalised: bring features to length 1; by default as the recipe's heads get them
        (`model.normalize`).
      data_dir: where the data set is now, if not where it was in training; of the suites of
        transfer TFDS's folder.
      on: another data set, for the suites of transfer and few_shot; see `transfer.open_target`.
      splits: of that.
      metric: of that.
      grid: of the suite transfer_finetune.
      imported: evaluate the encoder in its `model.weights` as it is, on its data, instead of a run.

    Returns:
      The contents of evaluation.json, with "suites" by features and name, and what they are of.

    Raises:
      FileNotFoundError: no finished run there, or no data set.
      ValueError: an unknown suite, no such layer, other classes than in training, a damaged or
        foreign checkpoint.
    """
    if unknown := [name for name in suites if name not in SUITES]:
        raise ValueError(f"unknown suite {unknown[0]!r}{configuration.nearest(unknown[0], SUITES)}")
    _check_target(suites, on)
    run = open_run(workdir) if imported is None else open_weights(imported, workdir)
    subject = open_subject(run, layer, normalised, data_dir)
    if on is not None:
        options: dict[str, Any] = {"splits": splits, "metric": metric, "data_dir": data_dir}
        target = transfer.open_target(run.config, on, **options)
        subject = replace(subject, target=target, grid=grid)
    folder, file = run.workdir / "evaluation", run.workdir / "evaluation.json"
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(run.workdir):
        record: dict[str, Any] = {**run.identity, "suites": {}}
        if file.exists():
            before = json.loads(file.read_text())
            same = all(before.get(key) == value for key, value in run.identity.items())
            record["suites"] = before["suites"] if same else {}
        for suite in suites:
            found, results = SUITES[suite](subject, folder), record["suites"]
            of_features = results.setdefault(subject.name, {})
            name = f"{suite} on {on}" if on and suite in ANYWHERE else suite
            earlier = of_features.get(name, {}) if suite in TRANSFER else {}
            of_features[name] = earlier | found
            write_json(file, record | report.circumstances())
    return record


def _check_target(suites: Sequence[str], on: str | None) -> None:
    wanted = [name for name in suites if name in TRANSFER]
    if wanted and on is None:
        raise ValueError(
            f"the suite {wanted[0]} needs a data set: --on tfds:NAME, folder:PATH or digits"
        )
    if on is not None and not set(suites) & set(ELSEWHERE):
        raise ValueError(f"--on is for the suites {', '.join(ELSEWHERE)}; got {', '.join(suites)}")


def table(record: dict[str, Any]) -> str:
    """The main numbers, at most 80 columns wide."""
    lines = []
    for features, suites in record["suites"].items():
        for suite, found in suites.items():
            rows = ROWS.get(suite.partition(" ")[0], _plain_rows)(found)
            title = f"{features}: {suite}"
            title = title if len(title) <= 80 else f"{title[:38]}...{title[-39:]}"
            lines += [title, *(f"  {line}" for line in rows), ""]
    return "\n".join(lines).rstrip()


def _standard_rows(found: dict[str, Any]) -> list[str]:
    labels = {"classifier": "classifier of the run", "probe": "linear probe"}
    rows = _score_rows({label: found[name] for name, label in labels.items() if name in found})
    rows.append(f"{'k-NN':21}{found['knn']:9.2%}")
    rows.append(f"{'nearest class mean':21}{found['class_mean']:9.2%}")
    ranked = sorted((s, name) for name, s in found["per_class"].items() if s is not None)
    worst = ", ".join(f"{name[:20]} {share:.1%}" for share, name in ranked[:3])
    return [*rows, f"hardest classes: {worst}"[:78]]


def _sgd_rows(found: dict[str, Any]) -> list[str]:
    return _score_rows({"linear stage (SGD)": found})


def _score_rows(scores: dict[str, dict[str, Any]]) -> list[str]:
    head = f"{'':21}{'top-1':>9}{'top-5':>9}{f'ECE ({BINS} bins)':>15}"
    return [head] + [
        f"{label:21}{one['top1']:9.2%}{one['top5']:9.2%}{one['ece']:15.3f}"
        for label, one in scores.items()
    ]


def _few_rows(found: dict[str, Any]) -> list[str]:
    metric = found.get("metric", "top1").replace("_", " ")
    rows = [f"{'images a class':16}{'probe':>18}{'class mean':>18}  {metric}"]
    for shots, one in found.items():
        if shots.isdigit():
            cells = (f"{s['mean']:.2%} +- {s['sd']:.2%}" for s in (one["probe"], one["class_mean"]))
            rows.append(f"{shots:16}" + "".join(f"{cell:>18}" for cell in cells))
    return rows


def _robustness_rows(found: dict[str, Any]) -> list[str]:
    rows = [f"{'severity':12}{'clean':>9}" + "".join(f"{s:>9}" for s in SEVERITIES)]
    ece = f"ECE, {BINS} bins"
    for name, label, form in (("top1", "top-1", "9.2%"), ("ece", ece, "9.3f")):
        values = [found["clean"][name], *found[name]]
        rows.append(f"{label:12}" + "".join(format(value, form) for value in values))
    if "mce" in found:
        rows.append(f"mCE {found['mce']:.1f}, relative mCE {found['relative_mce']:.1f}")
    return [*rows, f"mean error {found['mean_error']:.2%}, of {found['classifier']} classifier"]


def _transfer_rows(found: dict[str, Any]) -> list[str]:
    rows = [f"{'data set':19}{'metric':>15}{'validation':>12}{'test':>9}  chosen"]
    for name, one in found.items():
        if "penalty" in one:
            chosen = f"penalty {one['penalty']:.3g}"
        else:
            chosen = f"lr {one['learning_rate']:.1e} wd {one['weight_decay']:.1e}"
        shown, metric = name.partition(":")[2][-18:] or name, one["metric"].replace("_", " ")
        scores = f"{one['validation']:12.2%}{one['test']:9.2%}"
        rows.append(f"{shown:19}{metric:>15}{scores}  {chosen}")
    return rows


def _plain_rows(found: dict[str, Any]) -> list[str]:
    """The numbers of a suite that was added."""
    numbers = {k: v for k, v in configuration.flatten(found).items() if isinstance(v, int | float)}
    return [f"{name[:40]:40}  {value:.6g}" for name, value in numbers.items()]


ROWS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "standard": _standard_rows,
    "sgd_probe": _sgd_rows,
    "few_shot": _few_rows,
    "robustness": _robustness_rows,
    "transfer_linear": _transfer_rows,
    "transfer_finetune": _transfer_rows,
}


def _add_transfer(group: Any) -> None:
    protocol = transfer.PROTOCOL
    group.add_argument("--on", help="data set: tfds:NAME, folder:PATH or digits")
    group.add_argument("--splits", nargs="+", default=(), metavar="S", help="train, test")
    group.add_argument("--metric", help=", ".join(transfer.METRICS))
    group.add_argument("--steps", type=int, default=protocol.steps, help="of fine-tuning")
    group.add_argument("--batch_size", type=int, default=protocol.batch_size, help="of that")
    for name in ("learning_rates", "weight_decays"):
        options: dict[str, Any] = {"nargs": "+", "metavar": "X", "help": "to try"}
        group.add_argument(f"--{name}", type=float, default=getattr(protocol, name), **options)


def _imported(options: argparse.Namespace) -> ConfigDict | None:
    if (options.weights is None) != (options.config is None):
        raise ValueError("--weights and --config belong together: a file, and the recipe it is for")
    if options.weights is None:
        return None
    config = configuration.load(f"{options.config.partition(':')[0]}:linear")
    config.model.weights = options.weights
    config.data.dir = options.data_dir or config.data.dir
    fit_to_images(config)
    return config


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run, or for the results")
    names = ", ".join(name for name in SUITES if name not in TRANSFER)
    parser.add_argument("--suite", nargs="+", default=["standard"], metavar="S", help=names)
    parser.add_argument("--features", default="encoder", help="encoder, or projection")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="features at length 1 (default: the run's)",
    )
    parser.add_argument("--data_dir", help="where the data set is now")
    parser.add_argument("--weights", help="encoder to import (.pth, .npz, .safetensors)")
    parser.add_argument("--config", help="recipe of --weights: NAME or FILE.py")
    _add_transfer(parser.add_argument_group(", ".join(ELSEWHERE)))
    options = parser.parse_args(arguments)
    moved = command.data_remedy("--data_dir tells where the run's is, --on and --splits another")
    with command.running(options.debug), moved:
        record = evaluate(
            options.workdir,
            options.suite,
            imported=_imported(options),
            layer=options.features,
            normalised=options.normalize,
            data_dir=options.data_dir,
            on=options.on,
            splits=options.splits,
            metric=options.metric,
            grid=transfer.Grid(
                tuple(options.learning_rates),
                tuple(options.weight_decays),
                options.steps,
                options.batch_size,
            ),
        )
        print(table(record))
        print(f"\n{Path(options.workdir, 'evaluation.json')}, pictures in evaluation/ beside it")


if __name__ == "__main__":
    main()
