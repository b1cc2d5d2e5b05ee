"""Train and evaluate a recipe.

    python -m supcon_jax.train --config configs/digits.py
    python -m supcon_jax.train --config configs/cifar10.py:cross_entropy --workdir runs/ce
    python -m supcon_jax.train --config digits --config.supcon.epochs=20

A run that was stopped goes on from its last checkpoint when started again with the same command.
"""

import json
import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from supcon_jax import config as configuration
from supcon_jax import parallel, plan, report
from supcon_jax.checkpoints import Checkpoints
from supcon_jax.data import pipeline, policies
from supcon_jax.data.selection import select
from supcon_jax.data.sources import Source, hold_out, open_source, subset
from supcon_jax.data.streaming import stream
from supcon_jax.evaluation.embed import Embedded, embed, knn_accuracy, top_k_accuracy
from supcon_jax.interruption import Interruptions, Stopped
from supcon_jax.logs import Logs, Recorder, read_metrics
from supcon_jax.models import Model, make_encoder, make_head
from supcon_jax.models.torch_weights import load_torch_encoder
from supcon_jax.objectives import INDEPENDENT, OBJECTIVES
from supcon_jax.optimizers import make_optimizer, make_schedule
from supcon_jax.state import TrainState, create_state, encoder_of
from supcon_jax.steps import eval_step, train_step
from supcon_jax.workdir import check_config, claimed, write_whole


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


def train_and_evaluate(
    config: ConfigDict, workdir: str | Path, *, allow_config_change: bool = False
) -> dict[str, Any]:
    """Run the stages of a recipe, evaluate on the test split, and write everything to `workdir`.

    Args:
      config: of a recipe file, see `config.base`.
      workdir: gets config.json, checkpoints, metrics.jsonl, TensorBoard files, results.json and
        pictures; a run that was stopped goes on from its newest checkpoint there. Where a run has
        several processes, all must see the same folder.
      allow_config_change: go on in a workdir that was started with another configuration.

    Returns:
      The contents of results.json.

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: a wrong configuration or data set, or a workdir of another configuration.
      FloatingPointError: the loss or the features are not finite; the last checkpoint is kept.
      OSError: the workdir cannot be written, or another run is going on there.
      Stopped: SIGTERM or Ctrl-C came; in a stage's loop, the state is saved before.
    """
    configuration.validate(config)
    workdir, plain = Path(workdir), configuration.used(config)
    with ExitStack() as stack:
        interruptions = stack.enter_context(Interruptions().caught())
        mesh = parallel.make_mesh()
        data = open_data(config)
        stages = [build_stage(config, name, data, mesh) for name in config.stages]
        if not allow_config_change:
            check_config(workdir, plain)
        if parallel.is_writer():
            stack.enter_context(claimed(workdir))
            record = {"config": plain, "config_hash": configuration.config_hash(plain)}
            write_json(workdir / "config.json", record | report.circumstances())
        parallel.wait_for_all("workdir")

        logs = stack.enter_context(closing(Logs(workdir, writes=parallel.is_writer())))
        state: TrainState | None = None
        for stage in stages:
            start = create(stage, config, mesh, previous=state)
            state = run_stage(stage, start, config, data, mesh, logs, interruptions)
        assert state is not None  # there is at least one stage
        logs.flush()
        return evaluate(stages, state, config, data, mesh, workdir)


def evaluate(
    stages: list[Stage],
    state: TrainState,
    config: ConfigDict,
    data: Data,
    mesh: Mesh,
    workdir: Path,
) -> dict[str, Any]:
    """Score the last state on the test split; write results.json and the pictures."""
    look = partial(embed, stages[-1].eval_step, state, batch_size=config.evaluation.batch_size)
    test, references = look(data.test, mesh=mesh), look(data.references, mesh=mesh)
    plain = configuration.used(config)
    results = {
        "recipe": list(config.stages),
        "test": {"images": len(test.labels), **scores(test, references, config)},
        "stages": {stage.name: spent(stage, workdir) for stage in stages},
        "config_hash": configuration.config_hash(plain),
        **report.circumstances(),
    }
    if parallel.is_writer():
        write_json(workdir / "results.json", results)
        report.save_embedding(workdir, test.features, test.labels, data.test.class_names)
        report.draw([workdir], workdir)
    parallel.wait_for_all("results")
    return results


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(file, json.dumps(content, indent=2) + "\n")


