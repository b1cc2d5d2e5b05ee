"""Checkpoints of a stage: the last few and the best, through Orbax.

Each has two kinds of checksums, because Orbax restores a flipped bit without an error: of every
array as it was in memory, and of every file as it was when the checkpoint was complete.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from supcon_jax.parallel import agree, is_writer, wait_for_all
from supcon_jax.state import TrainState

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one stage in `directory/last` and `directory/best`.

    Two Orbax managers, because one that ranks by a metric deletes the newest when it is not among
    the best. Saving is asynchronous: the arrays are copied, then written by another thread.

    Args:
      directory: folder of the stage.
      keep: how many of the last ones stay.
      warn: takes a line about what is damaged and not needed, which is put aside.

    Raises:
      OSError: the folder cannot be read or written.
    """

    def __init__(self, directory: Path, keep: int, warn: Callable[[str], None] = print):
        self.directory = directory
        if is_writer():
            _put_damaged_aside(directory, warn)
        wait_for_all(f"checked {directory}")
        self._last = _manager(directory / "last", max_to_keep=keep)
        self._best = _manager(
            directory / "best", max_to_keep=1, best_fn=lambda metrics: metrics["score"]
        )

    def save(self, state: TrainState) -> None:
        """Keep the state as the newest.

        Raises:
          OSError: this one, or the one before, cannot be written; earlier ones stay.
        """
        with self._writing():
            self._last.save(int(state.step), args=_payload(state))

    def offer(self, state: TrainState, score: float) -> None:
        """Keep the state as the best if its held-out score is higher than those of all before.

        Raises:
          OSError: as `save`.
        """
        with self._writing():
            if score > self._highest():
                self._best.save(int(state.step), args=_payload(state), metrics={"score": score})

    def _highest(self) -> float:
        """The score of the best state so far."""
        self._best.wait_until_finished()  # its score is on disk only then
        step = self._best.best_step()
        return float("-inf") if step is None else self._best.metrics(step)["score"]

    def restore(self, like: TrainState, warn: Callable[[str], None] = print) -> TrainState | None:
        """The newest undamaged state, or None where there is none.

        Args:
          like: a state with the expected tree, shapes, types and shardings.
          warn: takes a line about each damaged checkpoint that is passed over.

        Raises:
          ValueError: checkpoints are there, but all are damaged or of another model.
        """
        steps = sorted(self._last.all_steps(), reverse=True)
        for step in steps:
            try:
                return _restore(self._last, step, like)
            except Exception as error:  # noqa: BLE001  (Orbax raises many kinds)
                where = self._last.directory / str(step)
                warn(f"checkpoint {where} is not usable: {_reason(error)}")
        if steps:
            raise ValueError(
                f"no usable checkpoint in {self._last.directory}, see above; remove the folder to "
                "start again"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Remove newer checkpoints: the damaged ones that a resumed run will write again."""
        for manager in (self._last, self._best):
            for newer in [s for s in manager.all_steps() if s > step]:
                manager.delete(newer)

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
          OSError: something cannot be.
        """
        with ExitStack() as stack:
            stack.enter_context(self._writing())
            for manager in (self._last, self._best):
                stack.callback(manager.close)
                stack.callback(manager.wait_until_finished)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # (Orbax raises many kinds)
            raise OSError(
                f"cannot write a checkpoint to {self.directory}: {_reason(error)}. The earlier "
                "ones are kept: make room, and the same command goes on from the newest of them"
            ) from error


def check_path(folder: Path) -> None:
    """Refuse a folder whose checkpoints would not be found again: Orbax reads paths as patterns.

    Raises:
      ValueError: its absolute path has a backslash, or letters in brackets.
    """
    path = str(folder.absolute())
    if "\\" in path or not fnmatchcase(path, path):
        raise ValueError(
            f"no checkpoint can be read from {path}, because of the brackets or the backslash in "
            "its name: use another --workdir, or rename it"
        )


def load(directory: Path, step: int, like: PyTree) -> TrainState:
    """The state of a stage at one step, to use it elsewhere; nothing is written.

    Args:
      directory: folder of the stage.
      step: that is wanted; no other is taken in its place.
      like: shapes of the expected tree, with shardings, see `stages.abstract_state`.

    Raises:
      FileNotFoundError: that step is not there.
      ValueError: it is damaged, or of another model; the message has the differences. Or see
        `check_path`.
    """
    check_path(directory)
    last = (directory / "last").absolute()
    if not (last / str(step)).is_dir():
        raise FileNotFoundError(f"no checkpoint {last / str(step)}: the run has moved or not ended")
    try:
        with _without_warnings(), _reader(last) as manager:
            return _restore(manager, step, like)
    except Exception as error:  # (Orbax raises many kinds)
        raise ValueError(
            f"checkpoint {last / str(step)} is not usable: {_reason(error)}"
        ) from error


def _reader(directory: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    return ocp.CheckpointManager(directory, options=options)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns of every directory that is only read: in a notebook, in the midst of results."""
    logger = getLogger("absl")
    before = logger.level
    logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(before)


def _reason(error: Exception) -> str:
    """The first line of its message; of a long one, which names files, the beginning and end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:100]} ... {lines[0][-95:]}"


