"""Views a second of each augmentation policy, beside Pillow doing the same to the same images.

    python experiments/benchmarks/augment.py

At 32 pixels from images of 32, and at 224 from images of 256 (parts of scikit-learn's two
photographs). Ours is one compiled program a policy for a whole batch; Pillow's is a loop of the
operations that torchvision runs on Pillow images, in one process, and in as many as there are
cores, which make their images themselves and keep the views, so that nothing is sent. All take
turns. Then the share of a training step that its augmentation takes: ResNet-18 at 32 pixels in
float32 on the CPU, ResNet-50 at 224 in bfloat16 on a GPU. Writes augment.json and augment.md beside
this file (--out).
"""

import argparse
import json
import math
import multiprocessing
import shlex
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_image

from supcon_jax import config as configuration
from supcon_jax import parallel, stages
from supcon_jax.data import policies, randaugment
from supcon_jax.data.decode import usable_cores
from supcon_jax.data.sources import Source
from supcon_jax.report import circumstances

SIZES = {32: (32, 256), 224: (256, 32)}  # side of the view -> side of the image, images at once
SETTINGS = {
    "crop_flip": dict(name="crop_flip"),
    "sim_augment": dict(name="sim_augment", jitter=0.5),
    "sim_augment, blur": dict(name="sim_augment", jitter=0.5, blur=0.5),
    "auto_augment, imagenet": dict(name="auto_augment", table="imagenet"),
    "auto_augment, cifar": dict(name="auto_augment", table="cifar"),
    "rand_augment 2, 10": dict(name="rand_augment", layers=2, magnitude=10.0),
    "stacked_rand_augment": dict(name="stacked_rand_augment", jitter=0.5, blur=0.5),
}
CORES = usable_cores()


@cache
def photographs(count: int, side: int) -> np.ndarray:
    """`[count, side, side, 3]` uint8: different parts of two photographs."""
    random, parts = np.random.RandomState(0), []
    for i in range(count):
        photo = load_sample_image(("china.jpg", "flower.jpg")[i % 2])
        top, left = random.randint(0, photo.shape[0] - side), random.randint(0, 640 - side)
        parts.append(photo[top : top + side, left : left + side])
    return np.stack(parts)


# Pillow's side.


def pillow_view(image: np.ndarray, random: np.random.RandomState, size: int, **settings) -> Image:
    view = _crop_and_flip(Image.fromarray(image), random, size)
    name = settings["name"]
    if "jitter" in settings and random.random_sample() < 0.8:
        view = _jitter(view, random, settings["jitter"])
    if name == "auto_augment":
        table, arguments = randaugment.TABLES[settings["table"]]
        for operation, probability, level in table[random.randint(len(table))]:
            if random.random_sample() < probability:
                view = _operation(view, random, operation, arguments(level).get(operation, 0))
    elif name.endswith("rand_augment"):
        arguments = randaugment.rand_arguments(settings.get("magnitude", 10.0))
        for _ in range(2):
            operation = randaugment.RAND_OPERATIONS[random.randint(17)]
            view = _operation(view, random, operation, arguments.get(operation, 0))
    if "jitter" in settings and random.random_sample() < 0.2:
        view = view.convert("L").convert("RGB")
    if random.random_sample() < settings.get("blur", 0.0):
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return view


def _crop_and_flip(image: Image.Image, random: np.random.RandomState, size: int) -> Image.Image:
    share, ratio = random.uniform(0.2, 1.0), math.exp(random.uniform(-0.2877, 0.2877))
    width = min(math.sqrt(share * image.width * image.height * ratio), image.width)
    height = min(math.sqrt(share * image.width * image.height / ratio), image.height)
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    view = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    flipped = random.random_sample() < 0.5
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else view


def _jitter(view: Image.Image, random: np.random.RandomState, strength: float) -> Image.Image:
    low, high = 1 - 0.8 * strength, 1 + 0.8 * strength
    for which in random.permutation(4):
        if which == 3:
            hue, saturation, value = view.convert("HSV").split()
            turn = int(255 * random.uniform(-0.2 * strength, 0.2 * strength)) % 256
            hue = Image.fromarray(np.asarray(hue) + np.uint8(turn))
            view = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[which]
            view = enhance(view).enhance(random.uniform(low, high))
    return view


