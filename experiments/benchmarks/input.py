"""Images a second from JPEG files to random crops of 224 pixels, beside a bare loop and PyTorch.

    pip install torch simplejpeg
    python experiments/benchmarks/input.py --images DIR     # DIR/CLASS/IMAGE

Two sets of files: those of the folder as they are, and the same enlarged to 500 x 375 pixels at
quality 92, which is what most of ImageNet looks like. One view of each image, and two from one
decoding. The contestants take turns, and each turn counts batches once its buffers have emptied
and been filled again. Beside the loaders: what each library takes to decode, with the same crop.
Writes input.json and input.md beside this file.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from supcon_jax.data import decode, sources, streaming
from supcon_jax.report import circumstances

SIZE, AREA, RATIO = 224, (0.08, 1.0), (3 / 4, 4 / 3)
BATCH = 128
CORES = decode.usable_cores()
OURS, BARE, TORCH = "this stream", "bare loop", "DataLoader, Pillow"
PACKAGES = ("grain", "opencv-python-headless", "pillow", "simplejpeg", "torch")


# One image, written out: read, decode, crop.


def by_opencv(file: Path) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)


def by_simplejpeg(file: Path) -> np.ndarray:
    import simplejpeg

    return simplejpeg.decode_jpeg(file.read_bytes())


def by_pillow(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def by_pillow_draft(file: Path) -> np.ndarray:
    """At half the size or less where that is at least twice the crop's: seldom."""
    image = Image.open(file)
    image.draft("RGB", (2 * SIZE, 2 * SIZE))
    return np.asarray(image.convert("RGB"))


def crop_with_opencv(pixels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    box = decode.random_crop_box(draws, height, width, area=AREA, ratio=RATIO)
    return decode.resized_crop(pixels, box, SIZE)


def loop(
    files: list[Path], views: int, seconds: float, read: Callable[[Path], np.ndarray] = by_opencv
) -> float:
    """Images a second of a loop in one thread that does nothing else."""
    cv2.setNumThreads(1)
    draws = np.random.RandomState(0).random_sample((len(files), views, 4))
    out = np.empty((32, views, SIZE, SIZE, 3), np.uint8)
    start = time.perf_counter()
    for count, (file, of_views) in enumerate(itertools.cycle(zip(files, draws, strict=True))):
        if time.perf_counter() - start > seconds:
            return count / (time.perf_counter() - start)
        pixels = read(file)
        for view, of_view in enumerate(of_views):
            out[count % 32, view] = crop_with_opencv(pixels, of_view)
    raise ValueError("no files")


# The loaders: an endless iterator of batches each.


class Crops(torch.utils.data.Dataset):
    """As a torchvision pipeline does it: decode once, then `RandomResizedCrop` for each view."""

    def __init__(self, files: list[Path], views: int):
        self.files, self.views = files, views

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> np.ndarray:
        image = Image.open(self.files[index % len(self.files)]).convert("RGB")
        random, width, height = np.random.RandomState(index), image.width, image.height
        crops = []
        for draws in random.random_sample((self.views, 4)):
            top, left, tall, wide = decode.random_crop_box(
                draws, height, width, area=AREA, ratio=RATIO
            )
            box = tuple(map(round, (left, top, left + wide, top + tall)))
            crops.append(np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)))
        return np.stack(crops)


