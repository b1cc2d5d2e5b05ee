"""A finished run, read back from its workdir, or an imported encoder as if it were one."""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.checkpoints import leaves, load
from supcon_jax.models import Model, load_torch_encoder
from supcon_jax.optimizers import make_optimizer
from supcon_jax.parallel import replicate
from supcon_jax.stages import abstract_state, build_eval_step, build_model
from supcon_jax.state import TrainState, create_state, merge
from supcon_jax.validation import validate


@dataclass(frozen=True)
class Run:
    """A finished run, or an imported encoder.

    Attributes:
      workdir: its folder.
      config: what it ran with, all stages included.
      class_names: label k is `class_names[k]`; none where the encoder is imported.
      steps: of each of its stages; none where the encoder is imported.
      config_hash: see `config.config_hash`; of an imported encoder with a hash of its file.
      checksums: of the last state of each stage, see `checksum`; none where the run is of a version
        that did not write them.
    """

    workdir: Path
    config: ConfigDict
    class_names: tuple[str, ...]
    steps: dict[str, int]
    config_hash: str
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, Any]:
        """What results of this run are kept with: other weights have another."""
        known = {"checksums": self.checksums} if self.checksums else {}
        return {"config_hash": self.config_hash, "steps": self.steps, **known}

    @property
    def imported(self) -> bool:
        """Whether the encoder is of `config.model.weights` and nothing was trained."""
        return not self.steps

    def stage_of(self, layer: str) -> str:
        """The stage whose last state has a layer: "encoder" (the last stage) or "projection".

        Raises:
          ValueError: no such layer in this run.
        """
        heads = {self.config[name].head.name: name for name in self.config.stages}
        known = {"encoder": self.config.stages[-1]}
        if "projection" in heads:
            known["projection"] = heads["projection"]
        if layer not in known:
            raise ValueError(f"no features {layer!r} in this run; there are {', '.join(known)}")
        return known[layer]

    def normalises(self, layer: str) -> bool:
        """Whether the heads got the features of a layer at length 1."""
        return layer == "encoder" and self.config.model.normalize


class Trained(NamedTuple):
    """A stage of a finished run, ready to be evaluated."""

    model: Model
    state: TrainState
    eval_step: Callable[..., dict[str, Any]]

    @property
    def variables(self) -> dict[str, Any]:
        """Of the model: the parameters that are evaluated, and the running statistics."""
        params = merge(self.state.evaluated, self.state.frozen)
        return {"params": params, "batch_stats": self.state.batch_stats}


def open_run(workdir: str | Path) -> Run:
    """The run of a workdir.

    Raises:
      FileNotFoundError: no run is there, or it has not finished.
      ValueError: its files are damaged, or its configuration is of another version or not what was
        trained with.
    """
    workdir = Path(workdir)
    record = _read(workdir / "config.json", "is it the --workdir of a training?")
    results = _read(workdir / "results.json", "start it again with the same command to finish it")
    try:
        config = _config(record["config"] | record["unused"], workdir / "config.json")
        steps = {name: int(results["stages"][name]["steps"]) for name in config.stages}
        names = tuple(map(str, record["class_names"]))
        sums = {n: of["checksum"] for n, of in results["stages"].items() if "checksum" in of}
        _check_hash(record, results["config_hash"], workdir)
        return Run(workdir, config, names, steps, results["config_hash"], sums)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json and results.json of {workdir} do not belong together or are damaged "
            f"({type(error).__name__}: {error}); start the run again with the same command"
        ) from None


def open_weights(config: ConfigDict, workdir: str | Path) -> Run:
    """The encoder in `config.model.weights`, to be evaluated as it is; `workdir` is for results.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a training has its files in `workdir`.
    """
    workdir, file = Path(workdir), Path(config.model.weights).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file of weights")
    if (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is the folder of a training; give imported weights their own")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:12]
    found = configuration.config_hash(configuration.used(config))
    return Run(workdir, config, (), {}, f"{found}-{digest}")


def load_stage(run: Run, name: str, mesh: Mesh) -> Trained:
    """The last state of a stage, or an imported encoder with a new head, on all devices.

    Raises:
      FileNotFoundError: its last checkpoint is not there.
      ValueError: that, or the file of the encoder, is damaged, or of another model or training; the
        message has the differences.
    """
    if run.imported:
        return _with_weights(run.config, name, mesh)
    model = build_model(run.config, name, classes=len(run.class_names))
    # the optimizer's state is in the checkpoint; its rates are not used
    options, schedule = run.config[name].optimizer.to_dict(), optax.constant_schedule(0.0)
    shapes = abstract_state(
        run.config, name, model, make_optimizer(schedule=schedule, **options), mesh
    )
    folder, step = run.workdir / "checkpoints" / name, run.steps[name]
    state = load(folder, step, shapes)
    expected, found = run.checksums.get(name), checksum(state)
    if expected not in (None, found):
        raise ValueError(
            f"checkpoint {folder / 'last' / str(step)} is of another training: its arrays have the "
            f"checksum {found}, in results.json it is {expected}. Put the run's own there, or "
            "train again in a new workdir"
        )
    return Trained(model, state, build_eval_step(run.config, model, mesh))


def checksum(state: TrainState) -> str:
    """Eight hexadecimal digits that stand for all arrays of a state.

    The CRC-32 of their paths, shapes, types and own CRC-32s, in the order of the paths: however
    often a state is saved and restored, and on whatever devices, it is the same.
    """
    return f"{zlib.crc32(json.dumps(leaves(state), sort_keys=True).encode()):08x}"


def _with_weights(config: ConfigDict, name: str, mesh: Mesh) -> Trained:
    model = build_model(config, name, classes=1)  # of a head that nothing is evaluated of
    encoder = load_torch_encoder(config.model.weights, model.encoder)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    state = create_state(model, optax.identity(), jax.random.key(0), shape, encoder)
    return Trained(model, replicate(state, mesh), build_eval_step(config, model, mesh))


def _check_hash(record: dict[str, Any], expected: str, workdir: Path) -> None:
    """Raises ValueError where config.json is not what the results are of."""
    found = configuration.config_hash(record["config"])
    if found == expected:
        return
    if record.get("config_hash") == expected:
        remedy = "it was changed after training: change it back, or train so in a new workdir"
    else:
        remedy = "a training was started there since: start it again with its command to finish it"
    raise ValueError(
        f"{workdir / 'config.json'} is not the configuration of results.json (hash {found} instead "
        f"of {expected}): {remedy}"
    )


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
