"""From a configuration to what runs: the data, and the model, optimizer and steps of each stage."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax import momentum, parallel
from supcon_jax.data import pipeline, policies
from supcon_jax.data.decode import usable_cores
from supcon_jax.data.selection import select, stratified_share
from supcon_jax.data.sources import (
    Source,
    decodable,
    hold_out,
    in_memory,
    in_memory_if_small,
    is_small,
    open_source,
    subset,
)
from supcon_jax.data.streaming import stream
from supcon_jax.logs import warn
from supcon_jax.models import Model, make_encoder, make_head
from supcon_jax.models.torch_weights import load_torch_encoder
from supcon_jax.objectives import INDEPENDENT, OBJECTIVES, Objective
from supcon_jax.optimizers import make_optimizer, make_schedule
from supcon_jax.state import TrainState, create_state, encoder_of, from_variables, skipping
from supcon_jax.steps import eval_step, train_step


@dataclass(frozen=True)
class Data:
    """The splits of a run."""

    train: Source
    heldout: Source  # training images that are looked at during training, perhaps none
    references: Source  # training images that the k-NN compares with
    test: Source


@dataclass(frozen=True)
class Stage:
    """What a stage of the recipe consists of, built from its configuration."""

    name: str
    model: Model
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    steps: int
    steps_per_epoch: int
    images_per_step: int  # views of images, that is passes through the encoder
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., dict[str, jax.Array]]


def open_data(config: ConfigDict) -> Data:
    """The splits that a configuration names, checked against it.

    Where bad images are skipped, all splits but the test's are without them, save training images
    that are streamed: `stream` skips those.
    """
    read = partial(
        open_source,
        config.data.source,
        name=config.data.name,
        directory=config.data.dir,
        load_size=config.data.load_size,
        channels=config.data.channels,
        memory_limit_gb=0,  # images that are not chosen are not decoded
    )
    limit = {"memory_limit_gb": config.data.memory_limit_gb}
    whole = read(config.data.train_split)
    if config.data.test_split == config.data.train_split:
        whole, test = split_off(whole, config.data.test_share)
    else:
        test = read(config.data.test_split)
    if whole.class_names != test.class_names:
        differing = sorted(set(whole.class_names) ^ set(test.class_names))
        raise ValueError(
            f"{whole.name} and {test.name} must have the same classes; only one of them has "
            f"{', '.join(differing[:5])}"
        )
    train, heldout = hold_out(whole, config.data.holdout)
    train = select(
        train,
        fraction=config.data.fraction,
        per_class=config.data.per_class,
        imbalance=config.data.imbalance,
        label_noise=config.data.label_noise,
    )
    skips = config.data.on_error == "skip"
    good = partial(decodable, of=whole.size, warn=warn) if skips else lambda source: source
    train = in_memory(good(train)) if is_small(train, **limit) else train
    chosen = reference_indices(train.size, config.evaluation.references)
    return Data(
        train,
        in_memory_if_small(good(heldout), **limit),
        good(subset(train, chosen, "references")),
        in_memory_if_small(test, **limit),
    )


def split_off(source: Source, share: float) -> tuple[Source, Source]:
    """Training and test images of a source without a test split: always the same ones."""
    held = stratified_share(source.labels(), share)
    parts = (("training part", ~held), ("test part", held))
    train, test = (
        subset(source, np.flatnonzero(chosen), f"{source.name} ({name})") for name, chosen in parts
    )
    return train, test


def reference_indices(size: int, count: int) -> np.ndarray:
    """The training images that the k-NN compares with, at most `count`, always the same ones."""
    return np.sort(np.random.RandomState(0).permutation(size)[:count])


def build_stage(config: ConfigDict, name: str, data: Data, mesh: Mesh) -> Stage:
    """Model, optimizer, objective and the two compiled steps of a stage."""
    stage = config[name]
    model = build_model(config, name, classes=len(data.train.class_names))
    steps_per_epoch = data.train.size // stage.batch_size
    steps = max(1, round(stage.epochs * steps_per_epoch))
    pixels: dict[str, Any] = {"mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    with naming(name):
        if stage.samples_per_class:
            sizes = {"batch_size": stage.batch_size, "samples_per_class": stage.samples_per_class}
            if warning := pipeline.check_balance(data.train, **sizes):
                warn(warning)
        schedule = build_schedule(stage, steps, steps_per_epoch)
        tx = make_optimizer(schedule=schedule, **stage.optimizer)
        policy = policies.make_policy(
            size=config.data.image_size, host_crop=data.train.read is not None, **stage.augment
        )
    augment = partial(policies.make_views, policies=[policy] * stage.views, mix=stage.mix, **pixels)
    training: Callable = partial(
        train_step,
        model=model,
        tx=tx,
        objective=build_objective(stage, steps_per_epoch),
        augment=augment,
        loss_scale=stage.loss_scale,
        micro_batches=stage.micro_batches,
        independent=stage.objective.name in INDEPENDENT,
        unroll=config.model.name == "resnet" and mesh.devices.flat[0].platform == "cpu",
        average=stage.average,
        follow=_follow(stage, steps_per_epoch),
        axis_name=parallel.AXIS,
    )
    training = skipping(training) if stage.skip_nonfinite else training
    return Stage(
        name=name,
        model=model,
        tx=tx,
        schedule=schedule,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        images_per_step=stage.batch_size * stage.views,
        train_step=parallel.data_parallel(training, mesh),
        eval_step=build_eval_step(config, model, mesh),
    )


@contextmanager
def naming(stage: str) -> Iterator[None]:
    """The builders know a field by its own name only: their errors get the stage's."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"in config.{stage}: {error}") from error


