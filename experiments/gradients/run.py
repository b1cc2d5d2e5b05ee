"""Hard and easy positives and negatives: their shares of the gradient during training.

SupCon and L_in are trained as in the experiment classification. At each checkpoint that was kept
(and at the start), the same augmented training images go through the network as in training, and
the terms of the gradient (closed_form.py) are added up for the pairs with the smallest and largest
cosines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.bases import EPOCHS, with_fields
from experiments.classification.run import DATA, methods
from experiments.gradients.closed_form import (
    Pairs,
    differences,
    gradient,
    pairs_of,
    sizes,
    thinned,
    unit,
)
from experiments.runner import Claim, main
from supcon_jax import parallel
from supcon_jax.data import policies
from supcon_jax.losses import l2_normalize
from supcon_jax.objectives import LOSSES
from supcon_jax.stages import Data, build_model, build_stage, create, open_data
from supcon_jax.state import TrainState, merge
from supcon_jax.trained import load_stage, open_run

STAGE = "supcon"
IMAGES = 512  # that the gradient is taken of, in batches of the recipe's size
SHARES = (0.25, 0.5, 1.0)  # of an anchor's negatives or positives that are left
CURVES = [f"{end} {kind}" for end in ("hardest", "easiest") for kind in ("positives", "negatives")]
EDGES = np.linspace(-1, 1, 21)  # of the bins of the cosine
AGREEMENT = "digits that agree with jax.grad"
METHODS = ("SupCon", "L_in")
EVERY = {"smoke": 1.0, "cpu": EPOCHS / 6}  # epochs between checkpoints; else as in the recipe


def settings(scale: str, data: Path | None) -> dict[str, ConfigDict]:
    """Both losses, each with its own learning rate, with all checkpoints kept."""
    keep: dict[str, float] = {"checkpoint.keep": 1000}
    if scale in EVERY:
        keep["checkpoint.every_epochs"] = EVERY[scale]
    found = methods(scale, data, DATA[scale][0])
    return {name: with_fields(found[name], keep) for name in METHODS}


def gradient_terms(
    workdir: Path, config: ConfigDict, results: dict[str, Any]
) -> Mapping[str, float]:
    """Shares of the gradient in per cent, by epoch and their mean over the epochs after the start.

    The means by cosine go to `gradient_terms.npz` in the workdir.
    """
    del results
    data, mesh = open_data(config), parallel.make_mesh()
    steps_per_epoch = data.train.size // config[STAGE].batch_size
    options = dict(
        temperature=config[STAGE].objective.temperature,
        inside=config[STAGE].objective.loss == "supcon_in",
    )
    project = projections_of(config, data)
    by_epoch, bins = {}, []
    for state in states(workdir, config, data, mesh):
        batches = [(w, pairs_of(labels)) for w, labels in project(state)]
        epoch = int(state.step) / steps_per_epoch
        by_epoch[epoch] = mean([measured(*batch, **options) for batch in batches])
        by_epoch[epoch][AGREEMENT] = agreement(*next(project(state)), **options)
        bins += [by_cosine(*batch, **options) for batch in batches if epoch > 0]
    np.savez(workdir / "gradient_terms.npz", bins=np.mean(bins, axis=0))
    overall = mean([found for epoch, found in by_epoch.items() if epoch > 0])
    curves = {
        f"{key} at epoch {epoch:.4g}": found[key]
        for epoch, found in by_epoch.items()
        for key in CURVES
    }
    return overall | curves | {AGREEMENT: min(found[AGREEMENT] for found in by_epoch.values())}


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric."""
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def states(workdir: Path, config: ConfigDict, data: Data, mesh: Mesh) -> Iterator[TrainState]:
    """The state that the stage started from, and those that were kept, in their order."""
    yield create(build_stage(config, STAGE, data, mesh), config, mesh, previous=None)
    run = open_run(workdir)
    kept = (workdir / "checkpoints" / STAGE / "last").iterdir()
    for step in sorted(int(folder.name) for folder in kept if folder.name.isdigit()):
        at = replace(run, steps={STAGE: step}, checksums={})  # they are known of the last state
        yield load_stage(at, STAGE, mesh).state


