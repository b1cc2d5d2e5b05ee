"""What the embedding looks like: class separation, alignment, uniformity, neural collapse, maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.bases import RECIPES
from experiments.classification.run import DATA, methods
from experiments.embedding.geometry import class_separation, neural_collapse
from experiments.runner import Claim, main
from supcon_jax import parallel
from supcon_jax.evaluation.embed import Embedded
from supcon_jax.losses import alignment, uniformity
from supcon_jax.report import draw_maps
from supcon_jax.suites import Subject
from supcon_jax.trained import open_run

METHODS = (*RECIPES, "L_in", "SimCLR")
NAMES = ("NC1", "NC2 norms", "NC2 angles")


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """The recipe of each loss, with its own learning rate."""
    found = methods(scale, data, DATA[scale][0])
    return {name: found[name] for name in METHODS}


def embedding_geometry(
    workdir: Path, config: ConfigDict, results: Mapping[str, Any]
) -> Mapping[str, float]:
    """Measures of the encoder's features at length 1, of test images and of training images."""
    del config
    subject = Subject(open_run(workdir), parallel.make_mesh(), layer="encoder", normalised=True)
    of = {"test": measures(subject.test), "train": measures(subject.train)}
    return {
        "knn": 100 * results["test"]["knn"],
        **{f"{split} {key}": value for split in of for key, value in of[split].items()},
    }


def measures(embedded: Embedded) -> dict[str, float]:
    """Of the features of a split."""
    features, labels = embedded.features, embedded.labels
    separation = class_separation(features, labels)
    rows = jnp.asarray(features)
    return {
        "distance within classes": separation.within,
        "distance between classes": separation.between,
        "separation": separation.ratio,
        "alignment": float(alignment(rows, jnp.asarray(labels)).mean()),
        "uniformity": float(uniformity(rows, block_size="auto")),
        **dict(zip(NAMES, neural_collapse(features, labels), strict=True)),
    }


def draw(record: dict[str, Any], file: Path) -> None:
    """Maps (t-SNE) of the test features of seed 0, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    titles = []
    for name in METHODS:
        separation = record["quantities"][f"{name}/test separation"]["values"][0]
        titles.append(f"{name}: separation {separation:.2f}")
    draw_maps([record["workdirs"][name][0] for name in METHODS], file, titles)


NOT_IN_PAPER = "not in the paper"
CLAIMS = [
    *(
        Claim(
            f"the classes of test images are better separated by SupCon than by {name}",
            NOT_IN_PAPER,
            "SupCon/test separation",
            f"{name}/test separation",
        )
        for name in ("cross-entropy", "SimCLR", "L_in")
    ),
    Claim(
        "SimCLR spreads test images more evenly over the sphere than SupCon (uniformity)",
        NOT_IN_PAPER,
        "SupCon/test uniformity",
        "SimCLR/test uniformity",
    ),
    *(
        Claim(
            f"SupCon collapses training images more than cross-entropy, nearer to 0 ({measure})",
            NOT_IN_PAPER,
            f"cross-entropy/train {measure}",
            f"SupCon/train {measure}",
        )
        for measure in NAMES
    ),
]

if __name__ == "__main__":
    main(settings, CLAIMS, measure=embedding_geometry, draw=draw)
