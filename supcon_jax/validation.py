"""What each field of a configuration may be: one line for what it may not."""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, get_args

import optax
from ml_collections import ConfigDict

from supcon_jax.config import STAGES, base, flatten, nearest
from supcon_jax.data.augment import JITTER_FORMS
from supcon_jax.data.policies import MIXES, POLICIES, make_policy
from supcon_jax.data.randaugment import TABLES
from supcon_jax.data.sources import SOURCES
from supcon_jax.losses.pairs import ContrastMode, DenominatorMode, Exchange
from supcon_jax.models import DEPTHS, ENCODERS
from supcon_jax.models.heads import INITIALIZERS
from supcon_jax.models.resnet import Shortcut, Stem
from supcon_jax.models.vit import SIZES, Pool
from supcon_jax.objectives import LOSSES
from supcon_jax.optimizers import EXCLUDE, OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule

CHOICES: dict[str, Collection[Any]] = {  # a dictionary: users may add to it
    "data.source": SOURCES,
    "data.channels": (1, 3),
    "data.on_error": ("error", "skip"),
    "model.name": ENCODERS,
    "model.depth": DEPTHS.keys(),
    "model.stem": get_args(Stem),
    "model.first_shortcut": get_args(Shortcut),
    "model.size": SIZES.keys(),
    "model.pool": get_args(Pool),
    "model.batch_norm": ("global", "local"),
    "model.dtype": ("float32", "bfloat16"),
    "objective.loss": LOSSES,
    "objective.contrast_mode": get_args(ContrastMode),
    "objective.denominator_mode": get_args(DenominatorMode),
    "objective.exchange": get_args(Exchange),
    "start_from": ("scratch", "previous"),
    "optimizer.name": OPTIMIZERS.keys(),
    "optimizer.exclude": EXCLUDE.keys(),
    "schedule.name": SCHEDULES,
    "augment.name": POLICIES.keys(),
    "augment.jitter_form": JITTER_FORMS.keys(),
    "augment.table": TABLES.keys(),
    "mix": ("none", *MIXES),
    "head.kernel_init": INITIALIZERS.keys(),
    "frozen": ((), ("encoder",)),
    **{f"{name}.objective.name": (base()[name].objective.name,) for name in STAGES},
    **{f"{name}.head.name": (base()[name].head.name,) for name in STAGES},
}

ANY = float("inf")
RANGES: dict[str, tuple[float, float]] = {  # both ends are allowed
    "seed": (0, 2**31 - 1),
    "data.load_size": (1, 8192),
    "data.memory_limit_gb": (0, ANY),
    "data.workers": (-1, 1024),
    "data.fraction": (0, 1),
    "data.per_class": (0, ANY),
    "data.imbalance": (1, ANY),
    "data.label_noise": (0, 1),
    "model.patch": (1, 8192),
    "model.groups": (1, ANY),
    "model.group_width": (1, ANY),
    "evaluation.every_epochs": (0, ANY),
    "evaluation.batch_size": (1, ANY),
    "evaluation.neighbours": (1, ANY),
    "evaluation.references": (1, ANY),
    "checkpoint.every_epochs": (0, ANY),
    "checkpoint.keep": (1, 1000),
    "log.every_steps": (1, ANY),
    "views": (1, 1000),
    "batch_size": (1, ANY),
    "warmup_epochs": (0, ANY),
    "samples_per_class": (0, ANY),
    "skip_nonfinite": (0, ANY),
    "queue.from_epoch": (0, ANY),
    "objective.block_size": (0, ANY),
    "objective.label_smoothing": (0, 1),
    "objective.margin": (1, 10),
    "objective.margin_epochs": (0, ANY),
    "augment.shift": (0, 8192),
    "augment.cutout": (0, 8192),
    "augment.layers": (0, 100),
}
POSITIVE = (
    "model.width",
    "evaluation.temperature",
    "epochs",
    "loss_scale",
    "mix_alpha",
    "objective.temperature",
    "schedule.decay_epochs",
)
TUPLES: dict[str, tuple[type, int, str]] = {  # type, length (0: any), and how a message calls it
    "stages": (str, 0, "names of stages, such as ('supcon', 'linear')"),
    "data.mean": (float, 0, "numbers"),
    "data.std": (float, 0, "numbers"),
    "head.layers": (int, 0, "sizes, such as (2048, 128)"),
    "optimizer.betas": (float, 2, "two numbers"),
    "schedule.boundaries": (float, 0, "epochs"),
    "augment.crop_area": (float, 2, "two shares of the image"),
    "augment.crop_ratio": (float, 2, "two ratios"),
}