def leaves(state: PyTree) -> dict[str, dict[str, Any]]:
    """Shape, type and, of arrays, CRC-32 of the bytes of each leaf, by its path in the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): _describe(leaf) for path, leaf in flat}


def _describe(leaf: Any) -> dict[str, Any]:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        read = jax.random.key_data
        leaf = read(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(read, leaf)
    about = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if isinstance(leaf, jax.ShapeDtypeStruct):  # nothing but a shape to compare with
        return about
    return {**about, "crc32": zlib.crc32(np.asarray(leaf).tobytes())}


def _payload(state: TrainState) -> ocp.args.Composite:
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state), leaves=ocp.args.JsonSave(leaves(state))
    )


def _restore(manager: ocp.CheckpointManager, step: int, like: TrainState) -> TrainState:
    """In two parts, because processes that read arrays wait there for all others: what one of them
    can find wrong alone is agreed on before.
    """
    saved = _together(lambda: _check(Path(manager.directory, str(step)), like))
    return _together(lambda: _read(manager, step, like, saved))


def _together(part: Callable[[], T]) -> T:
    """What the part returns, where it raises in no process of the run; else all raise."""
    try:
        result, error = part(), None
    except Exception as caught:  # noqa: BLE001  (Orbax raises many kinds)
        result, error = None, caught
    if not agree(error is None):
        raise error or ValueError("damaged for another process")
    return result  # type: ignore[return-value]


def _check(checkpoint: Path, like: TrainState) -> dict[str, dict]:
    """The descriptions of its leaves; raises ValueError if it is damaged or of another model."""
    if is_writer():
        _check_files(checkpoint)
    saved = ocp.JsonCheckpointHandler().restore(checkpoint / "leaves")
    if differences := _differences(saved, leaves(like)):
        raise ValueError(f"it is of another model: {differences}")
    return dict(saved)


def _read(
    manager: ocp.CheckpointManager, step: int, like: TrainState, saved: dict[str, dict]
) -> TrainState:
    """The arrays; raises ValueError if they are not as they were in memory."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    state = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
    ).state
    damaged = [name for name, about in leaves(state).items() if about != saved[name]]
    if damaged:
        raise ValueError(f"{len(damaged)} arrays differ from their checksums, such as {damaged[0]}")
    return state


def _differences(there: dict[str, dict], here: dict[str, dict]) -> str:
    """Where two trees have other arrays, by their paths; empty where they do not."""
    kinds = {
        "only there": sorted(there.keys() - here.keys()),
        "only here": sorted(here.keys() - there.keys()),
        "of another shape or type": [
            f"{name} ({there[name]['shape']} {there[name]['dtype']} there, {here[name]['shape']} "
            f"{here[name]['dtype']} here)"
            for name in sorted(there.keys() & here.keys())
            if any(there[name][what] != here[name][what] for what in ("shape", "dtype"))
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}, such as {', '.join(names[:2])}"
        for kind, names in kinds.items()
        if names
    )


CHECKSUMS = "checksums.json"
NOTE = "_CHECKPOINT_METADATA"
LATER = (NOTE, "commit_success.txt")  # written after it, with nothing of the state


def _seal(directory: Path) -> None:
    """Write the checksums of the files of the checkpoint that is about to be complete."""
    for checkpoint in directory.iterdir():
        if checkpoint.is_dir() and not (checkpoint / CHECKSUMS).exists():
            (checkpoint / CHECKSUMS).write_text(json.dumps(_checksums(checkpoint)))


def _checksums(checkpoint: Path) -> dict[str, int]:
    """CRC-32 of each file, by its path."""
    return {
        str(file.relative_to(checkpoint)): zlib.crc32(file.read_bytes())
        for file in sorted(checkpoint.rglob("*"))
        if file.is_file() and file.name not in (CHECKSUMS, *LATER)
    }


def _check_files(checkpoint: Path) -> None:
    """Raises ValueError if a file is not as it was when the checkpoint was complete."""
    expected, found = json.loads((checkpoint / CHECKSUMS).read_text()), _checksums(checkpoint)
    damaged = [n for n in sorted(expected | found) if expected.get(n) != found.get(n)]
    if damaged:
        raise ValueError(f"{len(damaged)} of its files are damaged, such as {damaged[0]}")


def _put_damaged_aside(directory: Path, warn: Callable[[str], None]) -> None:
    """Orbax reads the notes of all checkpoints, and the score of the best, before any is restored;
    where it cannot, none is restored.
    """
    for checkpoint in [*_complete(directory / "last"), *_complete(directory / "best")]:
        try:
            ocp.metadata.get_step_metadata(checkpoint)
        except Exception:  # noqa: BLE001  (Orbax raises many kinds)
            (checkpoint / NOTE).unlink(missing_ok=True)  # nothing of the state is in it
    for checkpoint in _complete(directory / "best"):
        try:
            _check_files(checkpoint)
        except Exception as error:  # noqa: BLE001  (what is damaged can be JSON of any type)
            aside = directory / f"best-{checkpoint.name}-damaged"
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            warn(
                f"checkpoint {checkpoint} is not usable: {_reason(error)}; it is put aside as "
                f"{aside}, and the best from here on is kept"
            )


def _complete(directory: Path) -> list[Path]:
    return [p for p in directory.glob("[0-9]*") if p.name.isdigit() and p.is_dir()]


def _manager(directory: Path, **settings: Any) -> ocp.CheckpointManager:
    sealing = ocp.AsyncOptions(post_finalization_callback=lambda: _seal(directory))
    # Several processes meet at barriers; without names of their own, two managers that write at
    # the same time meet at each other's.
    names = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=directory.name)
    options = ocp.CheckpointManagerOptions(
        create=True,
        cleanup_tmp_directories=True,
        async_options=sealing,
        multiprocessing_options=names,
        **settings,
    )
    try:
        return ocp.CheckpointManager(directory.absolute(), options=options)
    except Exception as error:  # (Orbax raises many kinds)
        raise OSError(
            f"cannot open the checkpoints in {directory}: {_reason(error)}. Repair the folder, or "
            "remove it to start again"
        ) from error