def torch_batches(files: list[Path], views: int, workers: int) -> Iterator[Any]:
    loader = torch.utils.data.DataLoader(
        Crops(files, views),
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    yield from loader


def our_batches(folder: Path, views: int, workers: int) -> Iterator[Any]:
    settings: dict[str, Any] = {"name": "", "load_size": SIZE, "channels": 3}
    source = sources.open_source(
        "folder", folder.name, directory=str(folder.parent), memory_limit_gb=0.0, **settings
    )
    return streaming.stream(
        source,
        start=0,
        stop=1_000_000,
        seed=0,
        stage="supcon",
        batch_size=BATCH,
        views=views,
        size=SIZE,
        channels=3,
        area=AREA,
        ratio=RATIO,
        workers=workers,
    )


def rate(batches: Any, workers: int, seconds: float) -> float:
    """Images a second, once as many batches as can have been made before were taken."""
    with closing(batches) as batches:
        for _ in range(2 + 2 * max(1, workers)):
            next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            count += BATCH
        return count / (time.perf_counter() - start)


def loops(files: list[Path], views: int, seconds: float, pool: Any) -> float:
    """The sum over as many processes as cores."""
    shares = [(files[i::CORES], views, seconds) for i in range(CORES)]
    return sum(pool.starmap(loop, shares, chunksize=1))


def contestants(folder: Path, views: int, seconds: float, pool: Any) -> dict[str, Any]:
    files = sorted(folder.glob("*/*"))
    everyone = {
        f"{BARE}, 1 core": lambda: loop(files, views, seconds),
        f"{BARE}, all cores": lambda: loops(files, views, seconds, pool),
        f"{OURS}, 1 worker": lambda: rate(our_batches(folder, views, 1), 1, seconds),
        f"{OURS}, all cores": lambda: rate(our_batches(folder, views, CORES), CORES, seconds),
        f"{OURS}, threads": lambda: rate(our_batches(folder, views, 0), CORES, seconds),
        f"{TORCH}, all cores": lambda: rate(torch_batches(files, views, CORES), CORES, seconds),
    }
    readers = {"simplejpeg": by_simplejpeg, "Pillow": by_pillow, "Pillow, draft": by_pillow_draft}
    for name, read in readers.items():
        everyone[f"decoded by {name}, 1 core"] = functools.partial(
            loop, files, views, seconds, read
        )
    return everyone


# The record.


def enlarged(source: Path, target: Path, count: int) -> Path:
    """Some of the files as most of ImageNet's are: 500 x 375 pixels, quality 92."""
    files = sorted(source.glob("*/*"))
    for file in files[:: max(1, len(files) // count)]:
        place = target / "train" / file.parent.name / f"{file.stem}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(file).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        image.save(place, quality=92)
    return target / "train"


def described(folder: Path) -> dict[str, Any]:
    """What the files are, and how far apart the libraries are that decode them for us."""
    files = sorted(folder.glob("*/*"))
    pairs = ((by_opencv(file).astype(int), by_pillow(file)) for file in files)
    return {
        "files": len(files),
        "bytes, mean": round(statistics.mean(file.stat().st_size for file in files)),
        "largest difference of OpenCV's pixels from Pillow's": max(
            int(np.abs(one - other).max()) for one, other in pairs
        ),
    }


def ratio(rates: dict[str, list[float]], one: str, other: str) -> dict[str, float]:
    by_turn = [a / b for a, b in zip(rates[one], rates[other], strict=True)]
    numbers = {"median": statistics.median(by_turn), "min": min(by_turn), "max": max(by_turn)}
    return {name: round(number, 3) for name, number in numbers.items()}


def measure(folder: Path, views: int, turns: int, seconds: float, pool: Any) -> dict[str, Any]:
    everyone = contestants(folder, views, seconds, pool)
    rates: dict[str, list[float]] = {name: [] for name in everyone}
    names = list(everyone)
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            rates[name].append(everyone[name]())
        print(f"{folder}, views: {views}, turn {turn + 1} of {turns}", flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    cores = {name: 1 if name.endswith(("1 core", "1 worker")) else CORES for name in names}
    compared = {
        "stream / bare loop": (f"{OURS}, all cores", f"{BARE}, all cores"),
        "threads / bare loop": (f"{OURS}, threads", f"{BARE}, all cores"),
        "stream / DataLoader": (f"{OURS}, all cores", f"{TORCH}, all cores"),
    }
    return {
        "images/s, median": {name: round(medians[name], 1) for name in names},
        "images/s per core, median": {
            name: round(medians[name] / cores[name], 1) for name in names
        },
        "by turns": {name: ratio(rates, *pair) for name, pair in compared.items()},
        "images/s, all turns": {name: [round(x, 1) for x in r] for name, r in rates.items()},
    }


def table(record: dict[str, Any]) -> str:
    results = record["results"].values()
    lines = [
        f"Images a second and core on {record['hardware']['cores']} cores, medians of the turns of "
        f"`{record['command']}`.",
        "",
        "| | " + " | ".join(record["results"]) + " |",
        "| --- |" + " --: |" * len(results),
    ]
    for name in next(iter(results))["images/s per core, median"]:
        cells = [f"{result['images/s per core, median'][name]:,.0f}" for result in results]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in next(iter(results))["by turns"]:
        cells = [f"{result['by turns'][name]['median']:.2f}" for result in results]
        lines.append(f"| **{name}**, all cores, by turns | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of reading, decoding and cropping.")
    parser.add_argument("--images", type=Path, required=True, help="folder of CLASS/IMAGE")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="that each turn measures")
    options = parser.parse_args()
    processes = multiprocessing.get_context("spawn").Pool(CORES)
    with tempfile.TemporaryDirectory() as temporary, processes as pool:
        folders = {
            "as they are": options.images,
            "500 x 375": enlarged(options.images, Path(temporary), 1000),
        }
        files = {name: described(folder) for name, folder in folders.items()}
        results = {
            f"{name}, views: {views}": measure(folder, views, options.turns, options.seconds, pool)
            for name, folder in folders.items()
            for views in (1, 2)
        }
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    record = {
        "command": f"input.py --images DIR --turns {options.turns} --seconds {options.seconds:g}",
        "files": files,
        "results": results,
        "packages": versions,
        **circumstances(),
    }
    here = Path(__file__)
    here.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    here.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