def validate(config: ConfigDict) -> None:
    """Check every value that has a fixed set of choices or a range, before any data is read.

    Raises:
      ValueError: one line with the field, what it may be, and what it is.
    """
    for path, value in flatten(config).items():
        _check_value(path, value)
    data = config.data
    _require(
        0 < data.test_share < 1, "data.test_share", "a share above 0 and below 1", data.test_share
    )
    _require(0 <= data.holdout < 1, "data.holdout", "a share from 0 to below 1", data.holdout)
    _require(
        0 < data.image_size <= data.load_size,
        "data.image_size",
        f"from 1 to data.load_size ({data.load_size})",
        data.image_size,
    )
    kept = config.model.batch_norm_momentum
    _require(0 <= kept < 1, "model.batch_norm_momentum", "from 0 to below 1", kept)
    for field in ("mean", "std"):
        values = data[field]
        _require(len(values) == data.channels, f"data.{field}", f"{data.channels} numbers", values)
    _require(len(config.stages) > 0, "stages", "one stage or more", config.stages)
    different = len(set(config.stages)) == len(config.stages)
    _require(different, "stages", "different stages, as each runs once", config.stages)
    for name in config.stages:
        if name not in STAGES:
            raise ValueError(f"config.stages: no stage {name!r}{nearest(name, STAGES)}")
        _check_stage(name, config[name], data.image_size)
    first = config.stages[0]
    given = config[first].start_from == "scratch" or bool(config.model.weights)
    expected = "scratch for the first stage, or config.model.weights the file of an encoder"
    _require(given, f"{first}.start_from", expected, config[first].start_from)


def _check_value(path: str, value: Any) -> None:
    """One value by itself, by its path or that within its stage."""
    within = path.partition(".")[2]
    if (choices := CHOICES.get(path, CHOICES.get(within))) and value not in choices:
        allowed = ", ".join(map(str, choices))
        hint = nearest(str(value), map(str, choices))
        if isinstance(choices, dict) and "did you mean" not in hint:
            hint = "; one of your own is added to that table first, see docs/extending.md"
        raise ValueError(f"config.{path} must be one of {allowed}; got {value!r}{hint}")
    if isinstance(value, float):
        _require(math.isfinite(value), path, "finite", value)
    if limits := RANGES.get(path, RANGES.get(within)):
        lowest, highest = limits
        expected = f"{lowest} or more" if highest == ANY else f"from {lowest} to {highest}"
        _require(lowest <= value <= highest, path, expected, value)
    if path in POSITIVE or within in POSITIVE:
        _require(value > 0, path, "positive", value)
    if expected_tuple := TUPLES.get(path, TUPLES.get(within)):
        kind, length, expected = expected_tuple
        fits = all(_is_of(kind, x) for x in value) and length in (0, len(value))
        _require(fits, path, expected, value)


def _is_of(kind: type, value: Any) -> bool:
    """An integer is a number too, and a number is finite."""
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _check_stage(name: str, stage: ConfigDict, image_size: int) -> None:
    shorter = f"below config.{name}.epochs={stage.epochs:g}, such as {stage.epochs / 10:g}"
    _require(
        stage.warmup_epochs < stage.epochs, f"{name}.warmup_epochs", shorter, stage.warmup_epochs
    )
    _require(0 <= stage.average < 1, f"{name}.average", "from 0 to below 1", stage.average)
    parts, expected = stage.micro_batches, f"a divisor of the batch size {stage.batch_size}"
    divides = parts > 0 and stage.batch_size % parts == 0
    _require(divides, f"{name}.micro_batches", expected, parts)
    _check_mix(name, stage)
    _check_parts(name, stage, image_size)
    if stage.objective.name == "contrastive":
        _check_contrastive(name, stage)
    if stage.queue.size != 0:
        _check_queue(name, stage)


