"""A finished run, read back from its workdir: configuration, classes, states of its stages."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.checkpoints import load
from supcon_jax.models import Model
from supcon_jax.optimizers import make_optimizer
from supcon_jax.stages import abstract_state, build_eval_step, build_model
from supcon_jax.state import TrainState
from supcon_jax.validation import validate


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      workdir: its folder.
      config: what it ran with, all stages included.
      class_names: label k is `class_names[k]`.
      steps: of each of its stages.
      config_hash: see `config.config_hash`.
    """

    workdir: Path
    config: ConfigDict
    class_names: tuple[str, ...]
    steps: dict[str, int]
    config_hash: str


class Trained(NamedTuple):
    """A stage of a finished run, ready to be evaluated."""

    model: Model
    state: TrainState
    eval_step: Callable[..., dict[str, Any]]


def open_run(workdir: str | Path) -> Run:
    """The run of a workdir.

    Raises:
      FileNotFoundError: no run is there, or it has not finished.
      ValueError: its files are damaged, or its configuration is of another version.
    """
    workdir = Path(workdir)
    record = _read(workdir / "config.json", "is it the --workdir of a training?")
    results = _read(workdir / "results.json", "start it again with the same command to finish it")
    try:
        config = _config(record["config"] | record["unused"], workdir / "config.json")
        steps = {name: int(results["stages"][name]["steps"]) for name in config.stages}
        names = tuple(map(str, record["class_names"]))
        return Run(workdir, config, names, steps, results["config_hash"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json and results.json of {workdir} do not belong together or are damaged "
            f"({type(error).__name__}: {error}); start the run again with the same command"
        ) from None


def load_stage(run: Run, name: str, mesh: Mesh) -> Trained:
    """The last state of a stage, on all devices.

    Raises:
      FileNotFoundError: its last checkpoint is not there.
      ValueError: that is damaged, or of another model; the message has the differences.
    """
    model = build_model(run.config, name, classes=len(run.class_names))
    # the optimizer's state is in the checkpoint; its rates are not used
    options, schedule = run.config[name].optimizer.to_dict(), optax.constant_schedule(0.0)
    shapes = abstract_state(
        run.config, name, model, make_optimizer(schedule=schedule, **options), mesh
    )
    state = load(run.workdir / "checkpoints" / name, run.steps[name], shapes)
    return Trained(model, state, build_eval_step(run.config, model, mesh))


def _read(file: Path, remedy: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"no finished run in {file.parent}: it has no {file.name}; {remedy}"
        )
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file} is damaged: it is not JSON; {remedy}") from None


def _config(saved: dict[str, Any], file: Path) -> ConfigDict:
    """The configuration with the saved values, which JSON has made plainer."""
    config, values = configuration.base(), configuration.flatten(saved)
    known = configuration.flatten(config)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"{file} is of another version: unknown field config.{unknown[0]}"
            f"{configuration.nearest(unknown[0], known)}"
        )
    for path, value in values.items():
        values[path] = tuple(value) if isinstance(value, list) else value
    config.update_from_flattened_dict(values)
    validate(config)
    return config
