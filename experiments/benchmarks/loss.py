"""Time and memory of the loss, forward and backward, beside every peer that runs here.

    pip install torch pytorch-metric-learning
    python experiments/benchmarks/loss.py

D = 128, 100 classes, float32, temperature 0.1, N = 1,024 to 65,536 rows. Each contestant lives in a
process of its own and they take turns, so that a slow minute of a shared machine meets all of them.
The floor is the faster of two plain chains of three matrix products of 2 N^2 D operations each, in
jax and in PyTorch, timed in the same turns; the record also has the time of these operations at the
rate of the fastest square product, which products with a side of 128 do not reach. Extra memory is
the peak of the resident set during the first step over what it was before, with the program
compiled and the inputs there. A contestant ends where its next size would need more memory than
there is, or more time than --longest. Writes loss.json, loss.md and loss.png beside this file.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DIM, CLASSES, TEMPERATURE = 128, 100, 0.1
SQUARE = 2048  # of the matrix product whose rate sets the floor
PAUSE = 0.4  # seconds; threads of the contestant before may spin for a while when they are done
LOSS = "supcon_jax, blocks"
NAMES = {
    LOSS: "supcon_jax, blocks of 1024",
    "supcon_jax, dense": "supcon_jax, dense",
    "PyTorch": "PyTorch, dense, as the authors' code",
    "PyTorch, log_softmax": "PyTorch, dense, the fastest we found",
    "PML": "pytorch-metric-learning",
    "optax": "optax ntxent (another formula)",
    "chain, jax": "three matrix products, jax",
    "chain, torch": "three matrix products, PyTorch",
}
CHAINS = ("chain, jax", "chain, torch")
SQUARES = ("square product, jax", "square product, torch")
HERE = Path(__file__)

Step = Callable[[], float]


def inputs(rows: int) -> tuple[Any, Any]:
    """Normalised features [rows, DIM] and labels [rows]."""
    import numpy as np

    rng = np.random.default_rng(0)
    features = rng.standard_normal((rows, DIM), np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features, rng.permutation(rows).astype(np.int32) % CLASSES


def with_jax(function: Callable[[Any, Any], Any], gradient: bool = True) -> Callable[[int], Step]:
    """`function` of features and labels, compiled ahead; its step ends when the result is there."""

    def build(rows: int) -> Step:
        import jax

        arrays = jax.block_until_ready(jax.device_put(inputs(rows)))
        whole = jax.value_and_grad(function) if gradient else function
        compiled = jax.jit(whole).lower(*arrays).compile()

        def step() -> float:
            value, rest = jax.block_until_ready(compiled(*arrays))
            del rest
            return float(value)

        return step

    return build


def with_torch(make: Callable[[], Callable[[Any, Any], Any]]) -> Callable[[int], Step]:
    def build(rows: int) -> Step:
        import torch

        features, labels = map(torch.from_numpy, inputs(rows))
        function = make()

        def step() -> float:
            leaf = features.detach().requires_grad_()
            value = function(leaf, labels.long())
            value.backward()
            return value.item()

        return step

    return build


def blocks(features: Any, labels: Any) -> Any:
    from supcon_jax import supcon_loss

    return supcon_loss(features, labels, temperature=TEMPERATURE, block_size=1024).mean()


def dense(features: Any, labels: Any) -> Any:
    from supcon_jax import supcon_loss

    return supcon_loss(features, labels, temperature=TEMPERATURE).mean()


def optax_ntxent(features: Any, labels: Any) -> Any:
    import optax

    return optax.losses.ntxent(features, labels, TEMPERATURE)


def torch_supcon() -> Callable[[Any, Any], Any]:
    """Eq. 2 of flat features, dense, step by step as the authors' PyTorch code does it."""
    import torch

    def loss(features: Any, labels: Any) -> Any:
        logits = features @ features.T / TEMPERATURE
        logits = logits - logits.detach().amax(1, keepdim=True)
        others = torch.ones_like(logits).fill_diagonal_(0)
        positives = (labels[:, None] == labels[None]).float() * others
        exponentials = logits.exp() * others
        log_ratios = logits - exponentials.sum(1, keepdim=True).log()
        return -((positives * log_ratios).sum(1) / positives.sum(1)).mean()

    return loss


