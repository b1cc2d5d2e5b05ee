"""Evaluate a finished run: probes, k-NN, robustness, calibration, few examples, transfer.

    python -m supcon_jax.evaluate --workdir runs/digits-supcon
    python -m supcon_jax.evaluate --workdir D --suite robustness few_shot
    python -m supcon_jax.evaluate --workdir D --features projection
    python -m supcon_jax.evaluate --workdir D --suite transfer_linear --on folder:PATH
    python -m supcon_jax.evaluate --workdir D --suite transfer_finetune --on tfds:dtd

Always of the run's last state. Results are added to D/evaluation.json, pictures to D/evaluation. A
suite that was interrupted goes on where it was, with the same command.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supcon_jax import command, parallel, report, transfer
from supcon_jax import config as configuration
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.calibration import (
    Reliability,
    draw_reliability,
    expected_calibration_error,
    reliability,
)
from supcon_jax.evaluation.class_means import nearest_class_mean
from supcon_jax.evaluation.confusion import confusion_matrix, draw_confusion, per_class_accuracy
from supcon_jax.evaluation.corruptions import (
    CORRUPTIONS,
    accuracy_by_severity,
    corrupted,
    mean_corruption_error,
)
from supcon_jax.evaluation.embed import Embedded, embed, knn_accuracy, top_k_accuracy
from supcon_jax.evaluation.probe import Sweep, fit_probe, predict_logits, sweep_probe
from supcon_jax.interruption import Interruptions
from supcon_jax.logs import Logs, Progress, warn
from supcon_jax.losses import l2_normalize
from supcon_jax.stages import (
    Data,
    build_stage,
    check_batch,
    create,
    open_data,
    reference_indices,
)
from supcon_jax.train import run_stage, write_json
from supcon_jax.trained import Run, Trained, load_stage, open_run
from supcon_jax.workdir import claimed, write_whole

SEVERITIES = range(1, 6)
SHOTS = (1, 2, 5, 10, 20, 50, 100)  # images a class
DRAWS = 5  # of these images


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the features of one layer of a run, on the data of that run.

    Attributes:
      run: the run.
      mesh: the devices.
      layer: "encoder" (the last state's) or "projection" (of the contrastive stage).
      normalised: features are brought to length 1.
      target: another data set, for the suites of transfer.
      grid: what fine-tuning on it tries.
    """

    run: Run
    mesh: Mesh
    layer: str
    normalised: bool
    target: transfer.Target | None = None
    grid: transfer.Grid = transfer.PROTOCOL

    @property
    def name(self) -> str:
        """For tables and records: "encoder, length 1"."""
        return self.layer + (", length 1" if self.normalised else "")

    @property
    def stage(self) -> str:
        """The stage whose last state is evaluated."""
        config = self.run.config
        if self.layer == "encoder":
            return config.stages[-1]
        return next(name for name in config.stages if config[name].head.name == "projection")

    @cached_property
    def trained(self) -> Trained:
        """That state."""
        return load_stage(self.run, self.stage, self.mesh)

    @cached_property
    def data(self) -> Data:
        """The splits of the run."""
        data = open_data(self.run.config)
        if data.train.class_names != self.run.class_names:
            raise ValueError(
                f"{data.train.name} has other classes than the run was trained on: "
                f"{len(data.train.class_names)} instead of {len(self.run.class_names)}, or of "
                "other names"
            )
        return data

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits."""
        return self.run.config[self.stage].head.name == "classifier"

    @property
    def classes(self) -> int:
        """Their number."""
        return len(self.run.class_names)

    def look(self, source: Source) -> Embedded:
        """Features and outputs of a split."""
        step, state = self.trained.eval_step, self.trained.state
        size = self.run.config.evaluation.batch_size
        with closing(Progress(source.name, 0, source.size)) as bar:
            found = embed(step, state, source, batch_size=size, mesh=self.mesh, show=bar.move)
        features = found.features if self.layer == "encoder" else found.outputs
        if self.normalised:
            features = np.asarray(l2_normalize(jnp.asarray(features)))
        return found._replace(features=features)

    @cached_property
    def train(self) -> Embedded:
        """The training images, without those that were held out."""
        return self.look(self.data.train)

    @cached_property
    def test(self) -> Embedded:
        """The test images."""
        return self.look(self.data.test)

    @cached_property
    def sweep(self) -> Sweep:
        """The fast linear probe, its penalty chosen on a part of the training images."""
        found = sweep_probe(self.train.features, self.train.labels, classes=self.classes)
        if found.on_edge:
            warn(f"the probe's l2={found.l2:.3g} is at the end of its grid")
        return found

    def logits(self, found: Embedded) -> np.ndarray:
        """Of the run's own classifier, or else of the fast probe."""
        return found.outputs if self.classifies else self.probed(found)

    def probed(self, found: Embedded) -> np.ndarray:
        """Logits of the fast probe."""
        return predict_logits(self.sweep.probe, found.features)

    @property
    def classifier(self) -> str:
        """What `logits` come from."""
        return f"the stage {self.stage}'s" if self.classifies else "the fast probe"


