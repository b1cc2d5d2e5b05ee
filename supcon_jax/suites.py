"""What is evaluated, and the suites: `(subject, folder for pictures) -> results`."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supcon_jax import transfer
from supcon_jax.config import config_hash, used
from supcon_jax.data.sources import Source, decodable, is_prepared, open_source
from supcon_jax.evaluation.calibration import (
    BINS,
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
from supcon_jax.parallel import make_mesh
from supcon_jax.stages import (
    Data,
    build_stage,
    check_batch,
    create,
    open_data,
    reference_indices,
)
from supcon_jax.train import run_stage
from supcon_jax.trained import Run, Trained, load_stage
from supcon_jax.workdir import reserve, write_whole

SEVERITIES = range(1, 6)
PUBLISHED = {  # corrupted images in TFDS: name, split, and its names of corruptions that differ
    "cifar10": (
        "cifar10_corrupted",
        "test",
        {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"},
    ),
    "imagenet2012": ("imagenet2012_corrupted", "validation", {}),
}
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
      target: another data set, for the suites that take one.
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
    def slug(self) -> str:
        """For names of files: "encoder-unit"."""
        return self.layer + ("-unit" if self.normalised else "")

    @property
    def stage(self) -> str:
        """The stage whose last state is evaluated."""
        return self.run.stage_of(self.layer)

    @cached_property
    def trained(self) -> Trained:
        """That state."""
        return load_stage(self.run, self.stage, self.mesh)

    @cached_property
    def data(self) -> Data:
        """The splits of the run."""
        data = open_data(self.run.config)
        if not self.run.imported and data.train.class_names != self.run.class_names:
            raise ValueError(
                f"{data.train.name} has other classes than the run was trained on: "
                f"{len(data.train.class_names)} instead of {len(self.run.class_names)}, or of "
                "other names"
            )
        return data

    @property
    def classifies(self) -> bool:
        """Whether the outputs are logits of a classifier that was trained on these features."""
        head = self.run.config[self.stage].head.name
        as_trained = self.normalised == self.run.normalises(self.layer)
        return head == "classifier" and as_trained and not self.run.imported

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label k is `class_names[k]`."""
        return self.data.train.class_names

    @property
    def classes(self) -> int:
        """Their number."""
        return len(self.class_names)

    def look(self, source: Source, show: Callable[[int], None] | None = None) -> Embedded:
        """Features and outputs of a split; `show` takes the number of images done, else a bar."""
        if show is None:
            with closing(Progress(source.name, 0, source.size)) as bar:
                return self.look(source, bar.move)
        step, state = self.trained.eval_step, self.trained.state
        size = self.run.config.evaluation.batch_size
        found = embed(step, state, source, batch_size=size, mesh=self.mesh, show=show)
        features = found.features if self.layer == "encoder" else found.outputs
        if self.normalised:
            features = np.asarray(l2_normalize(jnp.asarray(features)))
        return found._replace(features=features)

    @cached_property
    def train(self) -> Embedded:
        """The training images, without those that were held out."""
        train = self.data.train
        if self.run.config.data.on_error == "skip":
            train = decodable(train, of=train.size, warn=warn)
        return self.look(train)

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


def open_subject(run: Run, layer: str, normalised: bool | None, data_dir: str | None) -> Subject:
    """A layer of a run, on all devices.

    Args:
      run: the run.
      layer: "encoder" or "projection".
      normalised: bring features to length 1; None: as the run's heads get them.
      data_dir: where the data set is now, if not where it was in training.

    Raises:
      ValueError: no such layer.
    """
    if data_dir is not None:
        run.config.data.dir = data_dir
    run.stage_of(layer)  # or there is no such layer
    normalised = run.normalises(layer) if normalised is None else normalised
    return Subject(run, make_mesh(), layer, normalised)


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
    predicted, names = subject.logits(test).argmax(-1), subject.class_names
    shares = per_class_accuracy(predicted, test.labels, subject.classes)
    found["per_class"] = {
        name: None if np.isnan(share) else round(float(share), 4)
        for name, share in zip(names, shares, strict=True)
    }
    matrix = confusion_matrix(predicted, test.labels, subject.classes)
    draw_confusion(matrix, names, folder / f"confusion-{subject.slug}.png")
    return found


