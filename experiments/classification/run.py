"""Accuracy of SupCon, its relatives and cross-entropy at equal passes through the encoder."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from experiments.bases import base, with_fields
from experiments.runner import Claim, main

HERE = Path(__file__).parent
DATA = {
    "smoke": ("digits",),
    "cpu": ("fashion_mnist", "digits"),
    "gpu": ("cifar10", "tiny_imagenet32"),
    "paper": ("imagenet2012",),
}
# Of cross-entropy: the regularisation of today's recipes (Wightman et al., 2021, arXiv:2110.00476).
STRONG = {
    "cross_entropy__augment__name": "rand_augment",
    "cross_entropy__mix": "cutmix",
    "cross_entropy__objective__label_smoothing": 0.1,
}


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Every method on every data set."""
    return {
        f"{name}: {method}": config
        for name in DATA[scale]
        for method, config in methods(scale, data, name).items()
    }


def methods(scale: str, data: Path | None, name: str, chosen: bool = True) -> dict[str, ConfigDict]:
    """SupCon, what it is compared with in the paper, and its siblings.

    At the cpu scale with the learning rates of rates.json, unless `chosen` is False.
    """

    def of(recipe: str, **fields: object) -> ConfigDict:
        paths = {field.replace("__", "."): value for field, value in fields.items()}
        return with_fields(base(scale, recipe, data, name), paths)

    epochs = of("supcon").supcon.epochs
    found = {
        "SupCon": of("supcon"),
        "cross-entropy": of("cross_entropy"),
        "cross-entropy, strong": of("cross_entropy", **STRONG),
        "SimCLR": of("simclr"),
        "cross-entropy, two stages": of("cross_entropy", stages=("cross_entropy", "linear")),
        "L_in": of("supcon", supcon__objective__loss="supcon_in"),
        "SINCERE": of("supcon", supcon__objective__denominator_mode="one_positive"),
        "N-pairs": of(
            "supcon",
            supcon__views=1,
            supcon__epochs=2 * epochs,
            supcon__objective__positives_cap=1,
            supcon__objective__temperature=1.0,
        ),
        "triplet": of("supcon", supcon__objective__loss="triplet"),
        "max-margin": of("cross_entropy", cross_entropy__objective__margin=2),
    }
    if scale == "cpu" and chosen:
        for method, config in found.items():
            config[config.stages[0]].schedule.learning_rate = chosen_rate(name, method)
    return found


def chosen_rate(name: str, method: str) -> float:
    """The learning rate that was best on held-out training images."""
    heldout = json.loads((HERE / "rates.json").read_text())["heldout"][name][method]
    return float(max(heldout, key=heldout.__getitem__))


PAPER = {  # SupCon over the method
    "cross-entropy": "CIFAR-10 96.0 over 95.0, CIFAR-100 76.5 over 75.3, ImageNet 78.7 over 77.6",
    "SimCLR": "CIFAR-10 96.0 over 93.6, CIFAR-100 76.5 over 70.7, ImageNet 78.7 over 70.2",
    "max-margin": "CIFAR-10 96.0 over 92.4, CIFAR-100 76.5 over 70.5, ImageNet 78.7 over 78.0",
    "L_in": "ImageNet 78.7 over 67.4",
    "N-pairs": "ImageNet 78.7 over 57.4",
    "cross-entropy, two stages": "ImageNet 78.7 over 73.7",
    "cross-entropy, strong": "not in the paper; CutMix, by others: ImageNet 78.7 over 78.6",
}
CLAIMS = [
    Claim(
        f"SupCon is more accurate than {method} ({name})",
        numbers,
        f"{name}: SupCon/top1",
        f"{name}: {method}/top1",
    )
    for name in ("digits", "fashion_mnist", "cifar10", "tiny_imagenet32", "imagenet2012")
    for method, numbers in PAPER.items()
]

if __name__ == "__main__":
    main(settings, CLAIMS)
