"""Transfer of a run's encoder to other data sets, by the two protocols of SimCLR.

On every data set the hyper-parameters are chosen on validation images, with these as part of the
training images for the last fit, which is scored on the test images once:

- linear: logistic regression on the frozen features, 45 penalties;
- fine-tuning: all of the network is trained on, 7 learning rates times 8 weight decays.

References:
  Chen et al., 2020, https://arxiv.org/abs/2002.05709, appendix B.8 (protocols); Kornblith et al.,
  2019, https://arxiv.org/abs/1805.08974 (data sets and metrics); Khosla et al., 2020,
  https://arxiv.org/abs/2004.11362, Table 4; https://github.com/linusericsson/ssl-transfer, where
  the penalty is that of the sum over the images and a fifth of the training images is held out.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.data.selection import stratified_share
from supcon_jax.data.sources import Source, join, open_source, split_names, subset
from supcon_jax.evaluation.confusion import per_class_accuracy
from supcon_jax.evaluation.embed import Embedded, embed
from supcon_jax.evaluation.probe import fit_probe, predict_logits, sweep_probe
from supcon_jax.interruption import Interruptions
from supcon_jax.logs import Logs, warn
from supcon_jax.stages import Data, Stage, build_stage, check_batch, create
from supcon_jax.state import TrainState
from supcon_jax.train import run_stage
from supcon_jax.trained import Run
from supcon_jax.workdir import reserve, write_json

PENALTIES = tuple(np.logspace(-6, 5, 45).tolist())
HOLDOUT = 0.2  # share of the training images to choose on, where no split is there for that
SAVE_EVERY = 2000  # steps of fine-tuning; an interrupted point goes on from there


def top1(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Share of the images that are predicted right."""
    del classes  # for the same arguments as the other metric has
    return float((predicted == labels).mean())