def build_eval_step(config: ConfigDict, model: Model, mesh: Mesh) -> Callable[..., Any]:
    """The compiled evaluation step, on the middle of each image."""
    size, mean, std = config.data.image_size, tuple(config.data.mean), tuple(config.data.std)
    preprocess = partial(policies.center_crop, size=size, mean=mean, std=std)
    step = partial(eval_step, model=model, preprocess=preprocess)
    return parallel.data_parallel_eval(step, mesh)


def build_model(config: ConfigDict, name: str, classes: int) -> Model:
    """The encoder of all stages with the head of one of them."""
    options = config.model.to_dict()
    dtype, batch_norm = options.pop("dtype"), options.pop("batch_norm")
    normalize, _ = options.pop("normalize"), options.pop("weights")
    shared: dict[str, Any] = {
        "dtype": None if dtype == "float32" else dtype,
        "axis_name": parallel.AXIS if batch_norm == "global" else None,
    }
    encoder = make_encoder(**options, **shared)
    stride = getattr(encoder, "stride", 1)  # of an encoder that takes any image, nothing is said
    if config.data.image_size < stride:
        raise ValueError(
            f"config.data.image_size={config.data.image_size} is too small for this encoder, which "
            f"needs {stride} pixels; use larger images, --config.model.stem=cifar (8 "
            "pixels) or a smaller --config.model.patch"
        )
    stage, keep = config[name], config.model.batch_norm_momentum
    margin = stage.objective.margin if stage.objective.name == "cross_entropy" else 1
    head = make_head(
        **stage.head, classes=classes, margin=margin, batch_norm_momentum=keep, **shared
    )
    return Model(encoder, head, normalize=normalize, frozen=tuple(stage.frozen))


def build_objective(stage: ConfigDict, steps_per_epoch: int) -> Objective:
    """The objective of a stage, with its lengths in epochs turned into steps."""
    options = stage.objective.to_dict()
    if "margin_epochs" in options:
        options["margin_steps"] = max(1, round(options.pop("margin_epochs") * steps_per_epoch))
    return partial(OBJECTIVES[options.pop("name")], axis_name=parallel.AXIS, **options)