def standard(subject: Subject, folder: Path) -> dict[str, Any]:
    """Probe, k-NN and class means on the features, and the run's own classifier."""
    train, test, settings = subject.train, subject.test, subject.run.config.evaluation
    chosen = reference_indices(len(train.labels), settings.references)
    references = train._replace(features=train.features[chosen], labels=train.labels[chosen])
    by_mean = nearest_class_mean(test.features, train.features, train.labels)
    heldout = {f"{l2:.3g}": round(found, 5) for l2, found in subject.sweep.accuracies.items()}
    found = {
        "dim": test.features.shape[1],
        "images": {"train": len(train.labels), "test": len(test.labels)},
        "probe": {
            "l2": subject.sweep.l2,
            "heldout": heldout,
            **of_logits(subject.probed(test), test.labels),
        },
        "knn": knn_accuracy(
            test,
            references,
            neighbours=settings.neighbours,
            temperature=settings.temperature,
        ),
        "class_mean": float((by_mean == test.labels).mean()),
    }
    if subject.classifies:
        found["classifier"] = of_logits(test.outputs, test.labels)
    predicted, names = subject.logits(test).argmax(-1), subject.run.class_names
    shares = per_class_accuracy(predicted, test.labels, subject.classes)
    found["per_class"] = {
        name: None if np.isnan(share) else round(float(share), 4)
        for name, share in zip(names, shares, strict=True)
    }
    matrix = confusion_matrix(predicted, test.labels, subject.classes)
    draw_confusion(matrix, names, folder / f"confusion-{subject.layer}.png")
    return found