def projections_of(
    config: ConfigDict, data: Data
) -> Callable[[TrainState], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """`state -> batches (w, labels of the views)` of fixed views, with batch norm as in training.

    w are the projections before they are normalised, float64, with all views under one another.
    """
    stage = config[STAGE]
    alone = with_fields(config.copy_and_resolve_references(), {"model.batch_norm": "local"})
    model = build_model(alone, STAGE, classes=len(data.train.class_names))
    policy = policies.make_policy(size=config.data.image_size, **stage.augment)
    pixels = {"mean": tuple(config.data.mean), "std": tuple(config.data.std)}
    size = min(stage.batch_size, IMAGES)
    chosen = np.random.RandomState(0).permutation(data.train.size)[:IMAGES]
    layer = f"Dense_{len(stage.head.layers) - 1}"

    @jax.jit
    def project(variables: Any, images: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), len(images))
        views = policies.make_views(
            keys, {"image": images}, policies=[policy] * stage.views, **pixels
        )
        _, found = model.apply(
            variables,
            views.reshape(-1, *views.shape[2:]),
            train=True,
            capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
            mutable=["intermediates", "batch_stats"],
        )
        return found["intermediates"]["head"][layer]["__call__"][0]

    def batches(state: TrainState) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        parts = {"params": merge(state.params, state.frozen), "batch_stats": state.batch_stats}
        variables = jax.device_get(parts)
        for start in range(0, len(chosen) - size + 1, size):
            images, labels = data.train.load(np.sort(chosen[start : start + size]))
            w = project(variables, images[:, None])
            yield np.asarray(w, np.float64), np.repeat(labels, stage.views)

    return batches


def measured(w: np.ndarray, pairs: Pairs, **options: Any) -> dict[str, float]:
    """The shares and pulls of one batch, in per cent."""
    return shares(w, pairs, **options) | pulls(w, pairs, **options)


def shares(w: np.ndarray, pairs: Pairs, **options: Any) -> dict[str, float]:
    """What the hardest and easiest quarters of the pairs have of the summed lengths of terms."""
    z = unit(w)
    kinds = (("positives", pairs.positive, 1), ("negatives", pairs.negative, -1))
    return {
        f"{end} {kind}{form}": share
        for kind, mask, sign in kinds
        for form, terms in forms(w, pairs, **options).items()
        for end, share in quarters(sign * (z @ z.T)[mask], terms[mask]).items()
    }


def forms(w: np.ndarray, pairs: Pairs, **options: Any) -> dict[str, np.ndarray]:
    """Lengths of the terms, and those that a loss without normalisation has at the same z."""
    plain = sizes(unit(w), pairs, **options, normalised=False)
    # the factor alone is compared if each anchor keeps its 1 / |w|
    lengths = np.linalg.norm(w, axis=1, keepdims=True)
    return {"": sizes(w, pairs, **options), ", not normalised": plain / lengths}


def quarters(hardness: np.ndarray, terms: np.ndarray) -> dict[str, float]:
    """Shares, in per cent, of the first and last quarter of the pairs in order of `hardness`."""
    ordered = terms[np.argsort(hardness, kind="stable")]
    count = len(ordered) // 4
    parts = {"hardest": ordered[:count], "easiest": ordered[-count:]}
    return {end: float(100 * part.sum() / ordered.sum()) for end, part in parts.items()}


def pulls(w: np.ndarray, pairs: Pairs, **options: Any) -> dict[str, float]:
    """|P_ip - X_ip| in per cent, the mean over the anchors, p their hardest positives.

    With a random share of each anchor's negatives, and of its positives, p always among them.
    """
    z = unit(w)
    rows = np.arange(len(w))
    hardest = np.where(pairs.positive, z @ z.T, np.inf).argmin(1)
    order = np.random.RandomState(0).random_sample(pairs.positive.shape)
    order[rows, hardest] = -1
    found = {}
    for share in SHARES:
        for kind in ("negative", "positive"):
            mask = thinned(getattr(pairs, kind), share, order)
            pull = np.abs(differences(z, pairs._replace(**{kind: mask}), **options))[rows, hardest]
            found[pull_name(share, kind)] = 100 * float(pull.mean())
    return found


def pull_name(share: float, kind: str) -> str:
    return f"pull with {100 * share:g} % of the {kind}s"


