"""Train and evaluate a recipe.

  python -m supcon_jax.train --config digits          # a minute, no download
  python -m supcon_jax.train --config folder --config.data.dir=PATH   # yours
  python -m supcon_jax.train --config digits:cross_entropy --config.seed=1

Started again with the same command, a run goes on from its last checkpoint.

  --config NAME|FILE.py[:RECIPE]  what to train; supcon, if no RECIPE is named
  --config.FIELD=VALUE            any field of it, see docs/configuration.md
  --workdir DIR                   folder of the run (runs/NAME-RECIPE)
  --allow_config_change           go on in a workdir of another configuration
  --plan                          print what is needed and sent; train nothing
  --memory_gb GB                  plan, and find the largest batch that fits
  --topology v5e:16x16            plan for a TPU slice
  --profile                       write a trace of ten steps of each stage
  --distributed                   one of several processes (SLURM, TPU pod ...)
  --coordinator HOST:PORT --num_processes N --process_id K      that, by hand
  --debug                         show logs and the traceback of an error
"""

import sys
import textwrap
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from supcon_jax import command  # first: says what to install where nothing below is there

# isort: split
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from supcon_jax import config as configuration
from supcon_jax import parallel, plan, report
from supcon_jax.checkpoints import Checkpoints, check_path
from supcon_jax.data import pipeline
from supcon_jax.evaluation.embed import Embedded, embed, knn_accuracy, top_k_accuracy
from supcon_jax.fitting import fit_to_images
from supcon_jax.interruption import Interruptions, Stopped
from supcon_jax.logs import Logs, Recorder, read_metrics, warn
from supcon_jax.profiling import Traced
from supcon_jax.stages import Data, Stage, batches, build_stage, check_batch, create, open_data
from supcon_jax.state import TrainState
from supcon_jax.trained import checksum
from supcon_jax.validation import validate
from supcon_jax.workdir import check_config, claimed, write_json


def train_and_evaluate(
    config: ConfigDict,
    workdir: str | Path,
    *,
    allow_config_change: bool = False,
    profile: bool = False,
    pictures: bool = True,
    data: Data | None = None,
) -> dict[str, Any]:
    """Run the stages of a recipe, evaluate on the test split, and write everything to `workdir`.

    Args:
      config: of a recipe file, see `config.base`.
      workdir: gets config.json, checkpoints, metrics.jsonl, TensorBoard files, results.json and
        pictures; a run that was stopped goes on from its newest checkpoint there. Where a run has
        several processes, all must see the same folder.
      allow_config_change: go on in a workdir that was started with another configuration.
      profile: write a profiler's trace of ten steps of each stage to `workdir/profile`.
      pictures: draw curves and the map of the test images.
      data: what `open_data` has returned for this configuration, or for one that differs in its
        seed, stages or model only; opened here by default.

    Returns:
      The contents of results.json.

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: a wrong configuration or data set, a workdir of another configuration, or one with
        a path that `checkpoints.check_path` refuses.
      FloatingPointError: the loss or the features are not finite; the last checkpoint is kept.
      OSError: the workdir cannot be written, or another run is going on there.
      Stopped: SIGTERM or Ctrl-C came; in a stage's loop, the state is saved before.
    """
    config = config.copy_and_resolve_references()
    chosen = fit_to_images(config)
    if parallel.is_writer():
        for line in chosen:
            warn(line)
    validate(config)
    workdir, plain = Path(workdir), configuration.used(config)
    check_path(workdir)
    with ExitStack() as stack:
        interruptions = stack.enter_context(Interruptions().caught())
        mesh = parallel.make_mesh()
        data = open_data(config) if data is None else data
        for name in config.stages:
            check_batch(config, name, data, mesh)
        stages = [build_stage(config, name, data, mesh) for name in config.stages]
        if not allow_config_change:
            check_config(workdir, plain)
        if parallel.is_writer():
            stack.enter_context(claimed(workdir))
            record = {
                "config": plain,
                "config_hash": configuration.config_hash(plain),
                "unused": configuration.unused(config),
                "class_names": data.train.class_names,
            }
            write_json(workdir / "config.json", record | report.circumstances())
        parallel.wait_for_all("workdir")

        logs = stack.enter_context(closing(Logs(workdir, writes=parallel.is_writer())))
        state: TrainState | None = None
        checksums: dict[str, str] = {}
        for stage in stages:
            start = create(stage, config, mesh, previous=state)
            with ExitStack() as ending:
                if profile and parallel.is_writer():
                    traced = Traced(stage.train_step, workdir / "profile" / stage.name)
                    stage = replace(stage, train_step=ending.enter_context(closing(traced)))
                state = run_stage(stage, start, config, data, mesh, logs, interruptions)
            checksums[stage.name] = checksum(state)
        assert state is not None  # there is at least one stage
        logs.flush()
        results = evaluate(stages, state, checksums, config, data, mesh, workdir)
        if pictures and parallel.is_writer():
            report.draw([workdir], workdir)
        parallel.wait_for_all("results")
        return results