def torch_log_softmax() -> Callable[[Any, Any], Any]:
    """The same, as fast as we could write it: a fused log-softmax, with the anchor at -10,000."""
    import torch

    def loss(features: Any, labels: Any) -> Any:
        logits = ((features / TEMPERATURE) @ features.T).fill_diagonal_(-1e4)
        positives = (labels[:, None] == labels[None]).float().fill_diagonal_(0)
        log_ratios = torch.log_softmax(logits, 1)
        return -((positives * log_ratios).sum(1) / positives.sum(1)).mean()

    return loss


def pml_supcon() -> Callable[[Any, Any], Any]:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=TEMPERATURE)


def chain(features: Any, labels: Any) -> Any:
    """The three products that a dense forward and backward pass consist of."""
    import jax
    import jax.numpy as jnp

    multiply = lambda x, y: jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    similarities = multiply(features, features.T)
    return labels[0], (multiply(similarities, features), multiply(similarities.T, features))


def chain_torch(rows: int) -> Step:
    import torch

    features = torch.from_numpy(inputs(rows)[0])

    def step() -> float:
        similarities = features @ features.T
        return (similarities @ features)[0, 0].item() + (similarities.T @ features)[0, 0].item()

    return step


def square_jax(rows: int) -> Step:
    import jax
    import jax.numpy as jnp

    x = jnp.ones((SQUARE, SQUARE))
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
    product.lower(x).compile()
    return lambda: float(jax.block_until_ready(product(x))[0, 0])


def square_torch(rows: int) -> Step:
    import torch

    x = torch.ones(SQUARE, SQUARE)
    return lambda: (x @ x)[0, 0].item()


CONTESTANTS: dict[str, Callable[[int], Step]] = {
    LOSS: with_jax(blocks),
    "supcon_jax, dense": with_jax(dense),
    "PyTorch": with_torch(torch_supcon),
    "PyTorch, log_softmax": with_torch(torch_log_softmax),
    "PML": with_torch(pml_supcon),
    "optax": with_jax(optax_ntxent),
    CHAINS[0]: with_jax(chain, gradient=False),
    CHAINS[1]: chain_torch,
    SQUARES[0]: square_jax,
    SQUARES[1]: square_torch,
}


def times(step: Step) -> list[float]:
    """Of three steps or a quarter of a second of them; of fewer where they take over 5 seconds.

    The first after a pause meets cold caches and sleeping threads.
    """
    seconds: list[float] = []
    while sum(seconds) < 0.25 or (len(seconds) < 3 and sum(seconds) < 5):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def memory(file: str, field: str) -> int:
    """Bytes, as /proc counts them."""
    line = next(x for x in Path(file).read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


def contestant(name: str) -> None:
    """The child: a line with a number of rows prepares them, an empty line runs a step."""
    step: Step | None = None
    CONTESTANTS[name](64)()  # loads and starts what it needs
    for line in sys.stdin:
        if line.strip():
            step = None
            step = CONTESTANTS[name](int(line))
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            before, start = memory("/proc/self/status", "VmRSS"), time.perf_counter()
            value = step()
            answer = {
                "loss": value,
                "first": time.perf_counter() - start,
                "extra bytes": max(memory("/proc/self/status", "VmHWM") - before, 0),
            }
        else:
            assert step is not None
            answer = {"seconds": statistics.median(times(step))}
        print(json.dumps(answer), flush=True)


class Child:
    """A contestant in its own process."""

    def __init__(self, name: str):
        command = [sys.executable, str(HERE), "--contestant", name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, question: str = "") -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args} ended: {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(sizes: list[int], turns: int, longest: float) -> dict[str, Any]:
    """Times and memory of all contestants at all sizes; who grew too large is left out."""
    children = {name: Child(name) for name in CONTESTANTS}
    ended: dict[str, str] = {}
    results: dict[str, Any] = {}
    for rows in sizes:
        now = {}
        for name, child in children.items():
            if name in ended:
                continue
            now[name] = child.ask(str(rows))
            print(f"{rows:6d}  {name}: {now[name]}", flush=True)
        seconds: dict[str, list[float]] = {name: [] for name in now}
        for _ in range(turns):
            for name in now:
                time.sleep(PAUSE)
                seconds[name].append(children[name].ask()["seconds"])
        results[str(rows)] = {
            name: {**now[name], "seconds": seconds[name], "median": statistics.median(times)}
            for name, times in seconds.items()
        }
        for name in now:
            needed, duration = 4 * now[name]["extra bytes"], 4 * statistics.median(seconds[name])
            most = 0.7 * memory("/proc/meminfo", "MemAvailable")
            if name not in SQUARES and (needed > most or duration > longest):
                ended[name] = f"{needed / 2**30:.0f} GiB and {duration:.0f} s expected at twice"
                children[name].end()
    for name in children.keys() - ended.keys():
        children[name].end()
    return {"rows": results, "ended": ended}


def derive(record: dict[str, Any]) -> dict[str, Any]:
    """The floor of each size and what the losses need beside it: medians of the turns' ratios."""
    derived = {}
    for rows, row in record["rows"].items():
        ours = row[LOSS]["seconds"]
        losses = {name: row[name] for name in NAMES if name in row}
        ended = not any(name in row for name in CHAINS)
        floors = ours if ended else _fastest(row, CHAINS)
        at_square_rate = [
            6 * int(rows) ** 2 * DIM / (2 * SQUARE**3) * square for square in _fastest(row, SQUARES)
        ]
        derived[rows] = {
            "floor seconds": None if ended else statistics.median(floors),
            "times the floor": {
                n: None if ended else _ratio(x["seconds"], floors) for n, x in losses.items()
            },
            "blocks over three products at the square product's rate": _ratio(ours, at_square_rate),
            "times the blocks": {n: _ratio(x["seconds"], ours) for n, x in losses.items()},
            "extra MiB": {n: round(x["extra bytes"] / 2**20, 1) for n, x in losses.items()},
            "nanoseconds a pair, blocks": round(1e9 * row[LOSS]["median"] / int(rows) ** 2, 3),
        }
    return derived


def _fastest(row: dict[str, Any], names: tuple[str, ...]) -> list[float]:
    """Of each turn."""
    times = [row[name]["seconds"] for name in names if name in row]
    return [min(turn) for turn in zip(*times, strict=True)]


def _ratio(times: list[float], others: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(times, others, strict=True)), 2)