def by_cosine(w: np.ndarray, pairs: Pairs, **options: Any) -> np.ndarray:
    """Sums in each bin of the cosine, `[positives and negatives, sums, bins]`.

    The sums are those of `forms`, then the numbers of pairs.
    """
    z = unit(w)
    places = np.clip(np.digitize(z @ z.T, EDGES) - 1, 0, len(EDGES) - 2)
    added = [*forms(w, pairs, **options).values(), np.ones(places.shape)]
    count = partial(np.bincount, minlength=len(EDGES) - 1)
    return np.array([[count(places[m], weights=form[m]) for form in added] for m in pairs])


def agreement(w: np.ndarray, labels: np.ndarray, *, temperature: float, inside: bool) -> float:
    """To how many decimal digits the closed form is jax.grad of the loss, in float64."""
    loss = LOSSES["supcon_in" if inside else "supcon"]

    def total(w: jax.Array) -> jax.Array:
        return loss(l2_normalize(w), jnp.asarray(labels), temperature=temperature).sum()

    with jax.enable_x64(True):
        expected = np.asarray(jax.grad(total)(jnp.asarray(w)))
    options = dict(temperature=temperature, inside=inside, as_contrast=True)
    error = np.abs(gradient(w, pairs_of(labels), **options) - expected).max()
    return float(-np.log10(max(error / np.abs(expected).max(), 1e-16)))


def draw(record: dict[str, Any], file: Path) -> None:
    """Positives above, negatives below: shares against the epoch, and terms against the cosine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    for row, kind in enumerate(("positives", "negatives")):
        for place, name in enumerate(METHODS):
            color = f"C{place}"
            for end, style in (("hardest", "-"), ("easiest", "--")):
                epochs, means, sds = _by_epoch(record, f"{name}/{end} {kind}")
                label = f"{name}, {end} quarter"
                line = dict(marker=".", capsize=2, color=color, label=label)
                axes[row, 0].errorbar(epochs, means, sds, linestyle=style, **line)
            runs = [np.load(w / "gradient_terms.npz")["bins"] for w in record["workdirs"][name]]
            terms, plain, numbers = np.mean(runs, axis=0)[row]
            some = numbers > 0
            centres = ((EDGES[1:] + EDGES[:-1]) / 2)[some]
            for sums, style, label in ((terms, "-", name), (plain, ":", f"{name}, not normalised")):
                relative = sums[some] / numbers[some] / (sums.sum() / numbers.sum())
                axes[row, 1].plot(
                    centres, relative, style, marker=".", ms=4, color=color, label=label
                )
        axes[row, 0].set(xlabel="epoch", ylabel=f"share of the {kind}' terms, %")
        axes[row, 1].set(xlabel="cosine", ylabel=f"mean term of {kind}, relative")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    for axis in axes[0]:
        above = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axis.legend(frameon=False, fontsize=8, **above)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _by_epoch(record: dict[str, Any], start: str) -> tuple[tuple[float, ...], ...]:
    """Epochs, means and standard deviations of a quantity."""
    found = {
        float(name.removeprefix(f"{start} at epoch ")): spread
        for name, spread in record["quantities"].items()
        if name.startswith(f"{start} at epoch ") and spread["mean"] is not None
    }
    return tuple(zip(*((e, s["mean"], s["sd"]) for e, s in sorted(found.items())), strict=True))


DERIVED = "derived for the two ends (Eqs. 19 to 22), not measured"
CLAIMS = [
    *(
        Claim(
            f"hard {kind} contribute more to the gradient than easy ones ({name})",
            DERIVED,
            f"{name}/hardest {kind}",
            f"{name}/easiest {kind}",
        )
        for name in METHODS
        for kind in ("positives", "negatives")
    ),
    *(
        Claim(
            f"the hardest {kind} have a larger share with the normalisation than without (SupCon)",
            'the effect "exists only" with it; not measured',
            f"SupCon/hardest {kind}",
            f"SupCon/hardest {kind}, not normalised",
        )
        for kind in ("positives", "negatives")
    ),
    *(
        Claim(
            f"a hard positive contributes more with more {kind}s ({name})",
            f"derived (Eq. {equation}), not measured",
            f"{name}/{pull_name(1.0, kind)}",
            f"{name}/{pull_name(0.25, kind)}",
        )
        for name, kind, equation in (
            ("L_in", "negative", 23),
            ("SupCon", "negative", 24),
            ("SupCon", "positive", 24),
        )
    ),
]

if __name__ == "__main__":
    main(settings, CLAIMS, measure=gradient_terms, draw=draw, apart=True)
