"""What the commands share: their help, errors in one line, compiled programs kept on disk."""

import io
import os
import platform
import re
import signal
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from types import TracebackType

import jax

try:
    from absl import logging
except ModuleNotFoundError:
    sys.exit("error: only the loss is installed here; the commands need supcon-jax[train]")

from supcon_jax.interruption import GO_ON, Stopped
from supcon_jax.logs import warn
from supcon_jax.terminal import fail as fail
from supcon_jax.terminal import parser as parser

TOO_LARGE = (
    "Less is needed with a smaller batch_size, --config.evaluation.batch_size or "
    "--config.data.memory_limit_gb, with micro_batches, --config.model.remat=True or "
    "--config.model.dtype=bfloat16; the same command with --plan --memory_gb=GB tells what fits"
)
EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)


def quiet_when_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """An excepthook: Ctrl-C outside of `running`, such as while libraries load, is one line too."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    sys.__excepthook__(kind, error, trace)


started = Path(sys.argv[0])  # else a script or a notebook has imported this
if started.name.startswith("supcon-") or started.parent == Path(__file__).parent:
    sys.excepthook = quiet_when_interrupted


@contextmanager
def running(debug: bool) -> Iterator[None]:
    """Around what a command does: quiet libraries, kept programs, errors in one line."""
    if not debug:
        quieten()
    keep_compiled_programs()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a notebook has none
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    with errors_in_one_line(debug):
        yield


@contextmanager
def errors_in_one_line(debug: bool) -> Iterator[None]:
    """End the process with one line for what users can mend; its traceback only to debug."""
    try:
        yield
        sys.stdout.flush()  # of a pipe whose reader has gone, here and not at the end
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except EXPECTED as error:
        fail(error, debug)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = (str(error) or "out of memory").splitlines()[0][:200].rstrip(".")
        fail(MemoryError(f"{first}. {TOO_LARGE}"), debug)
    except Stopped as stopped:
        warn(f"{stopped}; {GO_ON}")
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:  # where nothing is kept, or of one of several processes
        several = jax.distributed.is_initialized()
        goes_on = f"; {GO_ON}" if several else ""
        warn(f"interrupted{goes_on}")
        sys.exit(128 + signal.SIGINT)


@contextmanager
def data_remedy(remedy: str) -> Iterator[None]:
    """Around what opens a data set: one that is not there is found by flags of this command, not by
    those of the training.

    Args:
      remedy: the flags, in a sentence.
    """
    try:
        yield
    except FileNotFoundError as error:
        what, *of_training = re.split(r"[;.:] [^;.:]*--config\.", str(error), maxsplit=1)
        if not of_training:
            raise
        raise FileNotFoundError(f"{what}; {remedy}") from None


def check_file(out: Path) -> None:
    """Make the folder of a file that is written at the end.

    Raises:
      OSError: the file cannot be written.
    """
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder: --out needs the name of a file")
    make_folder(out.parent)


def make_folder(out: Path) -> None:
    """Make a folder, before the work whose results it is for.

    Raises:
      OSError: nothing can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}; choose another --out") from None


def quieten() -> None:
    """Orbax tells every step of a save, and a thousand lines beside the error of a full disk."""
    logging.set_verbosity(logging.FATAL)
    getLogger("asyncio").setLevel("CRITICAL")
    sys.unraisablehook = lambda unraisable: None


def keep_compiled_programs() -> None:
    """On disk, so that a run that is started again does not compile again; one folder for each kind
    of CPU, because the key of a program does not tell them apart.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        file = Path("/proc/cpuinfo")
        lines = file.read_text().splitlines() if file.exists() else [platform.processor()]
        features = next(
            (line for line in lines if line.startswith(("flags", "Features"))), lines[0]
        )
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches, "supcon_jax", f"{zlib.crc32(features.encode()):08x}")
        jax.config.update("jax_compilation_cache_dir", str(folder))
