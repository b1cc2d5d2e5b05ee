"""Weighted k-nearest-neighbour classification of embeddings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from supcon_jax.losses import l2_normalize


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

    Args:
      features: `[queries, dim]`; normalised here, as are the references.
      references: `[references, dim]`.
      labels: `[references]` class ids.
      neighbours: k; at most the number of references are used.
      temperature: of the weights.
      chunk: queries at a time, which bounds the memory to chunk x references similarities.

    Returns:
      `[queries]` predicted class ids.

    References:
      Wu et al., 2018, https://arxiv.org/abs/1805.01978, section 3.4.
    """
    vote = partial(
        _vote,
        classes=int(labels.max()) + 1,
        k=min(neighbours, len(labels)),
        temperature=temperature,
    )
    against = l2_normalize(jnp.asarray(references))
    padded = np.pad(features, ((0, -len(features) % chunk), (0, 0)))
    votes = [
        np.asarray(vote(padded[start : start + chunk], against, labels))
        for start in range(0, len(padded), chunk)
    ]
    return np.concatenate(votes)[: len(features)]


@partial(jax.jit, static_argnames=("classes", "k", "temperature"))
def _vote(
    queries: Array, references: Array, labels: Array, *, classes: int, k: int, temperature: float
) -> Array:
    cosines = jnp.matmul(l2_normalize(queries), references.T, precision="highest")
    nearest, places = jax.lax.top_k(cosines, k)
    weights = jnp.exp((nearest - nearest[:, :1]) / temperature)
    votes = weights[..., None] * jax.nn.one_hot(labels[places], classes)
    return votes.sum(1).argmax(-1)
