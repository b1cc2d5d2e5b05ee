"""Features and outputs of a whole split, every image once."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from supcon_jax.data.pipeline import evaluation_batches, prefetch
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.knn import knn_predict
from supcon_jax.parallel import gather, local_places, shard
from supcon_jax.state import TrainState


class Embedded(NamedTuple):
    """Of every image of a split, in its order."""

    features: Float[np.ndarray, "images dim"]  # of the encoder, not normalised
    outputs: Float[np.ndarray, "images outputs"]  # of the head
    labels: Int[np.ndarray, " images"]


def embed(
    eval_step: Callable,
    state: TrainState,
    source: Source,
    *,
    batch_size: int,
    mesh: Mesh,
    show: Callable[[int], None] = lambda images: None,
) -> Embedded:
    """Run the evaluation step over a split; the last batch is padded and the padding dropped.

    Args:
      eval_step: `(state, batch) -> {"features", "outputs"}`, from `parallel.data_parallel_eval`.
      state: whose parameters are used.
      source: the split.
      batch_size: images at a time; rounded up to a multiple of the number of devices.
      mesh: of the evaluation step.
      show: is told how many images are done, after each batch.

    Returns:
      Features, outputs and labels of all `source.size` images.

    Raises:
      FloatingPointError: features that are not finite, on which every score would be arbitrary.
    """
    size = -(-batch_size // mesh.size) * mesh.size
    parts, places = [], local_places(size, mesh)
    for batch, count in prefetch(evaluation_batches(source, size, places)):
        of_devices = shard(batch, mesh)
        label = of_devices.pop("label")
        result = eval_step(state, of_devices)
        rows = gather((result["features"], result["outputs"], label))
        parts.append([column[:count] for column in rows])
        show(sum(len(part[0]) for part in parts))
    found = Embedded(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    bad = int((~np.isfinite(found.features)).any(-1).sum())
    if bad:
        raise FloatingPointError(
            f"the features of {bad} of the {source.size} images of {source.name} are not finite: "
            "training diverged. Use a lower learning rate or a longer warm-up, in a new workdir"
        )
    return found


def knn_accuracy(
    queries: Embedded, references: Embedded, *, neighbours: int, temperature: float
) -> float:
    """Share of the queries whose nearest references vote for their label; see `knn_predict`."""
    predicted = knn_predict(
        queries.features,
        references.features,
        references.labels,
        neighbours=neighbours,
        temperature=temperature,
    )
    return float((predicted == queries.labels).mean())


def top_k_accuracy(embedded: Embedded, k: int) -> float:
    """Share of the images whose label is among the k largest logits (1.0 if there are not more)."""
    best = np.argsort(-embedded.outputs, axis=-1, kind="stable")[:, :k]
    return float((best == embedded.labels[:, None]).any(-1).mean())
