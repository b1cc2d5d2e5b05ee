"""The images of a file of features that are nearest to a given one.

    python -m supcon_jax.embed --workdir D --images PATH --out features.npz
    python -m supcon_jax.search --query IMAGE --index features.npz --count 5

Prints the cosine and the path of each, nearest first.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from supcon_jax import command
from supcon_jax.embed import Features, read_features
from supcon_jax.inference import Picture, load_encoder
from supcon_jax.trained import open_run


def nearest(
    query: Picture, index: Features, *, count: int = 10, workdir: str | Path | None = None
) -> list[tuple[float, str]]:
    """Cosines and paths of the images nearest to a query, the nearest first.

    Args:
      query: an image, see `inference.Encoder`.
      index: of `embed.embed_images` or `embed.read_features`.
      count: how many, if there are so many.
      workdir: of the run that the index was made with, if it is not where it was then.

    Returns:
      `[(cosine, path)]`.

    Raises:
      FileNotFoundError: the run or the query is not there.
      ValueError: it is another run, the query cannot be decoded, or fewer than 1 image is wanted.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1; got {count}")
    workdir, of = workdir or index.of["workdir"], index.of
    if not Path(workdir).is_dir():
        raise FileNotFoundError(
            f"the run that made the features is not in {workdir}: say where it is by --workdir"
        )
    run = open_run(workdir)
    if (run.config_hash, run.steps) != (of["config_hash"], of["steps"]):
        raise ValueError(
            f"the features are not of the run in {workdir} ({of['config_hash']} instead of "
            f"{run.config_hash}, steps {of['steps']} and {run.steps}): embed the images again"
        )
    encoder = load_encoder(workdir, layer=of["layer"], normalised=of["normalised"])
    image = encoder.preprocess(query)[None]
    features = _unit(np.asarray(encoder.apply_fn(encoder.variables, jax.numpy.asarray(image))))
    if index.rows.shape[1:] != features.shape[1:]:
        raise ValueError(
            f"expected features of {features.shape[1]} dimensions, as the run in {workdir} has "
            f"them; the index has {index.rows.shape[1]}: embed the images again"
        )
    cosines = _unit(index.rows) @ features[0]
    best = np.argsort(-cosines, kind="stable")[:count]
    return [(float(cosines[i]), index.paths[i]) for i in best]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("search", __doc__)
    parser.add_argument("--query", required=True, help="an image")
    parser.add_argument("--index", required=True, help="a file of supcon_jax.embed")
    parser.add_argument("--workdir", help="folder of the run (where it was for the index)")
    parser.add_argument("--count", type=int, default=10, help="images shown")
    options = parser.parse_args(arguments)
    with command.running(options.debug):
        index = read_features(options.index)
        found = nearest(options.query, index, count=options.count, workdir=options.workdir)
        for cosine, path in found:
            print(f"{cosine:6.3f}  {path}")


if __name__ == "__main__":
    main()
