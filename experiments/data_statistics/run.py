"""Channel means and standard deviations of training images, as the trainer loads them.

    python experiments/data_statistics/run.py digits fashion_mnist=TFDS_DIR \
        tiny_imagenet32=DIR imagenette=DIR cifar10:folder=DIR

Each argument is a name of `supcon_jax.data.datasets`, with the folder of its images or TFDS's
`data_dir` after "="; ":folder" reads a folder in place of TFDS. Pixels are in [0, 1] and sums are
exact (whole numbers). "mean_of_image_stds" is the mean of the images' own standard deviations,
which is what some published numbers are. Writes results.json beside this file.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from supcon_jax.data.datasets import dataset
from supcon_jax.data.sources import Source, open_source
from supcon_jax.report import circumstances

HERE = Path(__file__).parent
CHUNK = 1000  # images


def opened(argument: str) -> tuple[str, Source]:
    """ "NAME[:SOURCE][=DIR]" -> name and training images."""
    label, _, directory = argument.partition("=")
    name, _, source = label.partition(":")
    data = dataset(name)
    return label, open_source(
        source or data["source"],
        data["train_split"],
        name=data["name"],
        directory=directory,
        load_size=data["load_size"],
        channels=data["channels"],
        memory_limit_gb=0.0,
    )


def statistics(source: Source) -> dict:
    """Mean and standard deviation of each channel over all pixels of all images."""
    sums, squares, image_stds = np.zeros((3, source.image_shape[-1]))
    for start in range(0, source.size, CHUNK):
        images, _ = source.load(np.arange(start, min(start + CHUNK, source.size)))
        pixels = images.astype(np.int64)
        sums += pixels.sum((0, 1, 2))
        squares += (pixels**2).sum((0, 1, 2))
        image_stds += images.std((1, 2), dtype=np.float64).sum(0)
    count = source.size * source.image_shape[0] * source.image_shape[1]
    mean = sums / count
    return {
        "images": source.size,
        "classes": len(source.class_names),
        "shape": source.image_shape,
        "mean": rounded(mean),
        "std": rounded(np.sqrt(squares / count - mean**2)),
        "mean_of_image_stds": rounded(image_stds / source.size),
    }


def rounded(values: np.ndarray) -> list[float]:
    """On [0, 1] pixels, to four places."""
    return [round(float(value) / 255, 4) for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+", metavar="NAME[:SOURCE][=DIR]")
    arguments = parser.parse_args().datasets
    table = {}
    for argument in arguments:
        name, source = opened(argument)
        table[name] = statistics(source)
        print(name, table[name], flush=True)
    named = [a.partition("=")[0] + "=DIR" * ("=" in a) for a in arguments]
    command = f"python experiments/data_statistics/run.py {' '.join(named)}"
    record = {"command": command, "table": table, **circumstances()}
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
