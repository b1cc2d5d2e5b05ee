"""Picture sheets: what each policy makes of real photographs, for people to look at.

    python experiments/policies/sheets.py [--images FOLDER]

Rows are photographs (four parts of scikit-learn's two, and two of the folder's, which may have any
depth), the first column is the original, the others are seven draws. Writes one PNG for each policy
at 224 and at 32 pixels, and one with each operation of RandAugment at magnitude 10, to --out.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_sample_image

from supcon_jax.data import policies, randaugment

DRAWS, GAP = 7, 4
SUFFIXES = (".jpg", ".jpeg", ".png")
PARTS = (
    ("china.jpg", 60, 40),
    ("china.jpg", 200, 330),
    ("flower.jpg", 20, 0),
    ("flower.jpg", 80, 250),
)
SETTINGS = {
    "crop_flip": dict(name="crop_flip"),
    "sim_augment": dict(name="sim_augment", jitter=1.0, jitter_form="tensorflow", blur=0.5),
    "sim_augment-torchvision": dict(name="sim_augment", jitter=0.5),
    "auto_augment-imagenet": dict(name="auto_augment", table="imagenet"),
    "auto_augment-cifar": dict(name="auto_augment", table="cifar"),
    "rand_augment": dict(name="rand_augment", layers=2, magnitude=10.0),
    "stacked_rand_augment": dict(
        name="stacked_rand_augment", jitter=1.0, jitter_form="tensorflow", blur=0.5
    ),
    "cutout": dict(name="crop_flip", cutout="half"),
}


def photographs(folder: Path | None, side: int) -> np.ndarray:
    """`[n, side, side, 3]` uint8."""
    images = [
        Image.fromarray(load_sample_image(name)[top : top + 224, left : left + 300])
        for name, top, left in PARTS
    ]
    if folder:
        files = [x for x in sorted(folder.rglob("*")) if x.suffix.lower() in SUFFIXES]
        images += [Image.open(file).convert("RGB") for file in (files[0], files[len(files) // 2])]
    return np.stack([np.asarray(ImageOps.fit(image, (side, side))) for image in images])


def views(images: np.ndarray, size: int, **settings) -> np.ndarray:
    """`[n, DRAWS, size, size, 3]` uint8."""
    if settings.get("cutout"):
        settings["cutout"] = size // 2
    policy = policies.make_policy(size=size, **settings)
    repeated = np.repeat(images[:, None], DRAWS, axis=0)
    keys = jax.random.split(jax.random.key(0), len(repeated))
    options = dict(policies=[policy], mean=(0.0,) * 3, std=(1.0,) * 3)
    made = jax.jit(partial(policies.make_views, **options))(keys, {"image": jnp.asarray(repeated)})
    return eight_bit(made[:, 0]).reshape(len(images), DRAWS, size, size, 3)


def eight_bit(images: np.ndarray | jax.Array) -> np.ndarray:
    return np.uint8(np.clip(np.round(np.asarray(images) * 255), 0, 255))


def mixed(images: np.ndarray, size: int, mix: str) -> np.ndarray:
    """Each photograph with the next one, in shares from 0.9 to 0.3."""
    policy = policies.make_policy("crop_flip", size=size)
    columns = []
    for draw in range(DRAWS):
        pairs = np.stack([images, np.roll(images, 1, axis=0)], axis=1)
        batch = {
            "image": jnp.asarray(pairs),
            "share": jnp.full(len(images), 0.9 - 0.1 * draw, jnp.float32),
        }
        keys = jax.random.split(jax.random.key(draw), len(images))
        options = dict(policies=[policy], mean=(0.0,) * 3, std=(1.0,) * 3, mix=mix)
        columns.append(policies.make_views(keys, batch, **options)[:, 0])
    return eight_bit(np.stack(columns, axis=1))


def sheet(originals: np.ndarray, made: np.ndarray, file: Path, cell: int) -> None:
    """A grid: the originals, a gap, the draws; enlarged without smoothing where they are small."""
    rows, columns = len(originals), 1 + made.shape[1]
    size = (columns * (cell + GAP) + GAP, rows * (cell + GAP) - GAP)
    page = Image.new("RGB", size, "white")
    small = made.shape[2] < cell
    method = Image.Resampling.NEAREST if small else Image.Resampling.BILINEAR
    for row in range(rows):
        for column, pixels in enumerate([originals[row], *made[row]]):
            image = Image.fromarray(pixels).resize((cell, cell), method)
            left = column * (cell + GAP) + (2 * GAP if column else 0)
            page.paste(image, (left, row * (cell + GAP)))
    save(page, file)


def save(page: Image.Image, file: Path) -> None:
    page.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)
    print(file.name, file.stat().st_size // 1000, "kB")


def operations(originals: np.ndarray, file: Path, cell: int) -> None:
    """Each operation of RandAugment at magnitude 10 on two photographs, with its name."""
    arguments = randaugment.rand_arguments(10.0)
    names = randaugment.RAND_OPERATIONS
    page = Image.new("RGB", (6 * (cell + GAP), 6 * (cell + 16)), "white")
    draw = ImageDraw.Draw(page)
    centre = jnp.array([cell / 2, cell / 2])
    for place, name in enumerate(names):
        made = randaugment.OPERATIONS[name](arguments.get(name, 0))
        for half, image in enumerate(originals[[0, 2]]):
            pixels = Image.fromarray(image).resize((cell, cell), Image.Resampling.BILINEAR)
            result = randaugment.apply(
                jnp.asarray(np.asarray(pixels)),
                jax.tree.map(jnp.float32, made),
                jnp.float32(1),
                centre,
            )
            x, y = (2 * (place % 3) + half) * (cell + GAP), place // 3 * (cell + 16)
            page.paste(Image.fromarray(np.asarray(result)), (x, y))
            if not half:
                draw.text((x, y + cell + 2), name, "black")
    save(page, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images for two more rows")
    default = Path(__file__).parent / "sheets"
    parser.add_argument("--out", type=Path, default=default, help="folder of the PNGs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for size, source, cell in ((224, 256, 96), (32, 32, 64)):
        originals = photographs(options.images, source)
        for name, settings in SETTINGS.items():
            made = views(originals, size, **settings)
            sheet(originals, made, options.out / f"{name}-{size}.png", cell)
        for mix in ("mixup", "cutmix"):
            made = mixed(originals, size, mix)
            sheet(originals, made, options.out / f"{mix}-{size}.png", cell)
    operations(photographs(None, 256), options.out / "operations.png", 96)


if __name__ == "__main__":
    main()