def _check_parts(name: str, stage: ConfigDict, image_size: int) -> None:
    """What makes the policy, the optimizer and the schedule refuses what they cannot be."""
    with _within(f"{name}.augment"):
        make_policy(size=image_size, **stage.augment)
    with _within(f"{name}.optimizer"):
        make_optimizer(schedule=optax.constant_schedule(0.0), **stage.optimizer)
    options = stage.schedule.to_dict()
    del options["decay_epochs"]  # of how many steps an epoch has, nothing is known yet
    boundaries = options.pop("boundaries")
    increasing = all(a < b for a, b in pairwise(boundaries)) and min(boundaries, default=0) >= 0
    expected = "increasing epochs, 0 or more"
    _require(increasing, f"{name}.schedule.boundaries", expected, boundaries)
    with _within(f"{name}.schedule"):
        make_schedule(steps=1, **options)


@contextmanager
def _within(part: str) -> Iterator[None]:
    """Errors that begin with a field get the path to it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.{part}.{error}") from None


def _check_contrastive(name: str, stage: ConfigDict) -> None:
    cap, expected = stage.objective.positives_cap, "-1 or a multiple of the views"
    multiple = cap == -1 or (cap >= 0 and cap % stage.views == 0)
    _require(multiple, f"{name}.objective.positives_cap", expected, cap)
    others = stage.objective.use_labels and cap != 0
    expected = "2 or more where other images are no positives (use_labels=False, positives_cap=0)"
    _require(stage.views >= 2 or others, f"{name}.views", expected, stage.views)
    layers = stage.head.layers
    _require(min(layers, default=0) > 0, f"{name}.head.layers", "one size or more", layers)
    init = stage.head.kernel_init
    _require(init != "zeros", f"{name}.head.kernel_init", "other than zeros, which stay so", init)
    if stage.objective.loss == "triplet":
        _check_triplet(name, stage)


def _check_triplet(name: str, stage: ConfigDict) -> None:
    fixed = dict(use_labels=True, contrast_mode="all", denominator_mode="all", positives_cap=-1,
                 exchange="gather", block_size=0)  # fmt: skip
    for field, value in fixed.items():
        given = stage.objective[field]
        _require(given == value, f"{name}.objective.{field}", f"{value!r} for triplet", given)
    _require(stage.queue.size == 0, f"{name}.queue.size", "0 for triplet", stage.queue.size)


def _check_queue(name: str, stage: ConfigDict) -> None:
    queue, objective = stage.queue, stage.objective
    contrastive = objective.name == "contrastive" and stage.views >= 2
    expected = "0 but for a contrastive stage with two views or more"
    _require(contrastive, f"{name}.queue.size", expected, queue.size)
    keys = stage.batch_size * (stage.views - 1)
    expected = f"0, or at least the {keys} features that a batch adds"
    _require(queue.size >= keys, f"{name}.queue.size", expected, queue.size)
    _require(0 <= queue.momentum < 1, f"{name}.queue.momentum", "from 0 to below 1", queue.momentum)
    expected = "one beside a queue: the other views have no gradient"
    mode = objective.contrast_mode
    _require(mode == "one", f"{name}.objective.contrast_mode", expected, mode)
    expected = "-1 beside a queue, whose positives all count"
    cap = objective.positives_cap
    _require(cap == -1, f"{name}.objective.positives_cap", expected, cap)


def _check_mix(name: str, stage: ConfigDict) -> None:
    if stage.mix == "none":
        return
    if stage.objective.name == "cross_entropy":
        expected = "1 for mixed images, which have no class of their own"
        margin = stage.objective.margin
        _require(margin == 1, f"{name}.objective.margin", expected, margin)
    one_label = stage.objective.name == "cross_entropy" and stage.views == 1
    expected = "none but for cross_entropy with one view: a mixed image has no class of its own"
    _require(one_label, f"{name}.mix", expected, stage.mix)


def _require(condition: bool, field: str, expected: str, value: Any) -> None:
    if not condition:
        raise ValueError(f"config.{field} must be {expected}; got {value!r}")