def of_logits(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, top-5, and the expected calibration error with its number of bins."""
    found = Embedded(np.zeros((len(labels), 0), np.float32), logits, labels)
    return {
        "top1": top_k_accuracy(found, 1),
        "top5": top_k_accuracy(found, 5),
        "ece": expected_calibration_error(logits, labels),
        "ece_bins": BINS,
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
    place = folder / f"sgd_probe-{subject.slug}"
    reserve(place, {**subject.run.identity, "stage": config_hash(used(config))})
    with Interruptions().caught() as interruptions, closing(Logs(place)) as logs:
        state = run_stage(stage, start, config, subject.data, subject.mesh, logs, interruptions)
    size = config.evaluation.batch_size
    test = embed(stage.eval_step, state, subject.data.test, batch_size=size, mesh=subject.mesh)
    return {"epochs": config.linear.epochs, **of_logits(test.outputs, test.labels)}


def few_shot(subject: Subject, folder: Path) -> dict[str, Any]:
    """Probe and class means from a few training images of each class, drawn several times.

    Of the run's own data or, where there is one, of the target, with its metric. Nothing is chosen,
    so that the target's validation images are training images.
    """
    target = subject.target
    if target is None:
        train, test, classes = subject.train, subject.test, subject.classes
        metric, slug = "top1", subject.slug
    else:
        train, test, classes = subject.look(target.both), subject.look(target.test), target.classes
        metric, slug = target.metric, f"{subject.slug}-on-{target.folder}"
    fewest = np.bincount(train.labels, minlength=classes).min()
    found: dict[str, Any] = {"metric": metric, "draws": DRAWS}
    for shots in (k for k in SHOTS if k <= fewest):
        scores = [_from_few(train, test, shots, draw, classes, metric) for draw in range(DRAWS)]
        found[str(shots)] = {
            name: {
                "mean": float(np.mean([score[name] for score in scores])),
                "sd": float(np.std([score[name] for score in scores], ddof=1)),
            }
            for name in scores[0]
        }
    _draw_few(found, folder / f"few_shot-{slug}.png")
    return found


def _from_few(
    train: Embedded, test: Embedded, shots: int, draw: int, classes: int, metric: str
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
    score = transfer.METRICS[metric]
    return {name: score(found, test.labels, classes) for name, found in predicted.items()}


def _draw_few(found: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axis = figure.subplots()
    shots = [int(k) for k in found if k.isdigit()]
    metric = found["metric"].replace("_", " ")
    for name, label in (("probe", "linear probe"), ("class_mean", "nearest class mean")):
        means, sds = ([found[str(k)][name][key] for k in shots] for key in ("mean", "sd"))
        axis.errorbar(shots, means, sds, marker=".", capsize=2, label=label)
    axis.set(xscale="log", xlabel="training images of each class", ylabel=f"test {metric}")
    axis.set_xticks(shots, map(str, shots))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def robustness(subject: Subject, folder: Path) -> dict[str, Any]:
    """Errors and calibration on corrupted test images, at five severities.

    The images are TFDS's `cifar10_corrupted` or `imagenet2012_corrupted` where these are prepared,
    else made by `evaluation.corruptions`. The mCE, relative to AlexNet on ImageNet-C, is given for
    ImageNet's 1,000 classes only. The ECE of a severity is the mean over the corruptions; its curve
    in the picture is of all their images.
    """
    clean_logits, images = subject.logits(subject.test), corrupted_images(subject)
    done = _on_all(subject, images, folder / f"corruptions-{subject.slug}.jsonl")
    errors = {name: [done[name, s]["error"] for s in SEVERITIES] for name in CORRUPTIONS}
    eces = {name: [done[name, s]["ece"] for s in SEVERITIES] for name in CORRUPTIONS}
    clean = of_logits(clean_logits, subject.test.labels)
    found = {
        "images": images.name,
        "classifier": subject.classifier,
        "clean": clean,
        "top1": [float(x) for x in accuracy_by_severity(errors)],
        "ece": np.mean(list(eces.values()), axis=0).tolist(),
        "ece_bins": BINS,
        "mean_error": float(np.mean(list(errors.values()))),
        "errors": errors,
    }
    if _is_imagenet(subject.class_names):
        score = mean_corruption_error(errors, 1 - clean["top1"])
        found |= {"mce": score.mce, "relative_mce": score.relative}
    pooled = {
        f"severity {s}": _pooled([done[n, s]["bins"] for n in CORRUPTIONS]) for s in SEVERITIES
    }
    curves = {"clean": reliability(clean_logits, subject.test.labels), **pooled}
    in_legend = dict(zip(curves, [clean["ece"], *found["ece"]], strict=True))
    draw_reliability(curves, folder / f"reliability-{subject.slug}.png", errors=in_legend)
    return found


def _is_imagenet(class_names: Sequence[str]) -> bool:
    """Whether these are the WordNet ids of ImageNet's 1,000 classes: so many, first and last."""
    ids, ends = sorted(class_names), ("n01440764", "n15075141")
    known = all(re.fullmatch(r"n\d{8}", name) for name in ids)
    return known and len(ids) == 1000 and (ids[0], ids[-1]) == ends


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
        folder / "transfer" / f"{target.folder}-{subject.slug}",
        grid=subject.grid,
        normalised=subject.normalised,
    )
    return {target.name: found}


