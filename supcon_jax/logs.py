"""What a run tells: metrics.jsonl, CLU writers (TensorBoard), a progress bar or plain lines."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from supcon_jax.parallel import is_writer
from supcon_jax.workdir import write_whole


class Logs:
    """The metrics of a run, in `metrics.jsonl` and, through CLU, for TensorBoard.

    Args:
      workdir: folder of the run.
      writes: False: another process of the run writes, this one only reads.
    """

    def __init__(self, workdir: Path, writes: bool = True):
        self.workdir, self.writes = workdir, writes
        self.path = workdir / "metrics.jsonl"
        self._file = (self.path if writes else Path(os.devnull)).open("a")
        self._writer = _clu_writer(workdir / "tensorboard") if writes else None

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """One line; keys that begin with "time/" are times and rates, the others repeat exactly."""
        with self._writing():
            self._file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")
            if self._writer is not None:
                self._writer.write_scalars(step, {f"{stage}/{k}": v for k, v in metrics.items()})

    def flush(self) -> None:
        """Everything written so far is on disk.

        Raises:
          OSError: it cannot be written.
        """
        with self._writing():
            self._file.flush()
            if self.writes:
                os.fsync(self._file.fileno())

    def scores_at(self, stage: str, step: int) -> dict[str, float]:
        """The held-out scores that a stage wrote at a step, if it looked then."""
        metrics = self._metrics_at(stage, step)
        return {name: value for name, value in metrics.items() if name.startswith("heldout/")}

    def _metrics_at(self, stage: str, step: int) -> dict[str, float]:
        found = (r for r in read_metrics(self.workdir) if (r["stage"], r["step"]) == (stage, step))
        return {k: v for record in found for k, v in record.items() if k not in ("stage", "step")}

    def cut(self, stage: str, after: int) -> None:
        """Forget what a stage wrote after a step: a resumed run writes it again.

        What is left of it comes to the end of the file, so that what it writes again follows on it,
        and a later stage, which is cut in its turn, on that.
        """
        if not self.writes:
            return
        with self._writing():
            self._file.close()
            records = _records(self.path)
            others = [line for line, record in records if record["stage"] != stage]
            own = [line for line, r in records if r["stage"] == stage and r["step"] <= after]
            write_whole(self.path, "".join(others + own))
            self._file = self.path.open("a")

    def complete(self, stage: str, step: int, scores: Mapping[str, float]) -> None:
        """Add held-out scores to the newest record of a stage, which was stopped before it looked.

        Args:
          stage: its records are at the end of the file, see `cut`.
          step: of the record.
          scores: to add.
        """
        metrics = self._metrics_at(stage, step)
        self.cut(stage, after=step - 1)
        self.write(stage, step, {**metrics, **scores})
        self.flush()

    def close(self) -> None:
        with self._writing():
            self._file.close()
            if self._writer is not None:
                self._writer.flush()
                self._writer.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"cannot write the metrics to {self.workdir}: {error.strerror}. Make room, and the "
                "same command goes on from the last checkpoint"
            ) from error


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, in order."""
    return [record for _, record in _records(workdir / "metrics.jsonl")]


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    records = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):  # a killed run can leave half a line at the end
            break
        try:
            record = json.loads(line)
            record["stage"], record["step"] = str(record["stage"]), int(record["step"])
        except (ValueError, KeyError, TypeError, OverflowError):  # the last of Infinity
            raise ValueError(
                f"line {number} of {path} is damaged: repair or remove that line, then start again"
            ) from None
        records.append((line.decode(), record))
    return records


def _clu_writer(directory: Path) -> Any:
    """CLU's default writer (absl's log and TensorBoard), or None where CLU is not installed."""
    try:
        from supcon_jax import summary_writer

        summary_writer.install_without_tensorflow()
        from clu import metric_writers
    except ImportError as error:
        line = f"no TensorBoard files: {error}; metrics.jsonl has everything"
        print(line, file=sys.stderr, flush=True)
        return None
    return metric_writers.create_default_writer(str(directory))


