"""What a compiled program needs and sends, read from the program itself; nothing is run.

The compilers of TPU slices work on any host: `tpu_devices` gives devices to compile for.
"""

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
SENT: dict[str, Callable[[int, int], float]] = {
    "all-gather": lambda whole, n: whole * (n - 1) / n,
    "reduce-scatter": lambda whole, n: whole * (n - 1),  # of its output, an n-th of the whole
    "all-reduce": lambda whole, n: 2 * whole * (n - 1) / n,
    "collective-permute": lambda whole, n: whole,
    "all-to-all": lambda whole, n: whole * (n - 1) / n,
}
OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(SENT)})(-start)?\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:body|calls|to_apply)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
BRANCH = re.compile(r"(?:true_computation|false_computation)=%?([\w.\-]+)")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")
TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"\}')
SIZE = r"([\d.]+)([KMGT]?)"
NEEDED = re.compile(rf"(?:Used |temporaries \(){SIZE}(?: of |\) exceeds available HBM \(){SIZE}")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TOPOLOGIES = "v5e:4x4, v5e:16x16, v4:4x4x8, v5p:2x2x2 or v6e:2x4"


class Collective(NamedTuple):
    """A collective operation of a program, with the counts of the loops that it is in."""

    kind: str
    times: int
    bytes: float  # that a device sends in all


class Figures(NamedTuple):
    """What one device needs for a run of a program; bytes, and operations.

    `peak` is arguments + outputs - donated + temporaries: what is held at once. XLA counts a loop's
    body once in `flops` and `accessed`.
    """

    arguments: int
    temporary: int
    peak: int
    flops: float
    accessed: float
    collectives: tuple[Collective, ...]


class DoesNotFitError(MemoryError):
    """The compiler found no way to place a program in a device's memory.

    Attributes:
      needed: bytes that it wanted, by the compiler's message.
      available: bytes that a program can have.
    """

    def __init__(self, needed: float, available: float):
        super().__init__(
            f"the program needs {needed / 2**30:.2f} GiB of a device that has "
            f"{available / 2**30:.2f} GiB for it"
        )
        self.needed, self.available = needed, available


def compiled_figures(jitted: Any, *shapes: Any, devices: int) -> Figures:
    """Compile a jitted function for arguments of these shapes and shardings, and read the program.

    Args:
      jitted: what `jax.jit` returned.
      shapes: trees of `jax.ShapeDtypeStruct` with shardings.
      devices: number of devices of those shardings.

    Returns:
      The figures of one device.

    Raises:
      DoesNotFitError: the compiler refuses because of the memory (a TPU's does).
    """
    try:
        compiled = jitted.lower(*shapes).compile()
    except jax.errors.JaxRuntimeError as error:
        found = NEEDED.search(str(error))
        if found is None:
            raise
        needed, available = (float(found[i]) * UNITS[found[i + 1]] for i in (1, 3))
        raise DoesNotFitError(needed, available) from None
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Figures(
        arguments=arguments,
        temporary=temporary,
        peak=arguments + results + temporary,
        flops=cost.get("flops", 0.0),
        accessed=cost.get("bytes accessed", 0.0),
        collectives=tuple(collectives(compiled.as_text(), devices)),
    )


def tpu_devices(topology: str) -> list[Any]:
    """The chips of a TPU slice, to compile for and not to run on.

    Args:
      topology: generation and chips along each axis, such as "v5e:16x16".

    Returns:
      One device a chip.

    Raises:
      ValueError: libtpu is not installed, or there is no such topology.
    """
    defaults = {  # libtpu looks for a TPU's host around it, unless told that there is none
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may compile at the same time
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Of the v4 two cores make one device, as they do by default on the machines themselves.
    options = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ValueError(
                "compiling for a TPU needs the package libtpu (no TPU is needed): "
                'pip install "jax[tpu]"'
            ) from None
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"no TPU topology {topology!r}; there are such as {TOPOLOGIES} ({reason})"
        ) from None
    return list(found.devices)


def collectives(hlo: str, devices: int) -> list[Collective]:
    """All of a compiled program's collectives, with their loops' counts.

    `bytes` are those that one device sends in the usual ring algorithms: (n - 1) / n of the whole
    for all-gather and reduce-scatter, twice that for all-reduce, all of its operand for a
    permutation. Loops count as often as XLA knows them to run, each branch of a condition once.

    Args:
      hlo: text of the program.
      devices: n, that each of its collectives spans.

    Returns:
      One entry for each operation in the text.
    """
    bodies, entry = _computations(hlo)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, []):
            trips = _trips(line, bodies)
            for inner in CALLED.findall(line):
                visit(inner, count * trips)
            listed = BRANCHES.search(line)
            branches = re.findall(r"[\w.\-]+", listed[1]) if listed else BRANCH.findall(line)
            for inner in branches:
                visit(inner, count)

    visit(entry, 1)
    found = []
    for name, count in times.items():
        for line in bodies.get(name, []):
            if match := OPERATION.search(line):
                kind, shapes = match[2], match[1]
                sent = SENT[kind](_bytes(shapes, of_pair=bool(match[3]), kind=kind), devices)
                found.append(Collective(kind, count, count * sent))
    return found


def sent_by_kind(found: Iterable[Collective]) -> dict[str, tuple[int, float]]:
    """`kind -> (operations, bytes)` of the collectives of a program."""
    operations: Counter[str] = Counter()
    sent: dict[str, float] = defaultdict(float)
    for one in found:
        operations[one.kind] += one.times
        sent[one.kind] += one.bytes
    return {kind: (operations[kind], sent[kind]) for kind in sorted(operations)}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the one that is run."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line.strip()):
            current = match[2]
            bodies[current] = []
            entry = current if match[1] else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often what a line calls is run: XLA's note, else the bound in the loop's condition."""
    if known := TRIPS.search(line):
        return int(known[1])
    if not (condition := CONDITION.search(line)):
        return 1
    bounds = [int(x) for row in bodies[condition[1]] for x in BOUND.findall(row)]
    return max(bounds, default=1)


def _bytes(shapes: str, of_pair: bool, kind: str) -> int:
    """Of a result; a start operation's is (operands, results, ...), but for an all-reduce."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    parts = [(number, dims) for number, dims in parts if number in SIZES]
    if of_pair and kind != "all-reduce":
        parts = [part for part in parts if part != ("u32", "")]
        parts = parts[len(parts) // 2 :]
    return sum(
        SIZES[number] * math.prod(map(int, filter(None, dims.split(",")))) for number, dims in parts
    )