def evaluate(
    stages: list[Stage],
    state: TrainState,
    checksums: Mapping[str, str],
    config: ConfigDict,
    data: Data,
    mesh: Mesh,
    workdir: Path,
) -> dict[str, Any]:
    """Score the last state on the test split; write results.json and the embedding."""
    look = partial(embed, stages[-1].eval_step, state, batch_size=config.evaluation.batch_size)
    test, references = look(data.test, mesh=mesh), look(data.references, mesh=mesh)
    plain, classifies = configuration.used(config), _classifies(stages[-1], config)
    results = {
        "recipe": list(config.stages),
        "test": {"images": len(test.labels), **scores(test, references, config, classifies)},
        "stages": {
            stage.name: {**spent(stage, workdir), "checksum": checksums[stage.name]}
            for stage in stages
        },
        "config_hash": configuration.config_hash(plain),
        **report.circumstances(),
    }
    if parallel.is_writer():
        write_json(workdir / "results.json", results)
        report.save_embedding(workdir, test.features, test.labels, data.test.class_names)
    return results


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
    checkpoints = Checkpoints(folder, config.checkpoint.keep, warn)
    heeding = replace(stage, eval_step=interruptions.heeding(stage.eval_step))
    look = partial(heldout_scores, heeding, config=config, data=data, mesh=mesh)

    def looks_at(step: int) -> bool:
        return data.heldout.size > 0 and _due(step, config.evaluation.every_epochs, stage)

    with interruptions.waiting(), closing(checkpoints):
        restored = checkpoints.restore(state, warn=warn)
        state = state if restored is None else restored
        start = int(state.step)
        checkpoints.discard_after(start)
        logs.cut(stage.name, after=-1 if restored is None else start)
        if restored is not None:  # a run can have ended between saving a step and the rest of it
            found = logs.scores_at(stage.name, start)
            if looks_at(start) and not found:
                found = look(state)
                logs.complete(stage.name, start, found)
            offer(checkpoints, state, found)
        queue = pipeline.prefetch(batches(stage, start, config, data.train, mesh))
        recorder = Recorder(
            stage.name,
            stage.schedule,
            start,
            stage.steps,
            images_per_step=stage.images_per_step,
            every=config.log.every_steps,
            skips=config[stage.name].skip_nonfinite,
            logs=logs,
            checkpoints=folder,
        )
        with closing(recorder), closing(queue):
            recorder.start(look(state) if restored is None else {})
            for step in range(start + 1, stage.steps + 1):
                state, metrics = stage.train_step(state, next(queue))
                recorder.add(step, metrics)
                stops = interruptions.asked(step)
                looks = looks_at(step)
                saves = _due(step, config.checkpoint.every_epochs, stage) or step == stage.steps
                if looks or saves or stops:
                    recorder.pause()  # raises if a loss is not finite: nothing is saved
                    found = {}
                    if looks and not stops:
                        with suppress(Stopped):  # the run that goes on looks in its place
                            found = look(state)
                        stops = not found
                    recorder.catch_up(found if looks else None)
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
    seen = (look(data.heldout, mesh=mesh), look(data.references, mesh=mesh))
    found = scores(*seen, config, _classifies(stage, config))
    return {f"heldout/{name}": value for name, value in found.items()}