def warn(line: str) -> None:
    """A line to the user, from one process of the run."""
    if is_writer():
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Progress of a stage: a bar on a terminal or in a notebook, elsewhere a line a log step.

    Args:
      stage: its name.
      start: steps done before this run.
      total: steps of the stage.
      stream: where to write; a bar is drawn if it is a terminal or the output of a notebook's cell.
    """

    def __init__(self, stage: str, start: int, total: int, stream: Any = None):
        self._stage, self._total = stage, total
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._shown: dict[str, float] = {}
        cell = type(self._stream).__module__ == "ipykernel.iostream"
        if cell or self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=start,
                desc=stage,
                file=self._stream,
                dynamic_ncols=not cell,  # the window of a notebook's server is not the user's
                ncols=CELL_COLUMNS if cell else None,
                mininterval=1.0 if cell else 0.1,  # each drawing is a message to the browser
                bar_format="{desc} |{bar}| {n}/{total} {remaining}{postfix}",
            )

    def move(self, step: int) -> None:
        """A step has been started."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step that matter most."""
        if self._bar is None:
            self.note(f"{self._stage} {step}/{self._total}  {summary(metrics)}")
        else:
            self._shown |= metrics  # held-out scores stay until there are newer ones
            taken = len(f"{self._stage} |    | {self._total}/{self._total} 00:00, ")
            room = (self._bar.format_dict["ncols"] or 80) - taken
            self._bar.set_postfix_str(summary(self._shown, room))

    def note(self, line: str) -> None:
        """A line of its own, above the bar."""
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


CELL_COLUMNS = 100
SHOWN = {  # metric -> how a line shows it, the most important first
    "loss": "loss {:.3f}",
    "excess": "excess {:.3f}",
    "heldout/top1": "top-1 {:.1%}",
    "heldout/knn": "k-NN {:.1%}",
    "contrastive_accuracy": "match {:.1%}",
    "accuracy": "train {:.1%}",
    "time/images_per_s": "{:,.0f} img/s",
}


def summary(metrics: Mapping[str, float], room: int = 1000) -> str:
    """The metrics that matter most, on one line, as many as there is room for."""
    parts = [text.format(metrics[key]) for key, text in SHOWN.items() if key in metrics]
    while len(line := "  ".join(parts)) > room:
        parts.pop()
    return line


