"""What a compiled program sends between devices, read from its HLO text.

Loops count as often as XLA knows them to run. `bytes` are those that one device sends in the usual
ring algorithms: (n - 1) / n of the whole for all-gather and reduce-scatter, twice that for
all-reduce, all of its operand for a permutation.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
SENT = {
    "all-gather": lambda whole, n: whole * (n - 1) / n,
    "reduce-scatter": lambda whole, n: whole * (n - 1),  # of its output, an n-th of the whole
    "all-reduce": lambda whole, n: 2 * whole * (n - 1) / n,
    "collective-permute": lambda whole, n: whole,
    "all-to-all": lambda whole, n: whole * (n - 1) / n,
}
OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(SENT)})(-start)?\(")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
BOUND = re.compile(r"s32\[\]\S* constant\((\d+)\)")
TRIPS = re.compile(r'known_trip_count"?:\s*\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    kind: str
    times: int
    bytes: float  # that a device sends in all


def collectives(hlo: str, devices: int) -> list[Collective]:
    """All of a compiled program's collectives, with their loops' counts."""
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line.strip()):
            current = match[2]
            bodies[current] = []
            entry = current if match[1] else entry
        elif current:
            bodies[current].append(line)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies.get(name, []):
            trips = _trips(line, bodies)
            branches = BRANCHES.search(line)
            called = CALLED.findall(line)
            called += re.findall(r"[\w.\-]+", branches[1]) if branches else []
            for inner in called:
                visit(inner, count * trips)

    visit(entry, 1)
    found = []
    for name, lines in bodies.items():
        for line in lines:
            if times[name] and (match := OPERATION.search(line)):
                sent = SENT[match[2]](_bytes(match[1], started=bool(match[3])), devices)
                found.append(Collective(match[2], times[name], times[name] * sent))
    return found


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often what a line calls is run: XLA's note, else the bound in the loop's condition."""
    if known := TRIPS.search(line):
        return int(known[1])
    if not (condition := CONDITION.search(line)):
        return 1
    bounds = [int(x) for row in bodies[condition[1]] for x in BOUND.findall(row)]
    return max(bounds, default=1)


def _bytes(shapes: str, started: bool) -> int:
    """Of a result; that of a start operation is (operands, results, ...)."""
    parts = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    parts = [(kind, dims) for kind, dims in parts if kind in SIZES]
    if started:
        parts = [part for part in parts if part != ("u32", "")]
        parts = parts[len(parts) // 2 :]
    return sum(
        SIZES[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in parts
    )
