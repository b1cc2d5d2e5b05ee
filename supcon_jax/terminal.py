"""What a command reads and says, where nothing but jax may be installed."""

import argparse
import difflib
import os
import sys
from typing import NoReturn

import jax

EXAMPLES = 3  # most in a help


class Parser(argparse.ArgumentParser):
    """Of a command: what is wrong with its arguments is one line."""

    def error(self, message: str) -> NoReturn:
        """End the process; the nearest flag is named where an unknown one is near to it."""
        _, _, unknown = message.partition("unrecognized arguments: ")
        flag = unknown.split()[0].partition("=")[0] if unknown else ""
        near = difflib.get_close_matches(flag, self._option_string_actions, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        fail(ValueError(f"{message}{meant}; see --help"))


def parser(name: str, doc: str | None) -> Parser:
    """Of a command, with --debug; its help fits a screen.

    Args:
      name: module of the package.
      doc: of the module: its first line says what the command does, the indented ones are examples.

    Returns:
      The parser, to which the arguments are added.
    """
    lines = (doc or name).splitlines()
    examples = [line.strip() for line in lines if line.startswith("    python -m ")]
    made = Parser(
        prog=f"python -m supcon_jax.{name}",
        description=lines[0],
        usage="\n       ".join(examples[:EXAMPLES]),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
        add_help=False,
    )
    made.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    made.add_argument("--debug", action="store_true", help="show logs and tracebacks")
    return made


def fail(error: Exception, debug: bool = False) -> NoReturn:
    """End the process with one line, in a run of several without waiting for the others."""
    if debug:
        raise error
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    print(f"error: {text}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(1)  # at once: an orderly end waits for the others, which wait for this one
    sys.exit(1)


def shown(name: str) -> str:
    r"""A file's name where only UTF-8 can be: other bytes of it as \xe9, so that none is lost."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