def build_schedule(stage: ConfigDict, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of a stage, with its lengths in epochs turned into steps."""
    options = stage.schedule.to_dict()
    return make_schedule(
        steps=steps,
        warmup_steps=round(stage.warmup_epochs * steps_per_epoch),
        decay_steps=options.pop("decay_epochs") * steps_per_epoch,
        boundaries=tuple(round(b * steps_per_epoch) for b in options.pop("boundaries")),
        **options,
    )


def abstract_state(
    config: ConfigDict, name: str, model: Model, tx: optax.GradientTransformation, mesh: Mesh
) -> Any:
    """Shapes of the state that a stage starts from, on all devices; see `create`."""
    size, channels = config.data.image_size, config.data.channels

    def start() -> TrainState:
        key = jax.random.key(0)
        variables = model.init(key, jax.numpy.zeros((1, size, size, channels)), train=False)
        return from_variables(model, tx, variables, key, **carried(config[name]))

    return parallel.placed(jax.eval_shape(start), mesh, PartitionSpec())


def create(stage: Stage, config: ConfigDict, mesh: Mesh, previous: TrainState | None) -> TrainState:
    """The state that a stage starts from, on all devices."""
    key = jax.random.fold_in(jax.random.key(config.seed), configuration.STAGES.index(stage.name))
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    encoder: Mapping[str, Any] | None = None
    if previous is not None and config[stage.name].start_from == "previous":
        encoder = jax.tree.map(np.asarray, encoder_of(previous))
    elif config.model.weights:
        encoder = load_torch_encoder(config.model.weights, stage.model.encoder)
    state = create_state(stage.model, stage.tx, key, shape, encoder, **carried(config[stage.name]))
    return parallel.replicate(state, mesh)


def carried(stage: ConfigDict) -> dict[str, Any]:
    """What a stage carries beside its parameters, as `create_state` takes it."""
    size = stage.queue.size
    queue = (size, stage.head.layers[-1]) if size else None
    return {"average": stage.average > 0, "queue": queue}


def _follow(stage: ConfigDict, steps_per_epoch: int) -> Callable[..., dict[str, Any]] | None:
    """The rule of the momentum encoder, where the stage has one."""
    if not stage.queue.size:
        return None
    keep_from = round(stage.queue.from_epoch * steps_per_epoch)
    return partial(momentum.follow, decay=stage.queue.momentum, keep_from=keep_from)


def check_batch(config: ConfigDict, name: str, data: Data, mesh: Mesh) -> None:
    """Check that the training images fill the batch of a stage, and its parts the devices.

    Raises:
      ValueError: they do not; the message has a size that would do.
    """
    batch_size, micro_batches = config[name].batch_size, config[name].micro_batches
    if batch_size > data.train.size:
        raise ValueError(
            f"config.{name}.batch_size={batch_size} is larger than the {data.train.size} training "
            f"images of {data.train.name}; set it to {data.train.size // mesh.size * mesh.size} or "
            "less"
        )
    parts = mesh.size * micro_batches
    if batch_size % parts:
        times = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"config.{name}.batch_size={batch_size} must be a multiple of the {mesh.size} devices"
            f"{times}, such as {-(-batch_size // parts) * parts}"
        )


def batches(
    stage: Stage, start: int, config: ConfigDict, source: Source, mesh: Mesh
) -> Generator[dict[str, jax.Array]]:
    """The global batches of a stage from a step on, split over the devices."""
    of_stage = config[stage.name]
    options: dict[str, Any] = {
        "seed": config.seed,
        "stage": stage.name,
        "batch_size": of_stage.batch_size,
        "samples_per_class": of_stage.samples_per_class,
        "mix_alpha": of_stage.mix_alpha if of_stage.mix != "none" else 0.0,
    }
    numbers = range(start, stage.steps)
    places = parallel.local_places(of_stage.batch_size, mesh)
    if source.read is None:
        made = (pipeline.training_batch(source, k, places=places, **options) for k in numbers)
    else:
        made = streamed_batches(source, numbers, places, config, of_stage, options)
    with closing(made):
        for batch in made:
            yield parallel.shard(batch, mesh)


def streamed_batches(
    source: Source,
    numbers: range,
    places: np.ndarray,
    config: ConfigDict,
    stage: ConfigDict,
    options: dict[str, Any],
) -> Generator[pipeline.Batch]:
    """Batches with random crops of `data.image_size`, made while the images are decoded."""
    return stream(
        source,
        start=numbers.start,
        stop=numbers.stop,
        views=stage.views,
        size=config.data.image_size,
        channels=config.data.channels,
        area=tuple(stage.augment.crop_area),
        ratio=tuple(stage.augment.crop_ratio),
        workers=config.data.workers if config.data.workers >= 0 else usable_cores(),
        on_error=config.data.on_error,
        places=places,
        **options,
    )
