"""The fields of `config.data` for known data sets: `config.data.update(dataset("cifar10"))`.

Channel means and deviations are of the training images, on [0, 1] pixels:

- CIFAR-10, CIFAR-100: as https://github.com/HobbitLong/SupContrast has them, so that its recipes
  are the same here. CIFAR-10's deviations are the mean of the images' own; over all pixels (of a
  JPEG copy) they are 0.245, 0.243 and 0.261: experiments/data_statistics.
- SVHN: https://github.com/PatrickZH/DeepCore, deepcore/datasets/svhn.py.
- STL-10, the labelled training images: https://github.com/loeweX/Greedy_InfoMax,
  GreedyInfoMax/vision/data/get_dataloader.py.
- ImageNet: https://docs.pytorch.org/vision/stable/models.html.
- The others from the images: experiments/data_statistics.
"""

from typing import Any

Channels = tuple[float, ...]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _fields(
    source: str,
    name: str,
    size: int,
    mean: Channels,
    std: Channels,
    *,
    load_size: int = 0,
    test_split: str = "test",
) -> dict[str, Any]:
    return dict(
        source=source,
        name=name,
        train_split="train",
        test_split=test_split,
        load_size=load_size or size,
        image_size=size,
        channels=len(mean),
        mean=mean,
        std=std,
    )


DATASETS: dict[str, dict[str, Any]] = {
    "digits": _fields("digits", "", 8, (0.305,), (0.376,)),
    "fashion_mnist": _fields("tfds", "fashion_mnist", 28, (0.286,), (0.353,)),
    "cifar10": _fields("tfds", "cifar10", 32, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": _fields("tfds", "cifar100", 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "svhn": _fields("tfds", "svhn_cropped", 32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "stl10": _fields("tfds", "stl10", 96, (0.4469, 0.4400, 0.4069), (0.2603, 0.2566, 0.2713)),
    "tiny_imagenet32": _fields(
        "folder", "", 32, (0.4806, 0.4486, 0.3983), (0.2521, 0.2448, 0.2590), test_split="val"
    ),
    "imagenette": _fields(
        "folder",
        "",
        224,
        (0.4636, 0.4603, 0.4325),
        (0.2788, 0.2758, 0.2985),
        load_size=256,
        test_split="val",
    ),
    "imagenet": _fields(
        "tfds", "imagenet2012", 224, *IMAGENET, load_size=256, test_split="validation"
    ),
}

COUNTS = {  # training images and classes, by the name in TFDS, where a plan needs no images
    "digits": (1437, 10),
    "fashion_mnist": (60_000, 10),
    "cifar10": (50_000, 10),
    "cifar100": (50_000, 100),
    "svhn_cropped": (73_257, 10),
    "stl10": (5000, 10),
    "imagenet2012": (1_281_167, 1000),
}


def dataset(name: str) -> dict[str, Any]:
    """The fields of `config.data` for a data set, all but the folder where it is.

    Args:
      name: one of `DATASETS`. "digits" is inside scikit-learn; "tiny_imagenet32" and
        "imagenette" are folders DIR/SPLIT/CLASS/IMAGE; the others are TFDS's.

    Returns:
      source, name, train_split, test_split, load_size, image_size, channels, mean and std.

    Raises:
      ValueError: unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(DATASETS)}")
    return dict(DATASETS[name])
