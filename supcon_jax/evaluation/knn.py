"""Weighted k-nearest-neighbour classification of embeddings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from supcon_jax.evaluation.class_means import check_references
from supcon_jax.losses import l2_normalize

BLOCK = 65536  # references at a time


def knn_predict(
    features: Float[np.ndarray, "queries dim"],
    references: Float[np.ndarray, "references dim"],
    labels: Int[np.ndarray, " references"],
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> Int[np.ndarray, " queries"]:
    """The class with the most weight exp(cosine / temperature) among the nearest references.

    Exact. Of references with equal cosines the first are nearer, of classes with equal weight the
    smallest id wins, both as float32 has them.

    Args:
      features: `[queries, dim]`; normalised here, as are the references.
      references: `[references, dim]`.
      labels: `[references]` class ids.
      neighbours: k; at most the number of references are used.
      temperature: of the weights.
      chunk: queries at a time. The memory is bounded: chunk x 65,536 similarities, as many
        references, and chunk x classes votes.

    Returns:
      `[queries]` predicted class ids.

    Raises:
      ValueError: no references, sizes that do not match, or no neighbours.

    References:
      Wu et al., 2018, https://arxiv.org/abs/1805.01978, section 3.4.
    """
    check_references(features, references, labels)
    if neighbours < 1 or temperature <= 0:
        raise ValueError(
            "neighbours must be at least 1 and temperature above 0; got "
            f"{neighbours} and {temperature}"
        )
    k = min(neighbours, len(labels))
    padded = np.pad(features, ((0, -len(features) % chunk), (0, 0)))
    queries = [padded[start : start + chunk] for start in range(0, len(padded), chunk)]
    found = [(np.full((chunk, k), -np.inf, np.float32), np.zeros((chunk, k), np.int32))] * len(
        queries
    )
    for start in range(0, len(references), BLOCK):
        block = l2_normalize(jnp.asarray(references[start : start + BLOCK]))
        found = [
            jax.device_get(_nearer(*so_far, rows, block, start))
            for so_far, rows in zip(found, queries, strict=True)
        ]
    vote = partial(_vote, classes=int(labels.max()) + 1, temperature=temperature)
    votes = [np.asarray(vote(cosines, labels[places])) for cosines, places in found]
    return np.concatenate(votes)[: len(features)]


@jax.jit
def _nearer(
    cosines: Array, places: Array, queries: Array, references: Array, start: Array
) -> tuple[Array, Array]:
    """The k nearest of those found so far and of a block of references, the nearest first."""
    of_block = jnp.matmul(l2_normalize(queries), references.T, precision="highest")
    k = cosines.shape[1]
    best, where = jax.lax.top_k(of_block, min(k, len(references)))
    places = jnp.concatenate([places, where + start], 1)
    cosines, where = jax.lax.top_k(jnp.concatenate([cosines, best], 1), k)
    return cosines, jnp.take_along_axis(places, where, 1)


@partial(jax.jit, static_argnames=("classes", "temperature"))
def _vote(cosines: Array, labels: Array, *, classes: int, temperature: float) -> Array:
    """One neighbour after the other, so that the sums do not depend on the device's order."""
    rows = jnp.arange(len(cosines))
    weights = jnp.exp((cosines - cosines[:, :1]) / temperature)

    def add(votes: Array, of_all: tuple[Array, Array]) -> tuple[Array, None]:
        label, weight = of_all
        return votes.at[rows, label].add(weight), None

    votes, _ = jax.lax.scan(add, jnp.zeros((len(rows), classes)), (labels.T, weights.T))
    return votes.argmax(-1)
