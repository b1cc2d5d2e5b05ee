"""What the commands share: their help, errors in one line, compiled programs kept on disk."""

import argparse
import os
import platform
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import NoReturn

import jax

try:
    from absl import logging
except ModuleNotFoundError:
    sys.exit("error: only the loss is installed here; the commands need supcon-jax[train]")

from supcon_jax.interruption import Stopped
from supcon_jax.logs import warn

TOO_LARGE = (
    "Less is needed with a smaller batch_size, --config.evaluation.batch_size or "
    "--config.data.memory_limit_gb, with micro_batches, --config.model.remat=True or "
    "--config.model.dtype=bfloat16; the same command with --plan --memory_gb=GB tells what fits"
)
EXPECTED = (ValueError, OSError, FloatingPointError)


def parser(name: str, description: str, usage: str) -> argparse.ArgumentParser:
    """Of a command, with --debug; its help fits a screen.

    Args:
      name: module of the package.
      description: one sentence.
      usage: the arguments that people need.

    Returns:
      The parser, to which the arguments are added.
    """
    made = argparse.ArgumentParser(
        prog=f"python -m supcon_jax.{name}",
        description=description,
        usage=f"%(prog)s {usage}",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    made.add_argument("--debug", action="store_true", help="show logs and tracebacks")
    return made


@contextmanager
def running(debug: bool) -> Iterator[None]:
    """Around what a command does: quiet libraries, kept programs, errors in one line."""
    if not debug:
        quieten()
    keep_compiled_programs()
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
        warn(f"{stopped}; the same command goes on from the last checkpoint")
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:  # of one of several processes
        sys.exit("interrupted; the same command goes on from the last checkpoint")


def fail(error: Exception, debug: bool = False) -> NoReturn:
    """End the process with one line, in a run of several without waiting for the others."""
    if debug:
        raise error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {text}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # at once: an orderly end waits for the others, which wait for this one
    sys.exit(1)


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
