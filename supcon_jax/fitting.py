"""The fields that a recipe leaves open (0 or empty), chosen from the images of its folder."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from supcon_jax.config import STAGES
from supcon_jax.data.datasets import IMAGENET
from supcon_jax.data.folders import Found, duplicates, images_by_class, look
from supcon_jax.data.selection import stratified_share

NOTHING = Found("train", "test", dict.fromkeys(map(str, range(1000)), 1281), 256, *IMAGENET)
STEPS = 3000  # of pre-training, about
BATCH, LARGEST = 256, 1024
LEAST = 8  # images: of fewer, a fifth for the test is a single one


def fit_to_images(config: ConfigDict) -> list[str]:
    """Set the open fields of a recipe for image folders, in place.

    Open are, where they are 0 or empty, `data.train_split`, `test_split`, `load_size`,
    `image_size`, `channels`, `mean` and `std`, `model.stem`, and of each stage that runs
    `batch_size`, `epochs`, and the `learning_rate`, which is in proportion to the batch.

    Args:
      config: a recipe; nothing is done unless its source is a folder and a field is open.

    Returns:
      Lines of at most 80 columns, but for long paths, that say what was chosen and why, and what
      is odd about the images. Without a folder the choice is for ImageNet, as a plan needs it, and
      nothing is said.

    Raises:
      FileNotFoundError: no folder, or no class folders in it.
      ValueError: no image that can be decoded, too few images or a single class.
    """
    if config.data.source != "folder" or not _open(config):
        return []
    data = config.data
    found = look(data.dir, data.train_split, data.test_split) if data.dir else NOTHING
    _check_enough(found, data.dir)
    lines = [*_fit_data(config, found), *_fit_size(config, found), *_fit_stages(config, found)]
    if not data.dir:
        return []
    return [part for line in [*lines, *_oddities(config, found)] for part in _wrapped(line)]


def _check_enough(found: Found, directory: str) -> None:
    """Refuse images on which a training would tell nothing."""
    where, images = Path(directory) / found.train_split, sum(found.counts.values())
    if len(found.counts) == 1:
        raise ValueError(
            f"{where} has images of one class only ({next(iter(found.counts))}), which every "
            "answer gets right: sort them into at least two class folders"
        )
    if images < LEAST:
        raise ValueError(f"{where} has {images} images; add some, at least {LEAST} are needed")


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(
        line, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )


def _open(config: ConfigDict) -> bool:
    stages = [config[name] for name in config.stages]
    given = [stage.batch_size and stage.epochs for stage in stages]
    return not all((config.data.train_split, config.data.image_size, config.data.mean, *given))


def _set(part: ConfigDict, field: str, value: object) -> bool:
    """Set a field that is open; says whether it was."""
    if part[field]:
        return False
    part[field] = value
    return True


def _fit_data(config: ConfigDict, found: Found) -> Iterator[str]:
    data = config.data
    _set(data, "train_split", found.train_split)
    _set(data, "test_split", found.test_split)
    images = f"{sum(found.counts.values()):,} images of {len(found.counts)} classes"
    if data.test_split == data.train_split:
        yield f"{images}, and no test images: {data.test_share:.0%} of them are kept for it"
    else:
        yield f"{images} in {data.train_split!r}; tested on {data.test_split!r}"
    if _set(data, "channels", len(found.mean)):
        yield f"channels={data.channels}: " + ("RGB" if data.channels == 3 else "all are grey")
    if len(found.mean) == data.channels:
        mean, std = found.mean, found.std
    else:
        mean, std = (found.mean[0],) * data.channels, (found.std[0],) * data.channels
    _set(data, "mean", mean)
    _set(data, "std", std)


def _fit_size(config: ConfigDict, found: Found) -> Iterator[str]:
    data, side = config.data, found.side
    size = side if side <= 40 else 64 if side < 112 else 128
    if not data.image_size and data.load_size:
        size = min(size, data.load_size)
    if _set(data, "image_size", size):
        yield f"image_size={data.image_size}: the short side of most images is about {side} pixels"
    _set(data, "load_size", data.image_size * 5 // 4 if data.image_size > 64 else data.image_size)
    if _set(config.model, "stem", "cifar" if data.image_size <= 64 else "imagenet"):
        yield f"stem={config.model.stem}: for images of {data.image_size} pixels"


def _fit_stages(config: ConfigDict, found: Found) -> Iterator[str]:
    images, classes = _training_images(config, found), len(found.counts)
    for name in STAGES:
        lines = list(_fit_stage(config[name], REFERENCE_RATES[name], images, classes))
        if name in config.stages:
            yield from (f"{name}: {line}" for line in lines)


def _fit_stage(stage: ConfigDict, rate: float, images: int, classes: int) -> Iterator[str]:
    wanted = max(BATCH, min(2 * classes, LARGEST))
    if _set(stage, "batch_size", _power_of_two(min(wanted, max(images // 4, 8), images))):
        few = images // 4 < wanted
        why = f"{images:,} training images" if few else f"{classes} classes"
        yield f"batch_size={stage.batch_size}, for {why}"
    if _set(stage, "epochs", _epochs(stage, images)):
        steps = round(stage.epochs * (images // stage.batch_size))
        yield f"epochs={stage.epochs:g}, which are {steps:,} steps"
    stage.warmup_epochs = min(stage.warmup_epochs, stage.epochs / 10)
    if _set(stage.schedule, "learning_rate", rate * stage.batch_size / BATCH):
        yield f"learning_rate={stage.schedule.learning_rate:.4g}, in proportion to the batch"


REFERENCE_RATES = {  # for a batch of 256
    "supcon": 0.5,
    "simclr": 0.5,
    "linear": 1.0,
    "cross_entropy": 0.1,
    "finetune": 0.01,
}


def _epochs(stage: ConfigDict, images: int) -> float:
    """So that there are about so many steps, within limits; twice as many with one view."""
    most = 300.0 if not stage.frozen else 100.0
    epochs = min(most, max(20.0, round(STEPS * stage.batch_size / images)))
    return epochs * (2 if stage.views == 1 and not stage.frozen else 1)


def _training_images(config: ConfigDict, found: Found) -> int:
    """Those that are left when test images and held-out ones are taken away."""
    images = sum(found.counts.values())
    if config.data.test_split == config.data.train_split:
        images -= round(config.data.test_share * images)
    return images - round(config.data.holdout * images)


def _power_of_two(number: int) -> int:
    """The largest one that is not above a number."""
    return 1 << (max(number, 1).bit_length() - 1)


def _oddities(config: ConfigDict, found: Found) -> Iterator[str]:
    alone = [name for name, count in found.counts.items() if count == 1]
    if alone:
        yield f"warning: classes with a single image: {_some(alone)}"
    by_count = sorted(found.counts, key=found.counts.__getitem__)
    smallest, largest = by_count[0], by_count[-1]
    if found.counts[largest] > 10 * found.counts[smallest]:
        yield (
            f"warning: {largest!r} has {found.counts[largest]:,} images, {smallest!r} "
            f"{found.counts[smallest]:,}: look at the accuracy of each class, and try "
            f"--config.{config.stages[0]}.samples_per_class"
        )
    training, test = _split_files(config)
    if pairs := duplicates(training, test):
        yield (
            f"warning: {len(pairs)} of {len(test)} test images are training images too, which "
            f"makes the accuracy too high: remove the copies, such as {pairs[0][1]} "
            f"({pairs[0][0]})"
        )


def _split_files(config: ConfigDict) -> tuple[list[Path], list[Path]]:
    """Files of the training images, held-out ones included, and of the test images."""
    data, root = config.data, Path(config.data.dir).expanduser()
    by_class = list(images_by_class(root / data.train_split).values())
    files = [file for of_class in by_class for file in of_class]
    if data.test_split != data.train_split:
        test = images_by_class(root / data.test_split).values()
        return files, [file for of_class in test for file in of_class]
    labels = np.repeat(np.arange(len(by_class)), [len(of_class) for of_class in by_class])
    held = stratified_share(labels, data.test_share)  # as stages.open_data splits it
    return (
        [file for file, is_test in zip(files, held, strict=True) if not is_test],
        [file for file, is_test in zip(files, held, strict=True) if is_test],
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
