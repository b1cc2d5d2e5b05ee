"""SIGTERM and Ctrl-C: the training loop ends at its next step, once it has saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number = number


class Interruptions:
    """Signals that ask a run to stop: they end it at once, but wait for the end of a step in the
    loop. A second one does not wait.

    With several processes a SIGTERM to one of them stops all at the same step; JAX's distributed
    run-time agrees on it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._number = 0
        self._waits = False

    @contextmanager
    def caught(self) -> Iterator["Interruptions"]:
        """Signals are treated so until the end; not outside of the main thread."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A signal is kept for `asked`; one that came too late for it ends the run after this."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self._number:
            self.stop("")

    def asked(self, step: int) -> bool:
        """Whether to save and stop after this step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._number = signal.SIGTERM
        return self._number != 0

    def stop(self, where: str) -> None:
        """Raises Stopped."""
        raise Stopped(self._number, where)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self._waits or self._number:
            raise Stopped(number, "")
        self._number = number
