"""Train and evaluate a recipe.

    python -m supcon_jax.train --config configs/digits.py
    python -m supcon_jax.train --config configs/cifar10.py:cross_entropy --workdir runs/ce
    python -m supcon_jax.train --config digits --config.supcon.epochs=20

A run that was stopped goes on from its last checkpoint when started again with the same command.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from absl import app, flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from supcon_jax import config as configuration
from supcon_jax import parallel, report
from supcon_jax.checkpoints import Checkpoints
from supcon_jax.data import pipeline, policies
from supcon_jax.data.sources import Source, hold_out, open_source, subset
from supcon_jax.evaluation.embed import Embedded, embed, knn_accuracy, top_k_accuracy
from supcon_jax.logs import Logs, Recorder, read_metrics
from supcon_jax.models import Model, ResNet, make_head
from supcon_jax.objectives import OBJECTIVES
from supcon_jax.optimizers import OPTIMIZERS, SCHEDULES
from supcon_jax.state import TrainState, create_state
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


def train_and_evaluate(
    config: ConfigDict, workdir: str | Path, *, allow_config_change: bool = False
) -> dict[str, Any]:
    """Run the stages of a recipe, evaluate on the test split, and write everything to `workdir`.

    Args:
      config: of a recipe file, see `config.base`.
      workdir: gets config.json, checkpoints, metrics.jsonl, TensorBoard files, results.json and
        pictures; a run that was stopped goes on from its newest checkpoint there.
      allow_config_change: go on in a workdir that was started with another configuration.

    Returns:
      The contents of results.json.

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: a wrong configuration or data set, or a workdir of another configuration.
      FloatingPointError: the loss or the features are not finite; the last checkpoint is kept.
      OSError: the workdir cannot be written.
    """
    configuration.validate(config)
    workdir, plain = Path(workdir), configuration.used(config)
    mesh = parallel.make_mesh()
    data = open_data(config)
    stages = [build_stage(config, name, data, mesh) for name in config.stages]
    claim(workdir, plain, allow_config_change)

    state: TrainState | None = None
    with closing(Logs(workdir)) as logs:
        for stage in stages:
            start = create(stage, config, mesh, previous=state)
            state = run_stage(stage, start, config, data, mesh, logs, workdir)
    assert state is not None  # there is at least one stage

    look = partial(embed, stages[-1].eval_step, state, batch_size=config.evaluation.batch_size)
    test, references = look(data.test, mesh=mesh), look(data.references, mesh=mesh)
    results = {
        "recipe": list(config.stages),
        "test": {"images": len(test.labels), **scores(test, references, config)},
        "stages": {stage.name: spent(stage, workdir) for stage in stages},
        "config_hash": configuration.config_hash(plain),
        **report.circumstances(),
    }
    (workdir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    report.save_embedding(workdir, test.features, test.labels, data.test.class_names)
    report.draw([workdir], workdir)
    return results


def run_stage(
    stage: Stage,
    state: TrainState,
    config: ConfigDict,
    data: Data,
    mesh: Mesh,
    logs: Logs,
    workdir: Path,
) -> TrainState:
    """The training loop: from the newest checkpoint, or from `state`, to the last step."""
    checkpoints = Checkpoints(workdir / "checkpoints" / stage.name, config.checkpoint.keep)
    with closing(checkpoints):
        restored = checkpoints.restore(state, warn=lambda line: print(line, file=sys.stderr))
        state = state if restored is None else restored
        start = int(state.step)
        checkpoints.discard_after(start)
        logs.cut(stage.name, after=-1 if restored is None else start)
        queue = pipeline.prefetch(batches(stage, start, config, data.train, mesh))
        recorder = Recorder(
            stage.name,
            stage.schedule,
            start,
            stage.steps,
            images_per_step=stage.images_per_step,
            every=config.log.every_steps,
            logs=logs,
            checkpoints=checkpoints.directory,
        )
        look = partial(heldout_scores, stage, config=config, data=data, mesh=mesh)
        with closing(recorder), closing(queue):
            recorder.start(look(state) if restored is None else {})
            for step in range(start + 1, stage.steps + 1):
                state, metrics = stage.train_step(state, next(queue))
                recorder.add(step, metrics)
                looks = _due(step, config.evaluation.every_epochs, stage)
                saves = _due(step, config.checkpoint.every_epochs, stage) or step == stage.steps
                if looks or saves:
                    recorder.pause()  # raises if a loss is not finite: nothing is saved
                    found = look(state) if looks else {}
                    recorder.catch_up(found)
                    if saves:
                        checkpoints.save(state)
                    if found:
                        checkpoints.offer(state, found.get("heldout/top1", found["heldout/knn"]))
                    recorder.resume()
    return state


def batches(
    stage: Stage, start: int, config: ConfigDict, source: Source, mesh: Mesh
) -> Generator[dict[str, jax.Array]]:
    """The global batches of a stage from a step on, split over the devices."""
    size = config[stage.name].batch_size
    for k in range(start, stage.steps):
        batch = pipeline.training_batch(
            source, k, seed=config.seed, stage=stage.name, batch_size=size
        )
        yield parallel.shard(batch, mesh)


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
    chosen = np.random.RandomState(0).permutation(train.size)[: config.evaluation.references]
    return Data(train, heldout, subset(train, np.sort(chosen), "references"), test)


def build_stage(config: ConfigDict, name: str, data: Data, mesh: Mesh) -> Stage:
    """Model, optimizer, objective and the two compiled steps of a stage."""
    stage = config[name]
    _check_batch_size(name, stage.batch_size, data.train, mesh)
    model = build_model(config, name, classes=len(data.train.class_names))
    steps_per_epoch = data.train.size // stage.batch_size
    steps = max(1, round(stage.epochs * steps_per_epoch))
    schedule = _chosen(
        SCHEDULES,
        stage.schedule,
        steps=steps,
        warmup_steps=round(stage.warmup_epochs * steps_per_epoch),
    )()
    tx = _chosen(OPTIMIZERS, stage.optimizer)(schedule)
    pixels: dict[str, Any] = {"mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    policy = _chosen(policies.POLICIES, stage.augment, size=config.data.image_size)()
    training = partial(
        train_step,
        model=model,
        tx=tx,
        objective=_chosen(OBJECTIVES, stage.objective, axis_name=parallel.AXIS),
        augment=partial(policies.make_views, policies=[policy] * stage.views, **pixels),
        loss_scale=stage.loss_scale,
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


def build_model(config: ConfigDict, name: str, classes: int) -> Model:
    """The encoder of all stages with the head of one of them."""
    of_model = config.model
    shared: dict[str, Any] = {
        "dtype": None if of_model.dtype == "float32" else of_model.dtype,
        "axis_name": parallel.AXIS if of_model.batch_norm == "global" else None,
    }
    encoder = ResNet(
        depth=of_model.depth,
        width=of_model.width,
        stem=of_model.stem,
        zero_init_residual=of_model.zero_init_residual,
        **shared,
    )
    if config.data.image_size < encoder.stride:
        raise ValueError(
            f"config.data.image_size={config.data.image_size} is too small for ResNet-"
            f"{of_model.depth} with the {of_model.stem} stem, which needs {encoder.stride} pixels; "
            "use larger images or --config.model.stem=cifar, which needs 8"
        )
    head = make_head(**config[name].head, classes=classes, **shared)
    return Model(encoder, head, normalize=of_model.normalize, frozen=tuple(config[name].frozen))


def create(stage: Stage, config: ConfigDict, mesh: Mesh, previous: TrainState | None) -> TrainState:
    """The state that a stage starts from, on all devices."""
    key = jax.random.fold_in(jax.random.key(config.seed), configuration.STAGES.index(stage.name))
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    if config[stage.name].start_from == "scratch":
        previous = None
    return parallel.replicate(create_state(stage.model, stage.tx, key, shape, previous), mesh)


def _chosen(table: dict[str, Callable], section: ConfigDict, **extra: Any) -> Callable:
    """The function that a section of the configuration names, with the section's other fields."""
    options = {field: value for field, value in section.items() if field != "name"}
    return partial(table[section.name], **options, **extra)


