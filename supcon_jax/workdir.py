"""The folder of a run: who may write there, and files that are whole or not there at all."""

import fcntl
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from supcon_jax import config as configuration

LOCK = ".lock"


def check_config(workdir: Path, plain: dict[str, Any]) -> None:
    """Refuse a workdir where a run with another configuration was started.

    Args:
      workdir: folder of the run; it need not exist.
      plain: the configuration, from `config.used`.

    Raises:
      ValueError: the hashed fields differ; the message lists them.
    """
    file = workdir / "config.json"
    if not file.exists():
        return
    try:
        lines = configuration.difference(json.loads(file.read_text())["config"], plain)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read: {error!r}. Repair it, or go on with this configuration: "
            "--allow_config_change"
        ) from None
    if lines:
        raise ValueError(
            f"{workdir} holds a run with another configuration:\n  "
            + "\n  ".join(lines)
            + "\nuse another --workdir, or go on with the new one: --allow_config_change"
        )


@contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it for as long as this process lives.

    Raises:
      OSError: it cannot be written, or another run is going on there.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise OSError(f"cannot write to the workdir {workdir}: {error.strerror}") from None
    with (workdir / LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise OSError(
                f"another run is going on in {workdir} ({lock.read().strip()}): wait for it, stop "
                "it, or use another --workdir"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it has the old text or the new one, also after a crash."""
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("w", encoding="utf-8", errors="surrogateescape") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)


def write_json(file: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_whole(file, json.dumps(content, indent=2) + "\n")


def reserve(folder: Path, of: dict[str, Any]) -> None:
    """Make a folder for work that goes on where it was interrupted, and only there.

    Args:
      folder: emptied if what it holds is not of the same.
      of: all that the work depends on, as JSON has it; kept in "of.json".
    """
    file = folder / "of.json"
    if file.exists() and json.loads(file.read_text()) == of:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(file, of)