def run_stage(
    stage: Stage,
    state: TrainState,
    config: ConfigDict,
    data: Data,
    mesh: Mesh,
    logs: Logs,
    interruptions: Interruptions,
) -> TrainState:
    """The training loop: from the newest checkpoint, or from `state`, to the last step."""
    folder = logs.workdir / "checkpoints" / stage.name
    checkpoints = Checkpoints(folder, config.checkpoint.keep)
    with closing(checkpoints):
        restored = checkpoints.restore(state, warn=warn)
        state = state if restored is None else restored
        start = int(state.step)
        checkpoints.discard_after(start)
        logs.cut(stage.name, after=-1 if restored is None else start)
        if restored is not None:  # a run can have ended between writing a step and its best copy
            offer(checkpoints, state, logs.scores_at(stage.name, start))
        queue = pipeline.prefetch(batches(stage, start, config, data.train, mesh))
        recorder = Recorder(
            stage.name,
            stage.schedule,
            start,
            stage.steps,
            images_per_step=stage.images_per_step,
            every=config.log.every_steps,
            logs=logs,
            checkpoints=folder,
        )
        look = partial(heldout_scores, stage, config=config, data=data, mesh=mesh)
        with closing(recorder), closing(queue), interruptions.waiting():
            recorder.start(look(state) if restored is None else {})
            for step in range(start + 1, stage.steps + 1):
                state, metrics = stage.train_step(state, next(queue))
                recorder.add(step, metrics)
                stops = interruptions.asked(step)
                looks = _due(step, config.evaluation.every_epochs, stage)
                saves = _due(step, config.checkpoint.every_epochs, stage) or step == stage.steps
                if looks or saves or stops:
                    recorder.pause()  # raises if a loss is not finite: nothing is saved
                    found = look(state) if looks else {}
                    recorder.catch_up(found)
                    if saves or stops:
                        checkpoints.save(state)
                    offer(checkpoints, state, found)
                    recorder.resume()
                if stops:
                    interruptions.stop(f" at step {step} of {stage.steps} of stage {stage.name}")
    return state


def offer(checkpoints: Checkpoints, state: TrainState, found: Mapping[str, float]) -> None:
    """Keep the state as the best if its held-out scores, where there are any, are."""
    if found:
        checkpoints.offer(state, found.get("heldout/top1", found["heldout/knn"]))


def warn(line: str) -> None:
    """A line to the user, from one process."""
    if parallel.is_writer():
        print(line, file=sys.stderr, flush=True)


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
    by_class = pipeline.images_by_class(source) if options["samples_per_class"] else ()
    indices_of = partial(pipeline.stored_indices, size=source.size, by_class=by_class, **options)
    alpha, draws = options["mix_alpha"], {name: options[name] for name in ("seed", "stage")}
    made = stream(
        source,
        start=numbers.start,
        stop=numbers.stop,
        batch_size=stage.batch_size,
        views=stage.views,
        size=config.data.image_size,
        channels=config.data.channels,
        area=tuple(stage.augment.crop_area),
        ratio=tuple(stage.augment.crop_ratio),
        workers=config.data.workers if config.data.workers >= 0 else os.cpu_count() or 1,
        on_error=config.data.on_error,
        places=places,
        indices_of=indices_of,
        **draws,
    )
    with closing(made):
        for k, batch in zip(numbers, made, strict=True):
            if alpha:
                share = pipeline.mixing(stage.batch_size, k, alpha=alpha, **draws)[1]
                batch["share"] = share[places]
            yield batch


def _due(step: int, every_epochs: float, stage: Stage) -> bool:
    """Whether something that happens every so many epochs happens after this step."""
    return every_epochs > 0 and step % max(1, round(every_epochs * stage.steps_per_epoch)) == 0


def heldout_scores(
    stage: Stage, state: TrainState, config: ConfigDict, data: Data, mesh: Mesh
) -> dict[str, float]:
    """Scores on the held-out training images; none where none are held out."""
    if data.heldout.size == 0 or config.evaluation.every_epochs <= 0:
        return {}
    look = partial(embed, stage.eval_step, state, batch_size=config.evaluation.batch_size)
    found = scores(look(data.heldout, mesh=mesh), look(data.references, mesh=mesh), config)
    if config[stage.name].head.name != "classifier":
        found = {"knn": found["knn"]}
    return {f"heldout/{name}": value for name, value in found.items()}


def scores(queries: Embedded, references: Embedded, config: ConfigDict) -> dict[str, float]:
    """Top-1 and top-5 of the classifier, and of the k-NN on the encoder's features."""
    return {
        "top1": top_k_accuracy(queries, 1),
        "top5": top_k_accuracy(queries, 5),
        "knn": knn_accuracy(
            queries,
            references,
            neighbours=config.evaluation.neighbours,
            temperature=config.evaluation.temperature,
        ),
    }