class Corrupted(NamedTuple):
    """Corrupted test images: what they are, and a source for each corruption and severity."""

    name: str
    make: Callable[[str, int], Source]


def corrupted_images(subject: Subject) -> Corrupted:
    """TFDS's corrupted images of the test split where all of them are prepared, else our own."""
    data = subject.run.config.data
    if data.source == "tfds" and data.name in PUBLISHED:
        name, split, renamed = PUBLISHED[data.name]

        def of(corruption: str, severity: int) -> str:
            return f"{name}/{renamed.get(corruption, corruption)}_{severity}"

        cases = [of(corruption, s) for corruption in CORRUPTIONS for s in SEVERITIES]
        prepared = sum(is_prepared(case, data.dir) for case in cases)
        if prepared == len(cases) and data.test_split == split:
            # made at the size that is evaluated: not to be enlarged and cut again
            settings = dict(load_size=data.image_size, channels=data.channels, directory=data.dir)
            read = partial(open_source, "tfds", split, memory_limit_gb=0, **settings)
            return Corrupted(name, lambda corruption, s: read(name=of(corruption, s)))
        if prepared:
            warn(f"{prepared} of {len(cases)} parts of {name} are prepared: it is not used")
    own = partial(corrupted, subject.data.test, crop=data.image_size)
    return Corrupted("supcon_jax.evaluation.corruptions", own)


def _on_all(
    subject: Subject, images: Corrupted, log: Path
) -> dict[tuple[str, int], dict[str, Any]]:
    """What is found on each corruption and severity, or was before the suite was interrupted."""
    of = {**subject.run.identity, "images": images.name}
    earlier = [record for record in _records(log) if record.get("of") == of]
    write_whole(log, "".join(json.dumps(record) + "\n" for record in earlier))
    done = {(record["name"], record["severity"]): record for record in earlier}
    cases = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]
    size = subject.data.test.size
    bar = Progress("corruptions", size * len(done), size * len(cases))
    with closing(bar), log.open("a") as out:
        for place, (name, severity) in enumerate(cases):
            if (name, severity) in done:
                continue

            def show(count: int, before: int = size * place) -> None:
                bar.move(before + count)

            found = _on_corrupted(subject, images.make(name, severity), show)
            record = {"name": name, "severity": severity, **found, "of": of}
            out.write(json.dumps(record) + "\n")
            out.flush()
            bar.show(size * (place + 1), {"heldout/top1": 1 - found["error"]})
            done[name, severity] = record
    return done


def _on_corrupted(subject: Subject, source: Source, show: Callable[[int], None]) -> dict[str, Any]:
    images = subject.look(source, show)
    logits = subject.logits(images)
    found = reliability(logits, images.labels)
    scores = of_logits(logits, images.labels)
    bins = [np.nan_to_num(x).tolist() for x in found]
    return {"error": 1 - scores["top1"], "ece": scores["ece"], "bins": bins}


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
ANYWHERE = ("few_shot",)  # on the run's own data, or on another data set
