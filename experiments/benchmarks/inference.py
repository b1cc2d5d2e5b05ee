"""Files a second of `supcon_jax.embed` beside images a second of the encoder alone.

    python experiments/benchmarks/inference.py --images DIR --workdir RUN

DIR is a folder of images, RUN a finished run. "embed" is what the command does with the files:
read, decode, scale and cut them in threads while the encoder computes, the rows in memory in the
end. "encoder" is its compiled function on batches that are on the devices already, one after the
other, each waited for. "decoding" is the same preparation of the files in as many threads, with no
encoder. The contestants take turns, after a first turn of each that is not counted, which compiles.
Writes inference.json and inference.md beside this file.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from supcon_jax.data.decode import usable_cores
from supcon_jax.inference import Encoder, apply_to_files, find_images, load_encoder
from supcon_jax.parallel import AXIS, make_mesh
from supcon_jax.report import circumstances
from supcon_jax.trained import open_run

EMBED, ENCODER, DECODING = "embed", "encoder", "decoding"


def embed(encoder: Encoder, files: list[Path], batch_size: int) -> int:
    bad: list[str] = []
    parts = apply_to_files(encoder, files, batch_size=batch_size, unreadable=bad.append)
    return sum(len(rows) for _, rows in parts)


def encode(encoder: Encoder, batches: list[jax.Array]) -> int:
    for batch in batches:
        np.asarray(encoder.apply_fn(encoder.variables, batch))
    return sum(len(batch) for batch in batches)


def decode(encoder: Encoder, files: list[Path]) -> int:
    with ThreadPoolExecutor(usable_cores()) as pool:
        return sum(1 for _ in pool.map(encoder.preprocess, files))


def ready(encoder: Encoder, files: list[Path], batch_size: int) -> list[jax.Array]:
    """As many batches as the files need, each of the first of them, split over the devices."""
    images = np.stack([encoder.preprocess(file) for file in files[:batch_size]])
    images = np.resize(images, (batch_size, *images.shape[1:]))
    split = NamedSharding(make_mesh(), PartitionSpec(AXIS))
    return [jax.device_put(images, split)] * -(-len(files) // batch_size)


def rates(contestants: dict[str, Callable[[], int]], turns: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            count = contestants[name]()
            if turn:
                found[name].append(round(count / (time.perf_counter() - start), 1))
        print(f"turn {turn} of {turns}", flush=True)
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    by_turn = [a / b for a, b in zip(found[one], found[other], strict=True)]
    numbers = {"median": statistics.median(by_turn), "min": min(by_turn), "max": max(by_turn)}
    return {name: round(number, 3) for name, number in numbers.items()}


def measure(workdir: Path, files: list[Path], batch_size: int, turns: int) -> dict[str, Any]:
    encoder = load_encoder(workdir)
    batches = ready(encoder, files, batch_size)
    found = rates(
        {
            EMBED: lambda: embed(encoder, files, batch_size),
            ENCODER: lambda: encode(encoder, batches),
            DECODING: lambda: decode(encoder, files),
        },
        turns,
    )
    medians = {name: statistics.median(values) for name, values in found.items()}
    per_core = medians[DECODING] / usable_cores()
    return {
        "images/s, median": medians,
        "by turns": {
            f"{EMBED} / {ENCODER}": ratio(found, EMBED, ENCODER),
            f"{EMBED} / {DECODING}": ratio(found, EMBED, DECODING),
        },
        "cores that decode as fast as the encoder computes": round(medians[ENCODER] / per_core, 2),
        "images/s, all turns": found,
        "load average": [round(load, 1) for load in os.getloadavg()],
    }


def described(workdir: Path) -> dict[str, Any]:
    config = open_run(workdir).config
    fields = ("name", "depth", "width", "stem", "dtype")
    return {
        "model": {name: config.model[name] for name in fields},
        "load_size": config.data.load_size,
        "image_size": config.data.image_size,
    }


def table(record: dict[str, Any]) -> str:
    results, files = record["results"], record["files"]
    hardware = record["hardware"]
    lines = [
        f"{files['count']:,} files of {files['bytes, mean'] / 1000:,.0f} kB, batches of "
        f"{record['batch_size']}, {hardware['cores']} cores, {hardware['devices']} x "
        f"{hardware['kind']}; medians of the turns of `{record['command']}`.",
        "",
        "| | images/s |",
        "| --- | --: |",
        *(f"| {name} | {rate:,.0f} |" for name, rate in results["images/s, median"].items()),
        *(
            f"| **{name}**, by turns | {r['median']:.2f} |"
            for name, r in results["by turns"].items()
        ),
        "",
        "Cores that decode as fast as the encoder computes: "
        f"{results['cores that decode as fast as the encoder computes']:.1f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of embed beside that of its encoder.")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--batch_size", type=int, default=64, help="for all devices")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    files = find_images([options.images])
    record = {
        "command": f"inference.py --images DIR --workdir RUN --batch_size {options.batch_size} "
        f"--turns {options.turns}",
        "batch_size": options.batch_size,
        "run": described(options.workdir),
        "files": {
            "count": len(files),
            "bytes, mean": round(statistics.mean(file.stat().st_size for file in files)),
        },
        "results": measure(options.workdir, files, options.batch_size, options.turns),
        **circumstances(),
    }
    here = Path(__file__)
    here.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    here.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
