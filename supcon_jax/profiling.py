"""A profiler's trace of a few training steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from supcon_jax.logs import warn


class Traced:
    """A training step that also writes a trace of some of its calls.

    The trace has what the host and the devices did, and when: input, dispatch, every operation.
    TensorBoard (with its profile plugin) opens the folder, https://ui.perfetto.dev the file
    `perfetto_trace.json.gz` in it.

    Args:
      step: `(state, batch) -> state, metrics`.
      folder: for the trace.
    """

    FIRST, LAST = 3, 12  # calls; the first one compiles

    def __init__(self, step: Callable[..., Any], folder: Path):
        self._step, self._folder = step, folder
        self._calls, self._running = 0, False

    def __call__(self, *arguments: Any) -> Any:
        self._calls += 1
        if self._calls == self.FIRST:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train_step", step_num=self._calls):
            result = self._step(*arguments)
        if self._calls == self.LAST:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """End the trace, if the run stopped in the middle of it."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
            where = Path(*self._folder.parts[-2:])
            warn(f"a trace of {self._calls - self.FIRST + 1} steps is in the workdir's {where}")