def mean_per_class(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Mean over the classes, of those that have images, of their shares."""
    return float(np.nanmean(per_class_accuracy(predicted, labels, classes)))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "top1": top1,
    "mean_per_class": mean_per_class,
}


class Known(NamedTuple):
    """How a data set of the protocol is scored, and its splits: train, (validation,) test."""

    metric: str = "top1"
    splits: tuple[str, ...] = ("train", "test")


# Of the 12 data sets of Table 4, those that TFDS has with one label an image, by their names there.
# FGVC Aircraft (mean per class; train, validation and test) and Birdsnap (top-1) can be folders;
# VOC 2007, which has several labels an image and is scored by the mean average precision, cannot.
OFFICIAL = ("train", "validation", "test")
DATASETS: dict[str, Known] = {
    "food101": Known(splits=("train", "validation")),  # TFDS calls the test images so
    "cifar10": Known(),
    "cifar100": Known(),
    "sun397/standard-part1-120k": Known(),
    "cars196": Known(),
    "dtd": Known(splits=OFFICIAL),
    "oxford_iiit_pet": Known("mean_per_class"),
    "caltech101": Known("mean_per_class"),
    "oxford_flowers102": Known("mean_per_class", OFFICIAL),
}


@dataclass(frozen=True)
class Target:
    """A data set to transfer to.

    Attributes:
      name: as it was asked for, "tfds:dtd".
      fields: of `config.data`, where they are other than the run's.
      train: images to fit on while choosing.
      validation: images to choose on.
      both: these and those, for the last fit.
      test: images for the last score.
      metric: name in `METRICS`.
    """

    name: str
    fields: dict[str, Any]
    train: Source
    validation: Source
    both: Source
    test: Source
    metric: str

    @property
    def classes(self) -> int:
        """Their number."""
        return len(self.train.class_names)

    @property
    def folder(self) -> str:
        """The name, fit for a folder."""
        return re.sub(r"[^\w.]+", "-", self.name)

    @property
    def images(self) -> dict[str, int]:
        """Numbers of images."""
        return {part: getattr(self, part).size for part in ("train", "validation", "test")}

    def score(self, predicted: np.ndarray, labels: np.ndarray) -> float:
        """The metric."""
        return METRICS[self.metric](predicted, labels, self.classes)


def open_target(
    config: ConfigDict,
    on: str,
    *,
    splits: Sequence[str] = (),
    metric: str | None = None,
    data_dir: str | None = None,
) -> Target:
    """The splits of a data set to transfer to, with images as the run's encoder takes them.

    Images are brought to the run's `data.load_size` and `data.channels`: coloured images are made
    grey for an encoder of grey ones.

    Args:
      config: of the run.
      on: "tfds:NAME", "folder:PATH" (of SPLIT/CLASS/IMAGE) or "digits".
      splits: names of train, validation and test; of two, of train and test, and a fifth of the
        training images of each class is held out to choose on. By default as `DATASETS` has it, or
        those of "train", "validation" or "val", and "test" that are there.
      metric: name in `METRICS`; by default as `DATASETS` has it, or "top1".
      data_dir: TFDS's, if not the run's own or the default.

    Raises:
      FileNotFoundError: no such data set or split.
      ValueError: another form of `on` or of `splits`, an unknown metric, or splits with different
        classes.
    """
    fields = _fields(config, on, data_dir)
    known = DATASETS.get(fields["name"], Known())
    metric = metric or known.metric
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}{configuration.nearest(metric, METRICS)}")
    if not splits and fields["name"] in DATASETS:
        splits = known.splits
    splits = tuple(splits) or _default_splits(fields)
    if len(splits) not in (2, 3):
        raise ValueError(f"splits must be train, (validation,) and test; got {', '.join(splits)}")
    found = [_open(config, fields, split) for split in splits]
    for other in found[1:]:
        if other.class_names != found[0].class_names:
            raise ValueError(
                f"{found[0].name} and {other.name} must have the same classes, to be scored "
                f"together; they have {len(found[0].class_names)} and {len(other.class_names)}, or "
                "others by name"
            )
    train, validation, both = _parts(*found[:-1])
    fields |= {"train_split": splits[0], "test_split": splits[-1]}
    return Target(on, fields, train, validation, both, found[-1], metric)


def _fields(config: ConfigDict, on: str, data_dir: str | None) -> dict[str, Any]:
    """Where the target is, and none of the run's changes to its training images."""
    source, _, rest = on.partition(":")
    if source not in ("tfds", "folder", "digits") or bool(rest) != (source != "digits"):
        raise ValueError(f"expected tfds:NAME, folder:PATH or digits to transfer to; got {on!r}")
    own = config.data.dir if config.data.source == "tfds" else ""
    directories = {"tfds": own if data_dir is None else data_dir, "folder": rest, "digits": ""}
    unchanged = dict(holdout=0.0, fraction=1.0, per_class=0, imbalance=1.0, label_noise=0.0)
    name = rest if source == "tfds" else ""
    return dict(source=source, name=name, dir=directories[source], **unchanged)


def _default_splits(fields: dict[str, Any]) -> tuple[str, ...]:
    there = split_names(fields["source"], name=fields["name"], directory=fields["dir"])
    validation = [name for name in ("validation", "val") if name in there][:1]
    if "test" in there or not validation:
        return ("train", *validation, "test")
    return ("train", *validation)  # all that there is to test on


def _open(config: ConfigDict, fields: dict[str, Any], split: str) -> Source:
    data = config.data
    return open_source(
        fields["source"],
        split,
        name=fields["name"],
        directory=fields["dir"],
        load_size=data.load_size,
        channels=data.channels,
        memory_limit_gb=data.memory_limit_gb,
    )


def _parts(whole: Source, validation: Source | None = None) -> tuple[Source, Source, Source]:
    """Training images, those to choose on, and both."""
    if validation is not None:
        return whole, validation, join(whole, validation, f"{whole.name} and {validation.name}")
    held = stratified_share(whole.labels(), HOLDOUT)
    train = subset(whole, np.flatnonzero(~held), f"{whole.name} (without validation)")
    return train, subset(whole, np.flatnonzero(held), f"{whole.name} (validation)"), whole


def linear(
    target: Target,
    look: Callable[[Source], Embedded],
    *,
    penalties: Sequence[float] = PENALTIES,
) -> dict[str, Any]:
    """The linear protocol: logistic regression on the features of the frozen encoder, by L-BFGS.

        minimise  sum_i -log softmax(x_i W + b)_{y_i}  +  (penalty / 2) |W|^2

    that is `fit_probe` with l2 = penalty / images, and scikit-learn's C = 1 / penalty. Each penalty
    is fitted to the training images and scored on the validation images; the best (see
    `sweep_probe`) is fitted to both and scored on the test images. SimCLR does not say whether
    its penalties are for the sum or the mean; here they are for the sum, as in ssl-transfer.

    Args:
      target: the data set.
      look: features of a split, from the middle of each image.
      penalties: to choose from, each above 0.

    Returns:
      "metric", "images", the chosen "penalty", the metric on "validation" and "test", "top1" on
      test, and the "grid": the metric on validation of each penalty.

    Raises:
      ValueError: no penalty, or one that is not above 0.
    """
    train, validation, test = map(look, (target.train, target.validation, target.test))
    features = np.concatenate([train.features, validation.features])
    labels, count = np.concatenate([train.labels, validation.labels]), len(train.labels)
    sweep = sweep_probe(
        features,
        labels,
        classes=target.classes,
        penalties=[penalty / count for penalty in penalties],
        held=np.arange(len(labels)) >= count,
        score=target.score,
    )
    penalty = sweep.l2 * count
    if sweep.on_edge:
        warn(f"the penalty {penalty:.3g} chosen for {target.name} is at the end of its grid")
    final = fit_probe(
        features, labels, classes=target.classes, l2=penalty / len(labels), start=sweep.probe
    )
    predicted = predict_logits(final, test.features).argmax(axis=-1)
    return {
        "metric": target.metric,
        "images": target.images,
        "penalty": penalty,
        "validation": sweep.accuracies[sweep.l2],
        "test": target.score(predicted, test.labels),
        "top1": top1(predicted, test.labels, target.classes),
        "grid": {f"{l2 * count:.3g}": found for l2, found in sorted(sweep.accuracies.items())},
    }


class Grid(NamedTuple):
    """What fine-tuning tries, and for how long.

    Attributes:
      learning_rates: peaks of the cosine.
      weight_decays: what a weight loses at each step at the peak, as a share of it; the optimizer's
        weight decay is this divided by the learning rate.
      steps: of each run.
      batch_size: images.
    """

    learning_rates: tuple[float, ...] = tuple(np.logspace(-4, -1, 7).tolist())
    weight_decays: tuple[float, ...] = (0.0, *np.logspace(-6, -3, 7).tolist())
    steps: int = 20_000
    batch_size: int = 256


PROTOCOL = Grid()


def finetune(
    run: Run,
    state: TrainState,
    target: Target,
    mesh: Mesh,
    folder: Path,
    *,
    grid: Grid = PROTOCOL,
    normalised: bool = False,
) -> dict[str, Any]:
    """The fine-tuning protocol: every point of the grid is a run of the stage `finetune`.

    Each starts from the encoder of the run and a new classifier. The point that is best on the
    validation images (of equally good ones the first of the grid) is run again on training and
    validation images, and scored on the test images. A point that diverges has no score. Augment,
    schedule and the like are the run's `config.finetune`.

    Finished points are found in `folder` and not run again; one that was interrupted goes on.

    Args:
      run: the run.
      state: of its last stage, with the encoder to start from.
      target: the data set.
      mesh: the devices.
      folder: gets a folder for each point, and "best" with the last checkpoint of the last run.
      grid: what to try.
      normalised: the classifier gets features of length 1.

    Returns:
      "metric", "images", "steps", "batch_size", the chosen "learning_rate" and "weight_decay", the
      metric on "validation" and "test", "top1" on test, and the "grid".

    Raises:
      ValueError: a grid without points or with one that cannot be, or a batch larger than the
        training images.
      FloatingPointError: all points diverge, or the last run does.
    """
    _check(grid)
    points: list[dict[str, Any]] = []
    with Interruptions().caught() as interruptions:
        fit = _Fitting(run, state, target, mesh, grid, normalised, interruptions).point
        for rate, decay in product(grid.learning_rates, grid.weight_decays):
            warn(f"{target.name}: learning rate {rate:.3g}, weight decay {decay:.3g}")
            place = folder / f"lr-{rate:.3g}-wd-{decay:.3g}"
            found = fit(rate, decay, target.train, target.validation, place, may_diverge=True)
            points.append({"learning_rate": rate, "weight_decay": decay, "validation": found[0]})
        done = [point for point in points if point["validation"] is not None]
        if not done:
            raise FloatingPointError(
                f"fine-tuning on {target.name} diverges with all of the learning rates "
                f"{', '.join(f'{rate:.3g}' for rate in grid.learning_rates)}: try lower ones"
            )
        best = max(done, key=lambda point: point["validation"])
        rate, decay = best["learning_rate"], best["weight_decay"]
        test = fit(rate, decay, target.both, target.test, folder / "best", may_diverge=False)
    return {
        "metric": target.metric,
        "images": target.images,
        "steps": grid.steps,
        "batch_size": grid.batch_size,
        **best,
        "test": test[0],
        "top1": test[1],
        "grid": points,
    }


def _check(grid: Grid) -> None:
    rates, decays = grid.learning_rates, grid.weight_decays
    if not rates or not decays or min(rates) <= 0 or min(decays) < 0:
        raise ValueError(
            "fine-tuning needs learning rates above 0 and weight decays of 0 or more, at least one "
            f"of each; got {list(rates)} and {list(decays)}"
        )
    if grid.steps < 1 or grid.batch_size < 1:
        raise ValueError(
            f"fine-tuning needs steps and a batch size of 1 or more; got {grid.steps} and "
            f"{grid.batch_size}"
        )


@dataclass(frozen=True)
class _Fitting:
    """What all points of a grid share."""

    run: Run
    state: TrainState
    target: Target
    mesh: Mesh
    grid: Grid
    normalised: bool
    interruptions: Interruptions

    def point(
        self,
        rate: float,
        decay: float,
        train: Source,
        scored: Source,
        place: Path,
        *,
        may_diverge: bool,
    ) -> tuple[float | None, float | None]:
        """Metric and top-1 on `scored` after training on `train`, from an earlier time if known."""
        options: dict[str, Any] = {"grid": self.grid, "normalised": self.normalised}
        config = finetuning_config(
            self.run.config, self.target, train.size, rate=rate, decay=decay, **options
        )
        of = {
            **self.run.identity,
            "images": [train.size, scored.size],
            "metric": self.target.metric,
            "stage": configuration.config_hash(configuration.used(config)),
            "dir": self.target.fields["dir"],
        }
        reserve(place, of)
        file = place / "point.json"
        if file.exists():
            return tuple(json.loads(file.read_text())["score"])
        score: tuple[float | None, float | None]
        try:
            score = self.trained(config, train, scored, place)
        except FloatingPointError:
            if not may_diverge:
                raise
            score = None, None
            warn(f"fine-tuning with learning rate {rate:.3g} and weight decay {decay:.3g} diverged")
        write_json(file, {"learning_rate": rate, "weight_decay": decay, "score": score})
        if may_diverge:  # one of many, whose parameters nobody needs
            shutil.rmtree(place / "checkpoints", ignore_errors=True)
        return score

    def trained(
        self, config: ConfigDict, train: Source, scored: Source, place: Path
    ) -> tuple[float, float]:
        """Metric and top-1 on `scored` after training on `train`."""
        data, size = Data(train, scored, train, scored), config.evaluation.batch_size
        stage, first = start(config, self.state, data, self.mesh)
        with closing(Logs(place)) as logs:
            last = run_stage(stage, first, config, data, self.mesh, logs, self.interruptions)
        found = embed(stage.eval_step, last, scored, batch_size=size, mesh=self.mesh)
        predicted, classes = found.outputs.argmax(axis=-1), self.target.classes
        return self.target.score(predicted, found.labels), top1(predicted, found.labels, classes)


def finetuning_config(
    config: ConfigDict,
    target: Target,
    images: int,
    *,
    rate: float,
    decay: float,
    grid: Grid = PROTOCOL,
    normalised: bool = False,
) -> ConfigDict:
    """The configuration of one point of the grid.

    Args:
      config: of the run.
      target: the data set.
      images: to train on.
      rate: peak of the learning rate.
      decay: weight decay times learning rate.
      grid: its steps and batch size.
      normalised: the classifier gets features of length 1.
    """
    config = config.copy_and_resolve_references()
    config.stages = ("finetune",)
    config.data.update(target.fields)
    per_epoch = max(1, images // grid.batch_size)
    keep = max(1 - 10 / per_epoch, 0.9)
    config.model.update(normalize=normalised, batch_norm_momentum=keep)
    config.evaluation.every_epochs = 0.0
    config.checkpoint.update(every_epochs=SAVE_EVERY / per_epoch, keep=1)
    config.finetune.update(batch_size=grid.batch_size, epochs=grid.steps / per_epoch)
    config.finetune.schedule.learning_rate = rate
    config.finetune.optimizer.weight_decay = decay / rate
    return config


def start(
    config: ConfigDict, state: TrainState, data: Data, mesh: Mesh
) -> tuple[Stage, TrainState]:
    """The stage `finetune`, and the state it starts from: the encoder of `state`."""
    check_batch(config, "finetune", data, mesh)
    stage = build_stage(config, "finetune", data, mesh)
    return stage, create(stage, config, mesh, previous=state)
