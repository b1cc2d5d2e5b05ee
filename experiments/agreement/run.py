"""Our losses beside those of others, on the same inputs: where they agree, and why not.

    pip install torch pytorch-metric-learning
    git clone https://github.com/HobbitLong/SupContrast CLONES/SupContrast
    git clone https://github.com/tufts-ml/SupContrast CLONES/SINCERE
    python experiments/agreement/run.py --clones CLONES

Packages and cloned files are run as they are; what cannot be run here (TensorFlow 1, a package that
needs CUDA) is restated as its formula in float64, and marked so. Writes results.json and README.md
beside this file.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

from supcon_jax import (
    epsilon_sup_infonce_loss,
    nt_xent_loss,
    num_positives,
    supcon_in_loss,
    supcon_loss,
)
from supcon_jax.report import circumstances

TEMPERATURE = 0.1
HERE = Path(__file__).parent
Row = tuple[str, str, float, float, str]  # peer, ours, their value, our value, why


def inputs(views: int, labels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Normalised features [batch, views, 16] in float64, and labels."""
    z = np.random.default_rng(0).normal(size=(len(labels), views, 16))
    return z / np.linalg.norm(z, axis=-1, keepdims=True), np.array(labels)


TWO_VIEWS = inputs(2, [0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
ONE_VIEW = inputs(1, [0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
LONELY = inputs(1, [0, 0, 0, 0, 1, 1, 1, 2, 3, 4])  # three samples without a positive


def rows(z: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """One row a view."""
    return torch.from_numpy(z.reshape(-1, z.shape[-1])), torch.from_numpy(y.repeat(z.shape[1]))


def mean(losses: jax.Array, count: int | None = None) -> float:
    return float(losses.sum() / (len(losses) if count is None else count))


def packages() -> Iterator[Row]:
    z, y = TWO_VIEWS
    ours = mean(supcon_loss(z, y, temperature=TEMPERATURE))
    flat, labels = rows(z, y)
    theirs = SupConLoss(temperature=TEMPERATURE)(flat, labels).item()
    name = "pytorch-metric-learning `SupConLoss`"
    yield name, "`supcon_loss`", theirs, ours, "the same"
    z, y = LONELY
    alone = supcon_loss(z, y, temperature=TEMPERATURE)
    theirs = SupConLoss(temperature=TEMPERATURE)(*rows(z, y)).item()
    yield (
        f"{name}, 3 of 10 samples without a positive",
        "`supcon_loss`, mean over the 7 others",
        theirs,
        mean(alone, 7),
        "the same; a plain `.mean()` here is over all 10, with 0 for the three",
    )
    z, y = TWO_VIEWS
    losses = supcon_loss(z, y, temperature=TEMPERATURE, denominator_mode="one_positive")
    ours, positives = mean(losses), num_positives(z, y)
    over_pairs = float((losses * positives).sum() / positives.sum())
    by_pair = NTXentLoss(temperature=TEMPERATURE)(flat, labels).item()
    yield (
        "pytorch-metric-learning `NTXentLoss` with labels",
        '`supcon_loss(denominator_mode="one_positive")`',
        by_pair,
        ours,
        "each pair against the negatives and itself, as here; but the mean is over pairs, so that "
        f"large classes weigh more: ours weighted so is {over_pairs:.6f}",
    )
    theirs = float(
        optax.losses.ntxent(jnp.asarray(flat.numpy()), jnp.asarray(labels.numpy()), TEMPERATURE)
    )
    yield (
        "optax `ntxent` with labels",
        '`supcon_loss(denominator_mode="one_positive")`',
        theirs,
        ours,
        "the mean over pairs, as the one above",
    )
    distinct = np.arange(len(z))
    theirs = float(optax.losses.ntxent(z.reshape(-1, 16), distinct.repeat(2), TEMPERATURE))
    ours = mean(nt_xent_loss(z, temperature=TEMPERATURE))
    yield "optax `ntxent`, a label a sample", "`nt_xent_loss`", theirs, ours, "the same"


def supcontrast(module: ModuleType) -> Iterator[Row]:
    """The authors' PyTorch code."""
    name = "HobbitLong/SupContrast `SupConLoss`"
    z, y = TWO_VIEWS
    ours = mean(supcon_loss(z, y, temperature=TEMPERATURE))
    features, labels = torch.from_numpy(z), torch.from_numpy(y)
    plain = module.SupConLoss(TEMPERATURE, base_temperature=TEMPERATURE)
    theirs = plain(features, labels).item()
    why = "the same, to the 1e-9 that some of its versions add under the logarithm"
    yield f"{name}, base_temperature = temperature", "`supcon_loss`", theirs, ours, why
    theirs = module.SupConLoss(TEMPERATURE)(features, labels).item()
    yield name, "`supcon_loss`", theirs, ours, "it multiplies by temperature / 0.07 = 1.43"
    one = module.SupConLoss(TEMPERATURE, "one", TEMPERATURE)(features, labels).item()
    ours = mean(supcon_loss(z, y, temperature=TEMPERATURE, contrast_mode="one"))
    yield f"{name}, contrast_mode one", '`supcon_loss(contrast_mode="one")`', one, ours, why
    z, y = LONELY
    theirs = plain(torch.from_numpy(z), torch.from_numpy(y)).item()
    ours = mean(supcon_loss(z, y, temperature=TEMPERATURE), 7)
    why = (
        "0/0 for a sample without positives, in versions before December 2023; since then such "
        "samples count as 0 in the mean"
    )
    lonely = f"{name}, 3 of 10 samples without a positive"
    yield lonely, "`supcon_loss`, mean over the 7 others", theirs, ours, why
    z, y = TWO_VIEWS
    z32, long = (5 * z).astype(np.float32), torch.from_numpy(y)
    theirs = plain(torch.from_numpy(z32), long).item()
    ours = mean(supcon_loss(jnp.asarray(z32), jnp.asarray(y), temperature=TEMPERATURE))
    why = (
        "its shift is the product of each anchor with itself, beside which all others vanish in "
        "float32; ours is the largest product that is used"
    )
    yield f"{name}, features of length 5, float32", "`supcon_loss`", theirs, ours, why


def sincere(module: ModuleType) -> Iterator[Row]:
    z, y = TWO_VIEWS
    flat, labels = rows(z, y)
    one = supcon_loss(z, y, temperature=TEMPERATURE, denominator_mode="one_positive")
    negatives = supcon_loss(z, y, temperature=TEMPERATURE, denominator_mode="only_negatives")
    margin = epsilon_sup_infonce_loss(z, y, temperature=TEMPERATURE, epsilon=0.25)
    for their, our, value in (
        ("SINCERELoss", '`supcon_loss(denominator_mode="one_positive")`', one),
        ("DCLLoss", '`supcon_loss(denominator_mode="only_negatives")`', negatives),
        ("EpsSupInfoNCELoss", "`epsilon_sup_infonce_loss`", margin),
    ):
        theirs = getattr(module, their)(TEMPERATURE)(flat.clone(), labels).item()
        yield f"tufts-ml/SupContrast `{their}`", our, theirs, mean(value), "the same"


def restated() -> Iterator[Row]:
    z, y = TWO_VIEWS
    flat, labels = (x.numpy() for x in rows(z, y))
    exponentials = np.exp(flat @ flat.T / TEMPERATURE)
    np.fill_diagonal(exponentials, 0)
    positive = labels[:, None] == labels
    pulled = (exponentials * positive).sum(1)
    theirs = -np.log(pulled / exponentials.sum(1)).mean()
    ours = supcon_in_loss(z, y, temperature=TEMPERATURE)
    counts = positive.sum(1) - 1
    why = (
        "Eq. 3 without the division by the number of positives: less by the mean of its logarithm, "
        f"{np.log(counts).mean():.6f}, with the gradient of `supcon_in_loss`"
    )
    name = "solo-learn `simclr_loss_func` with labels (its SupCon), restated"
    yield name, "`supcon_in_loss`", float(theirs), mean(ours), why
    ours = supcon_loss(z, y, temperature=TEMPERATURE)
    yield (
        "google-research `contrastive_loss`, restated",
        "`supcon_loss`",
        TEMPERATURE * mean(ours),
        mean(ours),
        "it multiplies by the temperature (scale_by_temperature)",
    )
    z, y = ONE_VIEW
    ours = supcon_loss(z, y, temperature=TEMPERATURE)
    others = (y[:, None] == y).sum(1) - 1
    yield (
        "google-research `contrastive_loss`, one view, restated",
        "`supcon_loss`",
        TEMPERATURE * float((ours / others).mean()),
        mean(ours),
        "with one view it divides by the number of positives twice",
    )


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CLONES: dict[str, Callable[[ModuleType], Iterator[Row]]] = {
    "SupContrast/losses.py": supcontrast,
    "SINCERE/revised_losses.py": sincere,
}


def table(found: list[Row]) -> str:
    lines = [
        "| theirs | ours | their value | our value | why |",
        "| --- | --- | ---: | ---: | --- |",
    ]
    for peer, ours, their_value, our_value, why in found:
        lines += [f"| {peer} | {ours} | {their_value:.6f} | {our_value:.6f} | {why} |"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our losses beside those of others.")
    parser.add_argument("--clones", type=Path, help="folder of the cloned repositories")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    found = list(packages())
    for file, compare in CLONES.items():
        if options.clones is None or not (options.clones / file).exists():
            print(f"left out, not cloned: {file}", file=sys.stderr)
            continue
        found += compare(load(options.clones / file))
    found += restated()
    record: dict[str, Any] = {
        "command": "run.py --clones CLONES",
        "rows": [[None if cell != cell else cell for cell in row] for row in found],
        "peers": {
            name: importlib.metadata.version(name)
            for name in ("torch", "pytorch-metric-learning", "optax")
        },
        **circumstances(),
    }
    (HERE / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    text = (HERE / "README.md").read_text()
    start, end = "<!-- table -->", "<!-- end -->"
    before, after = text.split(start)[0], text.split(end)[1]
    (HERE / "README.md").write_text(f"{before}{start}\n{table(found)}\n{end}{after}")
    print(table(found))


if __name__ == "__main__":
    main()