def _operation(
    view: Image.Image, random: np.random.RandomState, name: str, argument: float
) -> Image.Image:
    signed = argument if random.random_sample() < 0.5 else -argument
    matrices = {
        "ShearX": (1, signed, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, signed, 1, 0),
        "TranslateX": (1, 0, signed * view.width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, signed * view.height),
    }
    if name in matrices:
        affine = Image.Transform.AFFINE
        return view.transform(view.size, affine, matrices[name], fillcolor=(128, 128, 128))
    if name == "Rotate":
        return view.rotate(signed, fillcolor=(128, 128, 128))
    if name == "Cutout":
        half, x, y = int(argument * view.height), *random.randint(0, view.width, 2)
        view = view.copy()
        view.paste((128, 128, 128), (x - half, y - half, x + half, y + half))
        return view
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(view).enhance(argument)
    if name == "SolarizeAdd":
        return view.point([i + int(argument) if i < 128 else i for i in range(256)] * 3)
    functions: dict[str, Callable] = {
        "Identity": lambda: view,
        "AutoContrast": lambda: ImageOps.autocontrast(view),
        "Equalize": lambda: ImageOps.equalize(view),
        "Invert": lambda: ImageOps.invert(view),
        "Posterize": lambda: ImageOps.posterize(view, max(1, int(argument))),
        "Solarize": lambda: ImageOps.solarize(view, int(argument)),
    }
    return functions[name]()


def pillow_batch(images: np.ndarray, seed: int, size: int, settings: dict) -> np.ndarray:
    """`[n, size, size, 3]` float32: what a loader hands over."""
    random = np.random.RandomState(seed)
    views = np.empty((len(images), size, size, 3), np.float32)
    for i, image in enumerate(images):
        views[i] = pillow_view(image, random, size, **settings)
    return (views / 255 - 0.5) / 0.5


def pillow_part(part: int, seed: int, size: int, settings: dict) -> None:
    """What one of the processes does of a batch."""
    side, count = SIZES[size]
    pillow_batch(np.array_split(photographs(count, side), CORES)[part], seed, size, settings)


# Ours.


def our_batch(images: np.ndarray, size: int, settings: dict) -> Callable[[int], object]:
    policy = policies.make_policy(size=size, crop_area=(0.2, 1.0), **settings)
    options = dict(policies=[policy], mean=(0.5,) * 3, std=(0.5,) * 3)
    make = jax.jit(partial(policies.make_views, **options))
    batch = {"image": jax.device_put(images[:, None])}

    def run(seed: int) -> object:
        keys = jax.random.split(jax.random.key(seed), len(images))
        return make(keys, batch).block_until_ready()

    return run


def in_all_cores(pool: ProcessPoolExecutor, seed: int, **work) -> None:
    list(pool.map(partial(pillow_part, seed=seed, **work), range(CORES)))


def speeds(size: int, names: list[str], turns: int, pool: ProcessPoolExecutor) -> dict[str, dict]:
    """Of each policy: views a second of the three, medians over the turns, and the ratios."""
    side, count = SIZES[size]
    images, found = photographs(count, side), {}
    for name in names:
        work = dict(size=size, settings=SETTINGS[name])
        contestants: dict[str, Callable[[int], object]] = {
            "ours": our_batch(images, **work),
            "Pillow": partial(pillow_batch, images, **work),
            "Pillow, all cores": partial(in_all_cores, pool, **work),
        }
        seconds: dict[str, list[float]] = {who: [] for who in contestants}
        for turn in range(turns + 1):
            for who, run in contestants.items():
                start = time.perf_counter()
                run(turn)
                if turn:  # the first compiles
                    seconds[who].append(time.perf_counter() - start)
        found[name] = {
            "views/s": {w: round(count / statistics.median(s)) for w, s in seconds.items()},
            "ours / Pillow": spread(seconds["Pillow"], seconds["ours"]),
            "ours / Pillow, all cores": spread(seconds["Pillow, all cores"], seconds["ours"]),
        }
        print(size, name, found[name], flush=True)
    return found