class Clock:
    """Seconds of training: it stands while something else is done."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """From zero, and going."""
        self._before, self._since = 0.0, time.perf_counter()
        self._goes = True

    def pause(self) -> None:
        """Stand, until `resume`."""
        self._before, self._goes = self.seconds(), False

    def resume(self) -> None:
        """Go on."""
        self._since, self._goes = time.perf_counter(), True

    def seconds(self) -> float:
        """Since the restart, without pauses."""
        return self._before + (time.perf_counter() - self._since) * self._goes

    def lap(self) -> float:
        """`seconds`, counted from zero again; a clock that stands stays so."""
        seconds, self._before, self._since = self.seconds(), 0.0, time.perf_counter()
        return seconds


class Recorder:
    """Takes the metrics of every step, which stay on the device, and writes those of log steps.

    The metrics of a log step are fetched one step late, so that the device never waits; all losses
    since the last time are checked then.

    Args:
      stage: name of the stage.
      schedule: `step -> learning rate`.
      start: steps done before.
      total: steps of the stage.
      images_per_step: passes of images through the encoder in a step.
      every: steps between two records.
      skips: steps in a row that may lack a finite gradient, because the step leaves them out.
      logs: where the records go.
      checkpoints: folder that the message about a loss that is not finite names.
    """

    def __init__(
        self,
        stage: str,
        schedule: Callable[[int], Any],
        start: int,
        total: int,
        *,
        images_per_step: int,
        every: int,
        logs: Logs,
        checkpoints: Path,
        skips: int = 0,
    ):
        self._stage, self._schedule, self._total = stage, schedule, total
        self._images_per_step, self._every = images_per_step, every
        self._logs, self._checkpoints = logs, checkpoints
        self._skips, self._skipped, self._checked = skips, [0, 0], start  # in a row, in all
        self._progress = Progress(stage, start, total, None if logs.writes else io.StringIO())
        self._advice = Advice(self._progress.note)
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self._times: dict[str, float] = {}
        self._timed_from = start + 1  # the first step compiles and is not timed
        self._clock = Clock()
        self._lap: float | None = None  # seconds of a log step's record, where known before it

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the metrics of a step, and write those of the one before if it was a log step."""
        if step == self._timed_from and not self._times:
            jax.block_until_ready(metrics)
            self._times["time/compile_s"] = self._clock.lap()
        elif self._pending and self._pending[-1][0] % self._every == 0:
            self._fetch(None)
        self._pending.append((step, metrics))
        if step % self._every == 0 and _ready(metrics):  # one step later, the next would be in it
            self._lap = self._clock.lap()
        self._progress.move(step)

    def pause(self) -> None:
        """Wait for the device and stop the clock: what follows is not training.

        Raises:
          FloatingPointError: a loss or gradient was not finite.
        """
        for step, metrics in jax.block_until_ready(self._pending):
            self._check(step, metrics)
        self._clock.pause()

    def resume(self) -> None:
        """Start the clock again."""
        self._clock.resume()

    def catch_up(self, scores: Mapping[str, float] | None) -> None:
        """Write everything up to the newest step.

        Args:
          scores: held-out scores for its record; empty if the run stops before it looks, and then
            the record waits for them; None where no look is due.

        Raises:
          FloatingPointError: a loss or gradient was not finite.
        """
        self._fetch(scores)
        self._logs.flush()

    def start(self, scores: Mapping[str, float]) -> None:
        """The scores before the first step."""
        if scores:
            self._tell(0, dict(scores))
        self._clock.restart()

    def close(self) -> None:
        self._progress.close()

    def _fetch(self, scores: Mapping[str, float] | None) -> None:
        pending, self._pending = jax.device_get(self._pending), []
        for step, metrics in pending:
            values = {name: float(value) for name, value in metrics.items()}
            self._check(step, values)
            last, measured = step == pending[-1][0], step % self._every == 0
            if measured or step == self._total or (last and scores is not None):
                if not measured:  # then the objective's own metrics were not computed
                    values = {name: values[name] for name in ("loss", "grad_norm")}
                values["learning_rate"] = float(self._schedule(step - 1))
                self._tell(step, values | (dict(scores or {}) if last else {}) | self._time(step))
            if measured:
                self._advice.see(step, values)

    def _time(self, step: int) -> dict[str, float]:
        seconds = self._clock.lap() if self._lap is None else self._lap
        self._lap = None
        images = (step - self._timed_from) * self._images_per_step
        times, self._times, self._timed_from = self._times, {}, step
        if images:
            times |= {"time/seconds": seconds, "time/images_per_s": images / seconds}
        return times

    def _tell(self, step: int, record: dict[str, float]) -> None:
        record = {name: value for name, value in record.items() if math.isfinite(value)}  # for JSON
        self._logs.write(self._stage, step, record)
        self._progress.show(step, record)

    def _check(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step <= self._checked:
            return
        self._checked = step
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(float(metrics[name]))]
        if not bad:
            self._skipped[0] = 0
            return
        self._skipped = [count + 1 for count in self._skipped]
        what = {"loss": "loss", "grad_norm": "gradient's norm"}[bad[0]]
        found = f"the {what} of stage {self._stage} is {float(metrics[bad[0]])} at step {step}"
        in_a_row, in_all = self._skipped
        if in_a_row <= self._skips:
            self._progress.note(f"{found}: left out ({in_a_row} in a row, {in_all} in all)")
            return
        raise FloatingPointError(
            f"{found} (learning rate {float(self._schedule(step - 1)):.4g}). Likely causes: the "
            "learning rate is too high or its warm-up too short, the temperature too low, or the "
            "images hold values that are not finite. optimizer.clip_norm bounds the gradient, "
            "skip_nonfinite leaves such steps out. The checkpoints before it are kept in "
            f"{self._checkpoints}"
        )


def _ready(metrics: Mapping[str, Any]) -> bool:
    """Whether the step has ended that they are of, which some devices wait for."""
    return all(value.is_ready() for value in metrics.values())


class Advice:
    """One warning, with the likely remedies, for each way in which contrastive training stalls.

    Args:
      warn: takes a line.
      patience: steps at the collapsed value before the warning.
    """

    def __init__(self, warn: Callable[[str], None], patience: int = 200):
        self._warn, self._patience = warn, patience
        self._given: set[str] = set()
        self._stuck_since: int | None = None

    def see(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of a log step."""
        if metrics.get("lonely", 0.0) > 0.5:
            self._once(
                "lonely",
                f"{metrics['lonely']:.0%} of the samples have no positive from another sample in "
                "their batch, so the loss is nearly self-supervised: use a larger batch or fewer "
                "classes, or check the labels",
            )
        if "collapsed" not in metrics or metrics["loss"] < 0.99 * metrics["collapsed"]:
            self._stuck_since = None
            return
        self._stuck_since = step if self._stuck_since is None else self._stuck_since
        if step - self._stuck_since >= self._patience:
            self._once(
                "collapsed",
                f"the loss has been at a collapsed encoder's value, {metrics['collapsed']:.3f}, "
                f"for {step - self._stuck_since} steps: try a lower learning rate or a longer "
                "warm-up, a higher temperature, weaker augmentations, and check that labels belong "
                "to their images",
            )

    def _once(self, kind: str, line: str) -> None:
        if kind not in self._given:
            self._given.add(kind)
            self._warn(f"warning: {line}")
