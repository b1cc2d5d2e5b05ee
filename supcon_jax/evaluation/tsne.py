"""2-D maps of features."""

import numpy as np
from jaxtyping import Float


def tsne(features: Float[np.ndarray, "images dim"]) -> Float[np.ndarray, "images 2"]:
    """Places of images on a map where images with a high cosine lie close together.

    t-SNE (van der Maaten and Hinton, 2008) of the features at length 1, as scikit-learn computes
    it, with a fixed seed. Distances between groups and the sizes of groups mean little.

    Args:
      features: `[images, dim]`, at least 2 images.

    Returns:
      `[images, 2]`; all zero where all features are the same.

    Raises:
      ValueError: fewer than 2 images.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(features) < 2:
        raise ValueError(f"a map needs at least 2 images; got {len(features)}")
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.where(lengths > 0, lengths, 1)
    if not np.ptp(unit, axis=0).any():  # a dead encoder maps all images to one point
        return np.zeros((len(unit), 2), np.float32)
    perplexity = min(30, (len(unit) - 1) / 3)
    with threadpool_limits(1):  # its threads wait by spinning, for minutes on a busy machine
        return TSNE(random_state=0, init="pca", perplexity=perplexity).fit_transform(unit)