def spread(theirs: list[float], ours: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "median": round(statistics.median(ratios), 2),
        "min": round(min(ratios), 2),
        "max": round(max(ratios), 2),
    }


def share_of_step(turns: int, width: float) -> dict[str, float | str]:
    """Time of the augmentation alone over that of a training step with it, in turns."""
    gpu = jax.default_backend() == "gpu"
    config = configuration.load("resnet50" if gpu else "cifar10_resnet18")
    images, batch = (1024, 256) if gpu else (128, 32)
    config.model.update(width=width)
    config.supcon.update(batch_size=batch, warmup_epochs=0.0)
    config.log.every_steps = 1000
    shape = (config.data.load_size, config.data.load_size, 3)
    pixels = photographs(images, shape[0])
    labels = np.arange(images, dtype=np.int32) % 10
    names = tuple("0123456789")
    source = Source(
        "photographs", images, names, shape, lambda i: (pixels[i], labels[i]), lambda: labels
    )
    mesh = parallel.make_mesh(jax.devices()[:1])
    stage = stages.build_stage(config, "supcon", stages.Data(source, source, source, source), mesh)
    state = stages.create(stage, config, mesh, None)
    made = next(stages.batches(stage, 0, config, source, mesh))
    policy = policies.make_policy(size=config.data.image_size, **config.supcon.augment)
    options = dict(policies=[policy] * 2, mean=(0.5,) * 3, std=(0.5,) * 3)
    augment = jax.jit(partial(policies.make_views, **options))
    keys = jax.random.split(jax.random.key(0), batch)
    times: dict[str, list[float]] = {"augmentation": [], "step": []}
    for turn in range(turns + 2):
        start = time.perf_counter()
        jax.block_until_ready(augment(keys, {"image": jnp.asarray(made["image"])}))
        middle = time.perf_counter()
        state, metrics = stage.train_step(state, made)
        jax.block_until_ready(metrics)
        if turn > 1:
            times["augmentation"].append(middle - start)
            times["step"].append(time.perf_counter() - middle)
    shares = [a / b for a, b in zip(times["augmentation"], times["step"], strict=True)]
    return {
        "recipe": "resnet50 (AutoAugment)" if gpu else "cifar10_resnet18 (SimAugment)",
        "views": 2 * batch,
        "augmentation, s": round(statistics.median(times["augmentation"]), 5),
        "step, s": round(statistics.median(times["step"]), 5),
        "share": round(statistics.median(shares), 4),
        "smallest": round(min(shares), 4),
        "largest": round(max(shares), 4),
    }


def table(record: dict) -> str:
    lines = [
        f"| px | policy | ours, views/s | Pillow, 1 process | Pillow, {CORES} processes | "
        "ours / Pillow, 1 process |",
        "| --: | --- | --: | --: | --: | --: |",
    ]
    for size, found in record["speeds"].items():
        for name, of in found.items():
            numbers = " | ".join(f"{value:,}" for value in of["views/s"].values())
            ratio = of["ours / Pillow"]
            span = f"{ratio['median']} ({ratio['min']} to {ratio['max']})"
            lines.append(f"| {size} | {name} | {numbers} | {span} |")
    share = record["share of a training step"]
    lines += [
        "",
        f"Augmentation alone over a whole training step of `{share['recipe']}`, {share['views']} "
        f"views: {100 * share['share']:.1f} % ({100 * share['smallest']:.1f} to "
        f"{100 * share['largest']:.1f} %).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--width", type=float, default=1.0, help="of the ResNet that is trained")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--policies", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(abs, range(CORES)))
        found = {
            size: speeds(size, options.policies, options.turns, pool) for size in options.sizes
        }
    sizes = map(str, options.sizes)
    words = ["--turns", str(options.turns), "--width", str(options.width)]
    words += ["--sizes", *sizes, "--policies", *options.policies]
    record = {
        "command": shlex.join(["augment.py", *words]),
        "speeds": found,
        "share of a training step": share_of_step(min(options.turns, 5), options.width),
        **circumstances(),
    }
    (options.out / "augment.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "augment.md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