def table(record: dict[str, Any]) -> str:
    """Contestants by sizes: seconds and times the floor, extra MiB."""
    sizes = list(record["rows"])

    def seconds(rows: str, name: str) -> str:
        share = record["derived"][rows]["times the floor"][name]
        of_floor = "" if share is None else f" ({share:.2f})"
        return f"{record['rows'][rows][name]['median']:.3g}{of_floor}"

    def extra(rows: str, name: str) -> str:
        return f"{record['derived'][rows]['extra MiB'][name]:,.0f}"

    lines = []
    for title, cell in (("seconds (times the floor)", seconds), ("extra MiB", extra)):
        lines += ["| " + " | ".join([title, *(f"{int(n):,}" for n in sizes)]) + " |"]
        lines += ["| --- |" + " ---: |" * len(sizes)]
        for name, label in NAMES.items():
            cells = [cell(n, name) if name in record["rows"][n] else "" for n in sizes]
            lines += ["| " + " | ".join([label, *cells]) + " |"]
        lines += [""]
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """Time and memory against N."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (of_time, of_memory) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name, label in NAMES.items():
        sizes = [int(n) for n, row in record["rows"].items() if name in row]
        rows = [record["rows"][str(n)][name] for n in sizes]
        style = dict(marker="o", markersize=4, linewidth=2.5 if name == LOSS else 1.2)
        of_time.plot(sizes, [x["median"] for x in rows], label=label, **style)
        of_memory.plot(sizes, [max(x["extra bytes"], 2**18) / 2**20 for x in rows], **style)
    sizes = [int(n) for n in record["rows"]]
    of_time.set_ylabel("seconds, forward and backward")
    of_memory.set_ylabel("extra memory at its peak, MiB")
    for axes in (of_time, of_memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [f"{n // 1024}k" for n in sizes])
        axes.minorticks_off()
        axes.set_xlabel("rows N (batch x views)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the loss beside its peers.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024 * 2**k for k in range(7)])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--longest", type=float, default=30, help="seconds a step may take")
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder of the record")
    parser.add_argument("--contestant", help="for the processes that this one starts")
    options = parser.parse_args()
    if options.contestant:
        contestant(options.contestant)
        return
    record = race(options.sizes, options.turns, options.longest)
    import importlib.metadata

    from supcon_jax.report import circumstances

    record["derived"] = derive(record)
    record["command"] = "loss.py " + " ".join(sys.argv[1:])
    record["peers"] = {
        name: importlib.metadata.version(name) for name in ("torch", "pytorch-metric-learning")
    }
    record |= circumstances()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "loss.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "loss.md").write_text(table(record))
    draw(record, options.out / "loss.png")
    print(table(record))
    print(json.dumps(record["derived"], indent=1))


if __name__ == "__main__":
    main()