def _classifies(stage: Stage, config: ConfigDict) -> bool:
    """Whether the outputs of a stage are logits."""
    return config[stage.name].head.name == "classifier"


def scores(
    queries: Embedded, references: Embedded, config: ConfigDict, classifies: bool
) -> dict[str, float]:
    """Top-1 and top-5 of the classifier, if there is one, and of the k-NN on the features."""
    of_outputs = {f"top{k}": top_k_accuracy(queries, k) for k in (1, 5) if classifies}
    return of_outputs | {
        "knn": knn_accuracy(
            queries,
            references,
            neighbours=config.evaluation.neighbours,
            temperature=config.evaluation.temperature,
        )
    }


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


def define_flags() -> None:
    """Not where this module is imported: a script may have flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder of the run (runs/CONFIG-RECIPE).")
    flags.DEFINE_bool(
        "allow_config_change",
        False,
        "Go on in a workdir that was started with another configuration.",
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "One of several processes, found from SLURM, Open MPI, Kubernetes or a TPU pod.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
    flags.DEFINE_integer("num_processes", None, "Processes of the run.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_bool(
        "profile", False, "Write a trace of ten steps of each stage, for TensorBoard or Perfetto."
    )
    flags.DEFINE_bool("plan", False, "Print what the recipe needs and sends; train nothing.")
    flags.DEFINE_string("topology", "", "Plan for a TPU slice, such as v5e:16x16.")
    flags.DEFINE_float("memory_gb", None, "Plan, and find the largest batch that fits.")
    flags.DEFINE_bool("debug", False, "Show the whole traceback of an error.")


# what parsing raises
MISTYPED = (*command.EXPECTED, TypeError, KeyError, AttributeError, flags.Error)


def parse(argv: list[str]) -> list[str]:
    """Absl's flags parser, with every field of the named configuration as a flag."""
    if {"-h", "-help", "--help"} & set(argv[1:]):
        print(help_text())
        sys.exit()
    define_flags()
    name, rest = _take_config(argv)
    if name is None:
        command.fail(ValueError("no --config, such as --config digits; --help tells more"))
    try:
        config = configuration.load(name)
        configuration.check_names(config, rest)
        config_flags.DEFINE_config_dict("config", config, sys_argv=rest)
        remaining = flags.FLAGS(rest)
    except MISTYPED as error:
        command.fail(error, debug="--debug" in argv)
    if len(remaining) > 1:
        command.fail(ValueError(f"not understood: {' '.join(remaining[1:])}"))
    if flags.FLAGS.workdir is None:
        file, _, recipe = name.partition(":")
        flags.FLAGS["workdir"].value = f"runs/{Path(file).stem}-{recipe or 'supcon'}"
    return remaining


def help_text() -> str:
    """What --help prints: the head of this file, and what --config takes."""
    known = (("NAME: ", configuration.shipped()), ("RECIPE: ", configuration.RECIPES))
    lists = [
        textwrap.fill(", ".join(names), 78, initial_indent=start, subsequent_indent="  ")
        for start, names in known
    ]
    return "\n".join([(__doc__ or "").rstrip(), *lists])


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
    given = flags.FLAGS
    workdir = Path(given.workdir)
    with command.running(given.debug):
        if given.plan or given.topology or given.memory_gb is not None:  # each asks for a plan
            print(plan.report(given.config, given.topology, given.memory_gb))
            return
        place = (given.coordinator, given.num_processes, given.process_id)
        if given.distributed or place != (None, None, None):
            parallel.start_processes(*place)
        train_and_evaluate(
            given.config,
            workdir,
            allow_config_change=given.allow_config_change,
            profile=given.profile,
        )
        if parallel.is_writer():
            print(report.table([workdir]))


def run() -> None:
    """Entry point of the console script."""
    app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