def open_data(config: ConfigDict) -> Data:
    """The splits that a configuration names, checked against it."""
    read = partial(
        open_source,
        config.data.source,
        name=config.data.name,
        directory=config.data.dir,
        load_size=config.data.load_size,
        channels=config.data.channels,
        memory_limit_gb=config.data.memory_limit_gb,
    )
    whole, test = read(config.data.train_split), read(config.data.test_split)
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
    chosen = np.random.RandomState(0).permutation(train.size)[: config.evaluation.references]
    return Data(train, heldout, subset(train, np.sort(chosen), "references"), test)


def build_stage(config: ConfigDict, name: str, data: Data, mesh: Mesh) -> Stage:
    """Model, optimizer, objective and the two compiled steps of a stage."""
    stage = config[name]
    _check_batch_size(name, stage.batch_size, stage.micro_batches, data.train, mesh)
    if stage.samples_per_class:
        sizes = {"batch_size": stage.batch_size, "samples_per_class": stage.samples_per_class}
        if warning := pipeline.check_balance(data.train, **sizes):
            warn(warning)
    model = build_model(config, name, classes=len(data.train.class_names))
    steps_per_epoch = data.train.size // stage.batch_size
    steps = max(1, round(stage.epochs * steps_per_epoch))
    schedule = build_schedule(stage, steps, steps_per_epoch)
    tx = make_optimizer(schedule=schedule, **stage.optimizer)
    pixels: dict[str, Any] = {"mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    policy = policies.make_policy(
        size=config.data.image_size, host_crop=data.train.read is not None, **stage.augment
    )
    augment = partial(policies.make_views, policies=[policy] * stage.views, mix=stage.mix, **pixels)
    objective = {field: value for field, value in stage.objective.items() if field != "name"}
    training = partial(
        train_step,
        model=model,
        tx=tx,
        objective=partial(OBJECTIVES[stage.objective.name], axis_name=parallel.AXIS, **objective),
        augment=augment,
        loss_scale=stage.loss_scale,
        micro_batches=stage.micro_batches,
        independent=stage.objective.name in INDEPENDENT,
        average=stage.average,
        log_every=config.log.every_steps,
        axis_name=parallel.AXIS,
    )
    preprocess = partial(policies.center_crop, size=config.data.image_size, **pixels)
    evaluation = partial(eval_step, model=model, preprocess=preprocess)
    return Stage(
        name=name,
        model=model,
        tx=tx,
        schedule=schedule,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        images_per_step=stage.batch_size * stage.views,
        train_step=parallel.data_parallel(training, mesh),
        eval_step=parallel.data_parallel_eval(evaluation, mesh),
    )


def build_for(config: ConfigDict, name: str, source: Source, mesh: Mesh) -> Stage:
    """`build_stage` where there is a training split alone, as in a plan."""
    return build_stage(config, name, Data(source, source, source, source), mesh)


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
    if config.data.image_size < encoder.stride:
        raise ValueError(
            f"config.data.image_size={config.data.image_size} is too small for this encoder, which "
            f"needs {encoder.stride} pixels; use larger images, --config.model.stem=cifar (8 "
            "pixels) or a smaller --config.model.patch"
        )
    head = make_head(**config[name].head, classes=classes, **shared)
    return Model(encoder, head, normalize=normalize, frozen=tuple(config[name].frozen))


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


def create(stage: Stage, config: ConfigDict, mesh: Mesh, previous: TrainState | None) -> TrainState:
    """The state that a stage starts from, on all devices."""
    key = jax.random.fold_in(jax.random.key(config.seed), configuration.STAGES.index(stage.name))
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    encoder: Mapping[str, Any] | None = None
    if previous is not None and config[stage.name].start_from == "previous":
        encoder = jax.tree.map(np.asarray, encoder_of(previous))
    elif config.model.weights:
        encoder = load_torch_encoder(config.model.weights, stage.model.encoder)
    average = config[stage.name].average > 0
    state = create_state(stage.model, stage.tx, key, shape, encoder, average)
    return parallel.replicate(state, mesh)


def _check_batch_size(
    name: str, batch_size: int, micro_batches: int, train: Source, mesh: Mesh
) -> None:
    if batch_size > train.size:
        raise ValueError(
            f"config.{name}.batch_size={batch_size} is larger than the {train.size} training "
            f"images of {train.name}; set it to {train.size // mesh.size * mesh.size} or less"
        )
    parts = mesh.size * micro_batches
    if batch_size % parts:
        times = f" times {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise ValueError(
            f"config.{name}.batch_size={batch_size} must be a multiple of the {mesh.size} devices"
            f"{times}, such as {-(-batch_size // parts) * parts}"
        )


