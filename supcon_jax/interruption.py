"""SIGTERM and Ctrl-C: the training loop ends at its next step, once it has saved."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

T = TypeVar("T")
GO_ON = "the same command goes on from the last checkpoint"
PATIENCE = 10.0  # seconds; schedulers wait for some 30


class Stopped(KeyboardInterrupt):
    """A run that was asked to stop.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped by {signal.Signals(number).name}{where}")
        self.number = number


class Interruptions:
    """Signals that ask a run to stop: they end it at once, but where there is something to save
    they wait for the end of a step, or of a batch of a look. A second one does not wait.

    Python handles a signal once the main thread is back from what it called, which a compiler can
    delay for minutes: where nothing is to be saved, another thread then ends the process.

    With several processes a SIGTERM to one of them stops all at the same step; JAX's distributed
    run-time agrees on it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._number = 0
        self._unsaved = False
        self._handled = threading.Event()

    @contextmanager
    def caught(self) -> Iterator["Interruptions"]:
        """Signals are treated so until the end; not outside of the main thread."""
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        told, tells = socket.socketpair()
        tells.setblocking(False)
        threading.Thread(target=self._watch, args=(told,), daemon=True).start()
        before_told = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(before_told)
            tells.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """From the first `asked` on, when there is something to save, a signal is kept for the
        next; one that came too late for it ends the run after this.
        """
        try:
            yield
        finally:
            self._unsaved = False
        if self._number:
            self.stop("")

    def asked(self, step: int) -> bool:
        """Whether to save and stop after this step."""
        self._unsaved = True
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self._number = signal.SIGTERM
        return self._number != 0

    def heeding(self, step: Callable[..., T]) -> Callable[..., T]:
        """A step of a look, which raises Stopped instead once a signal is kept."""

        def unless_asked(*arguments: object, **options: object) -> T:
            if self._number:
                self.stop("")
            return step(*arguments, **options)

        return unless_asked

    def stop(self, where: str) -> None:
        """Raises Stopped."""
        raise Stopped(self._number, where)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._handled.set()
        if not self._unsaved or self._number:
            raise Stopped(number, "")
        self._number = number

    def _watch(self, told: socket.socket) -> None:
        """Ctrl-C has no deadline, and in a notebook an end would take the user's variables."""
        with told:
            while number := told.recv(1):
                while number[0] == signal.SIGTERM and not self._handled.wait(PATIENCE):
                    if not self._unsaved:
                        line = f"{Stopped(number[0], '')}; {GO_ON}"
                        print(line, file=sys.stderr, flush=True)
                        os._exit(128 + number[0])