def _check_batch_size(name: str, batch_size: int, train: Source, mesh: Mesh) -> None:
    if batch_size > train.size:
        raise ValueError(
            f"config.{name}.batch_size={batch_size} is larger than the {train.size} training "
            f"images of {train.name}; set it to {train.size // mesh.size * mesh.size} or less"
        )
    if batch_size % mesh.size:
        raise ValueError(
            f"config.{name}.batch_size={batch_size} must be a multiple of the {mesh.size} devices, "
            f"such as {-(-batch_size // mesh.size) * mesh.size}"
        )


def claim(workdir: Path, plain: dict[str, Any], allow_config_change: bool) -> None:
    """Write the configuration to the workdir, unless another one was started there."""
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error.strerror}") from None
    if file.exists():
        lines = configuration.difference(json.loads(file.read_text())["config"], plain)
        if lines and not allow_config_change:
            raise ValueError(
                f"{workdir} holds a run with another configuration:\n  "
                + "\n  ".join(lines)
                + "\nuse another --workdir, or go on with the new one: --allow_config_change"
            )
    record = {
        "config": plain,
        "config_hash": configuration.config_hash(plain),
        **report.circumstances(),
    }
    file.write_text(json.dumps(record, indent=2) + "\n")


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
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
    workdir = Path(flags.FLAGS.workdir)
    try:
        train_and_evaluate(
            flags.FLAGS.config, workdir, allow_config_change=_ALLOW_CONFIG_CHANGE.value
        )
        print(report.table([workdir]))
    except EXPECTED as error:
        _fail(error, _DEBUG.value)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from the last checkpoint")


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