def spent(stage: Stage, workdir: Path) -> dict[str, float]:
    """Steps, passes of images through the encoder, and time of a stage, from its metrics."""
    records = [r for r in read_metrics(workdir) if r["stage"] == stage.name]
    seconds = sum(r.get("time/seconds", 0.0) for r in records)
    images = sum(r.get("time/seconds", 0.0) * r.get("time/images_per_s", 0.0) for r in records)
    return {
        "steps": stage.steps,
        "passes": stage.steps * stage.images_per_step,
        "time/seconds": round(seconds, 2),
        "time/compile_seconds": round(sum(r.get("time/compile_s", 0.0) for r in records), 2),
        "time/images_per_s": round(images / max(seconds, 1e-9), 1),
    }


flags.DEFINE_string("workdir", None, "Folder of the run (runs/CONFIG-RECIPE).")
_ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir that was started with another configuration."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes, found from SLURM, Open MPI, Kubernetes or a TPU pod.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_PLAN = flags.DEFINE_bool("plan", False, "Print what the recipe needs and sends; train nothing.")
_TOPOLOGY = flags.DEFINE_string("topology", "", "Plan for a TPU slice, such as v5e:16x16.")
_MEMORY = flags.DEFINE_float("memory_gb", 0.0, "Plan, and find the largest batch that fits.")
_DEBUG = flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")
EXPECTED = (ValueError, OSError, FloatingPointError)
MISTYPED = (*EXPECTED, TypeError, KeyError, AttributeError, flags.Error)  # what parsing raises


def parse(argv: list[str]) -> list[str]:
    """Absl's flags parser, with every field of the named configuration as a flag."""
    name, rest = _take_config(argv)
    if name is None:
        flags.DEFINE_string("config", None, "Recipe file, or the name of a shipped one; [:RECIPE].")
        if any(argument.lstrip("-").startswith("help") for argument in argv[1:]):
            return flags.FLAGS(rest)
        _fail(ValueError("no --config, such as --config configs/digits.py; --help tells more"))
    try:
        config = configuration.load(name)
        configuration.check_names(config, rest)
        config_flags.DEFINE_config_dict("config", config, sys_argv=rest)
        remaining = flags.FLAGS(rest)
    except MISTYPED as error:
        _fail(error, debug="--debug" in argv)
    if len(remaining) > 1:
        _fail(ValueError(f"not understood: {' '.join(remaining[1:])}"))
    if flags.FLAGS.workdir is None:
        file, _, recipe = name.partition(":")
        flags.FLAGS["workdir"].value = f"runs/{Path(file).stem}-{recipe or 'supcon'}"
    return remaining


def _take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    for place, argument in enumerate(argv):
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag == "config":
            if equals:
                return value, argv[:place] + argv[place + 1 :]
            if place + 1 < len(argv):
                return argv[place + 1], argv[:place] + argv[place + 2 :]
    return None, argv


def main(argv: list[str]) -> None:
    """The command: a table at the end, or one line that says what is wrong."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        # Orbax tells every step of a save, and a thousand lines beside the error of a full disk.
        logging.set_verbosity(logging.FATAL)
        getLogger("asyncio").setLevel("CRITICAL")
        sys.unraisablehook = lambda unraisable: None
    workdir = Path(flags.FLAGS.workdir)
    try:
        if _PLAN.value or _TOPOLOGY.value or _MEMORY.value:  # each asks for a plan
            print(plan.report(flags.FLAGS.config, build_for, _TOPOLOGY.value, _MEMORY.value))
            return
        if _DISTRIBUTED.value or _COORDINATOR.value:
            places = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
            parallel.start_processes(*places)
        train_and_evaluate(
            flags.FLAGS.config, workdir, allow_config_change=_ALLOW_CONFIG_CHANGE.value
        )
        if parallel.is_writer():
            print(report.table([workdir]))
    except EXPECTED as error:
        _fail(error, _DEBUG.value)
    except Stopped as stopped:
        warn(f"{stopped}; the same command goes on from the last checkpoint")
        sys.exit(128 + stopped.number)


def _fail(error: Exception, debug: bool = False) -> NoReturn:
    if debug:
        raise error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)


def run() -> None:
    """Entry point of the console script."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