def of_logits(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, top-5 and expected calibration error (15 bins of equal width)."""
    found = Embedded(np.zeros((len(labels), 0), np.float32), logits, labels)
    return {
        "top1": top_k_accuracy(found, 1),
        "top5": top_k_accuracy(found, 5),
        "ece": expected_calibration_error(logits, labels),
    }


def sgd_probe(subject: Subject, folder: Path) -> dict[str, Any]:
    """Train the recipe's linear stage, with its augmentation, on the frozen encoder."""
    if subject.layer != "encoder":
        raise ValueError("the suite sgd_probe is of the encoder's output: --features encoder")
    config = subject.run.config.copy_and_resolve_references()
    config.stages = ("linear",)
    config.model.normalize = subject.normalised
    check_batch(config, "linear", subject.data, subject.mesh)
    stage = build_stage(config, "linear", subject.data, subject.mesh)
    start = create(stage, config, subject.mesh, previous=subject.trained.state)
    place = folder / f"sgd_probe{'-unit' * subject.normalised}"
    place.mkdir(exist_ok=True)
    with Interruptions().caught() as interruptions, closing(Logs(place)) as logs:
        state = run_stage(stage, start, config, subject.data, subject.mesh, logs, interruptions)
    size = config.evaluation.batch_size
    test = embed(stage.eval_step, state, subject.data.test, batch_size=size, mesh=subject.mesh)
    return {"epochs": config.linear.epochs, **of_logits(test.outputs, test.labels)}


def few_shot(subject: Subject, folder: Path) -> dict[str, Any]:
    """Probe and class means from a few training images of each class, drawn several times."""
    train, test = subject.train, subject.test
    fewest = np.bincount(train.labels, minlength=subject.classes).min()
    found: dict[str, Any] = {"draws": DRAWS}
    for shots in (k for k in SHOTS if k <= fewest):
        scores = [_from_few(train, test, shots, draw, subject.classes) for draw in range(DRAWS)]
        found[str(shots)] = {
            name: {
                "mean": float(np.mean([score[name] for score in scores])),
                "sd": float(np.std([score[name] for score in scores], ddof=1)),
            }
            for name in scores[0]
        }
    _draw_few({k: v for k, v in found.items() if k != "draws"}, folder / "few_shot.png")
    return found


def _from_few(
    train: Embedded, test: Embedded, shots: int, draw: int, classes: int
) -> dict[str, float]:
    order = np.random.RandomState(draw).permutation(len(train.labels))
    chosen = np.concatenate([order[train.labels[order] == c][:shots] for c in range(classes)])
    features, labels = train.features[chosen], train.labels[chosen]
    # scikit-learn's default penalty, C = 1: there are too few images to choose one
    probe = fit_probe(features, labels, classes=classes, l2=1 / len(labels))
    predicted = {
        "probe": predict_logits(probe, test.features).argmax(-1),
        "class_mean": nearest_class_mean(test.features, features, labels),
    }
    return {name: float((found == test.labels).mean()) for name, found in predicted.items()}


def _draw_few(found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    shots = [int(k) for k in found]
    for name, label in (("probe", "linear probe"), ("class_mean", "nearest class mean")):
        means, sds = ([found[str(k)][name][key] for k in shots] for key in ("mean", "sd"))
        axis.errorbar(shots, means, sds, marker=".", capsize=2, label=label)
    axis.set(xscale="log", xlabel="training images of each class", ylabel="test accuracy")
    axis.set_xticks(shots, map(str, shots))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def robustness(subject: Subject, folder: Path) -> dict[str, Any]:
    """Errors and calibration on corrupted test images, at five severities.

    The mCE, relative to AlexNet on ImageNet-C, is given for ImageNet's 1,000 classes only.
    """
    log = folder / f"corruptions-{subject.layer}{'-unit' * subject.normalised}.jsonl"
    of = {"config_hash": subject.run.config_hash, "steps": subject.run.steps}
    earlier = [record for record in _records(log) if record["of"] == of]
    write_whole(log, "".join(json.dumps(record) + "\n" for record in earlier))
    done = {(record["name"], record["severity"]): record for record in earlier}
    cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    with closing(Progress("corruptions", len(done), len(cases))) as progress, log.open("a") as out:
        for count, case in enumerate(cases, start=1):
            if case not in done:
                done[case] = {**_on_corrupted(subject, *case), "of": of}
                out.write(json.dumps(done[case]) + "\n")
                out.flush()
                progress.move(count)
                progress.show(count, {"heldout/top1": 1 - done[case]["error"]})
    errors = {name: [done[name, s]["error"] for s in SEVERITIES] for name in CORRUPTIONS}
    eces = {name: [done[name, s]["ece"] for s in SEVERITIES] for name in CORRUPTIONS}
    clean = of_logits(subject.logits(subject.test), subject.test.labels)
    found = {
        "classifier": subject.classifier,
        "clean": clean,
        "top1": [float(x) for x in accuracy_by_severity(errors)],
        "ece": np.mean(list(eces.values()), axis=0).tolist(),
        "mean_error": float(np.mean(list(errors.values()))),
        "errors": errors,
    }
    if subject.classes == 1000:
        score = mean_corruption_error(errors, 1 - clean["top1"])
        found |= {"mce": score.mce, "relative_mce": score.relative}
    pooled = {
        f"severity {s}": _pooled([done[n, s]["bins"] for n in CORRUPTIONS]) for s in SEVERITIES
    }
    of_clean = reliability(subject.logits(subject.test), subject.test.labels)
    draw_reliability({"clean": of_clean, **pooled}, folder / "reliability.png")
    return found


def transfer_linear(subject: Subject, folder: Path) -> dict[str, Any]:
    """Logistic regression on another data set; see `transfer.linear`."""
    assert subject.target is not None
    found = transfer.linear(subject.target, subject.look, penalties=transfer.PENALTIES)
    return {subject.target.name: found}


def transfer_finetune(subject: Subject, folder: Path) -> dict[str, Any]:
    """All of the network trained on another data set; see `transfer.finetune`."""
    if subject.layer != "encoder":
        raise ValueError("the suite transfer_finetune starts from the encoder: --features encoder")
    target = subject.target
    assert target is not None
    found = transfer.finetune(
        subject.run,
        subject.trained.state,
        target,
        subject.mesh,
        folder / "transfer" / f"{target.folder}{'-unit' * subject.normalised}",
        grid=subject.grid,
        normalised=subject.normalised,
    )
    return {target.name: found}


def _on_corrupted(subject: Subject, name: str, severity: int) -> dict[str, Any]:
    size = subject.run.config.data.image_size
    images = subject.look(corrupted(subject.data.test, name, severity, crop=size))
    logits = subject.logits(images)
    found = reliability(logits, images.labels)
    scores = of_logits(logits, images.labels)
    bins = [np.nan_to_num(x).tolist() for x in found]
    error = 1 - scores["top1"]
    return {"name": name, "severity": severity, "error": error, "ece": scores["ece"], "bins": bins}


def _pooled(bins: Sequence[Sequence[Sequence[float]]]) -> Reliability:
    """Reliability over the images of all corruptions."""
    confidence, accuracy, count = (np.array([one[k] for one in bins]) for k in range(3))
    total = count.sum(0)
    filled = np.where(total > 0, total, np.nan)
    means = [(values * count).sum(0) / filled for values in (confidence, accuracy)]
    return Reliability(means[0], means[1], total.astype(int))


def _records(file: Path) -> list[dict[str, Any]]:
    """Lines of an earlier, interrupted evaluation; half a line at the end is left out."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


SUITES: dict[str, Callable[[Subject, Path], dict[str, Any]]] = {
    "standard": standard,
    "sgd_probe": sgd_probe,
    "robustness": robustness,
    "few_shot": few_shot,
    "transfer_linear": transfer_linear,
    "transfer_finetune": transfer_finetune,
}
TRANSFER = ("transfer_linear", "transfer_finetune")  # to other data sets, whose results add up


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
) -> dict[str, Any]:
    """Run evaluation suites on a finished run; results are added to `workdir/evaluation.json`.

    Args:
      workdir: of the run.
      suites: names in `SUITES`.
      layer: whose features: "encoder", or "projection" of a contrastive stage.
      normalised: bring features to length 1; by default as the recipe's heads get them
        (`model.normalize`).
      data_dir: where the data set is now, if not where it was in training; of the suites of
        transfer TFDS's folder.
      on: the data set of the suites of transfer, see `transfer.open_target`.
      splits: of that.
      metric: of that.
      grid: of the suite transfer_finetune.

    Returns:
      The contents of evaluation.json: "suites", by features and name, and what they are of.

    Raises:
      FileNotFoundError: no finished run there, or no data set.
      ValueError: an unknown suite, no such layer, other classes than in training, a damaged or
        foreign checkpoint.
    """
    if unknown := [name for name in suites if name not in SUITES]:
        raise ValueError(f"unknown suite {unknown[0]!r}{configuration.nearest(unknown[0], SUITES)}")
    run, mesh = open_run(workdir), parallel.make_mesh()
    subject = _subject(run, mesh, layer, normalised, data_dir)
    if wanted := [name for name in suites if name in TRANSFER]:
        if on is None:
            raise ValueError(
                f"the suite {wanted[0]} needs a data set: --on tfds:NAME, folder:PATH or digits"
            )
        options: dict[str, Any] = {"splits": splits, "metric": metric, "data_dir": data_dir}
        target = transfer.open_target(run.config, on, **options)
        subject = replace(subject, target=target, grid=grid)
    elif on is not None:
        raise ValueError(f"--on is for the suites {' and '.join(TRANSFER)}")
    folder, file = run.workdir / "evaluation", run.workdir / "evaluation.json"
    with claimed(run.workdir):
        folder.mkdir(exist_ok=True)
        record: dict[str, Any] = {"config_hash": run.config_hash, "steps": run.steps, "suites": {}}
        if file.exists():
            before = json.loads(file.read_text())
            same = all(before.get(key) == record[key] for key in ("config_hash", "steps"))
            record["suites"] = before["suites"] if same else {}
        for suite in suites:
            found, results = SUITES[suite](subject, folder), record["suites"]
            of_features = results.setdefault(subject.name, {})
            earlier = of_features.get(suite, {}) if suite in TRANSFER else {}
            of_features[suite] = earlier | found
            write_json(file, record | report.circumstances())
    return record


def _subject(
    run: Run, mesh: Mesh, layer: str, normalised: bool | None, data_dir: str | None
) -> Subject:
    config = run.config
    if data_dir is not None:
        config.data.dir = data_dir
    heads = [config[name].head.name for name in config.stages]
    if layer not in ("encoder", "projection") or (layer == "projection" and layer not in heads):
        there = ["encoder", *(name for name in heads if name == "projection")]
        raise ValueError(f"no features {layer!r} in this run; there are {', '.join(there)}")
    if normalised is None:
        normalised = config.model.normalize if layer == "encoder" else False
    return Subject(run, mesh, layer, normalised)


def table(record: dict[str, Any]) -> str:
    """The main numbers, at most 80 columns wide."""
    lines = []
    for features, suites in record["suites"].items():
        for suite, found in suites.items():
            lines += [f"{features}: {suite}", *(f"  {line}" for line in ROWS[suite](found)), ""]
    return "\n".join(lines).rstrip()


def _standard_rows(found: dict[str, Any]) -> list[str]:
    rows = [f"{'':21}{'top-1':>9}{'top-5':>9}{'ECE':>8}"]
    for name, label in (("classifier", "classifier of the run"), ("probe", "linear probe")):
        if name in found:
            one = found[name]
            rows.append(f"{label:21}{one['top1']:9.2%}{one['top5']:9.2%}{one['ece']:8.3f}")
    rows.append(f"{'k-NN':21}{found['knn']:9.2%}")
    rows.append(f"{'nearest class mean':21}{found['class_mean']:9.2%}")
    ranked = sorted((s, name) for name, s in found["per_class"].items() if s is not None)
    worst = ", ".join(f"{name[:20]} {share:.1%}" for share, name in ranked[:3])
    return [*rows, f"hardest classes: {worst}"[:78]]


def _sgd_rows(found: dict[str, Any]) -> list[str]:
    scores = f"{found['top1']:9.2%}{found['top5']:9.2%}{found['ece']:8.3f}"
    return [f"{'linear stage (SGD)':21}{scores}"]


def _few_rows(found: dict[str, Any]) -> list[str]:
    rows = [f"{'images a class':16}{'probe':>18}{'class mean':>18}"]
    for shots, one in found.items():
        if shots != "draws":
            cells = (f"{s['mean']:.2%} +- {s['sd']:.2%}" for s in (one["probe"], one["class_mean"]))
            rows.append(f"{shots:16}" + "".join(f"{cell:>18}" for cell in cells))
    return rows


def _robustness_rows(found: dict[str, Any]) -> list[str]:
    rows = [f"{'severity':12}{'clean':>9}" + "".join(f"{s:>9}" for s in SEVERITIES)]
    for name, label, form in (("top1", "top-1", "9.2%"), ("ece", "ECE", "9.3f")):
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
    group.add_argument("--splits", nargs="+", default=(), help="train, (validation,) and test")
    group.add_argument("--metric", help=", ".join(transfer.METRICS))
    group.add_argument("--steps", type=int, default=protocol.steps, help="of fine-tuning")
    group.add_argument("--batch_size", type=int, default=protocol.batch_size)
    for name in ("learning_rates", "weight_decays"):
        values = getattr(protocol, name)
        group.add_argument(f"--{name}", type=float, nargs="+", default=values, help="to try")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m supcon_jax.evaluate", description="Evaluate a finished run."
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--suite", nargs="+", default=["standard"], help=", ".join(SUITES))
    parser.add_argument("--features", default="encoder", help="encoder, or projection")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="features at length 1 (default: as the run's heads get them)",
    )
    parser.add_argument("--data_dir", help="where the data set is now")
    _add_transfer(parser.add_argument_group("transfer"))
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    command.quieten()
    command.keep_compiled_programs()
    with command.errors_in_one_line(options.debug):
        record = evaluate(
            options.workdir,
            options.suite,
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
