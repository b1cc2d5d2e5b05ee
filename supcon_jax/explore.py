"""One page to look through what a finished run makes of its test images.

    python -m supcon_jax.explore --workdir D
    python -m supcon_jax.explore --workdir D --images 500 --out page.html

Writes D/explore.html: the 2-D map of the test embeddings with thumbnails, the nearest neighbours of
an image, the confusion matrix, the hardest images. It opens without a server or a network.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from supcon_jax import command
from supcon_jax.evaluation.page import HARDEST, Predicted, Shown, page, thumbnail
from supcon_jax.evaluation.tsne import tsne
from supcon_jax.suites import Subject, open_subject
from supcon_jax.terminal import shown
from supcon_jax.trained import open_run
from supcon_jax.workdir import write_whole

IMAGES = 2000


def explore(subject: Subject, images: int = IMAGES) -> str:
    """The page of a run.

    Args:
      subject: of `suites.open_subject`.
      images: test images on the map, drawn with a fixed seed; all where there are not so many.

    Returns:
      HTML that loads nothing from elsewhere.

    Raises:
      FileNotFoundError: the data set is not there.
      ValueError: fewer than 2 images wanted, other classes than in training, damaged files.
    """
    if images < 2:
        raise ValueError(f"a map needs at least 2 images; --images={images} was asked for")
    test = subject.test
    chosen = np.sort(np.random.RandomState(0).permutation(len(test.labels))[:images])
    probabilities = np.asarray(jax.nn.softmax(subject.logits(test)))
    names = tuple(map(shown, subject.class_names))
    predicted = Predicted(test.labels, probabilities, names)
    features = test.features[chosen]
    on_map = Shown(chosen, tsne(features), _thumbnails(subject, chosen), features)
    facts = (
        f"{len(chosen):,} of {len(test.labels):,} test images of {subject.data.test.name}. "
        f"Features: {subject.name}. Classifier: {subject.classifier}. "
        f"Configuration {subject.run.config_hash}."
    )
    hardest = _thumbnails(subject, predicted.hardest(HARDEST))
    title = shown(subject.run.workdir.resolve().name)
    return page(title, shown(facts), predicted, on_map, hardest)


def _thumbnails(subject: Subject, places: np.ndarray) -> list[str]:
    """Of test images, read a hundred at a time."""
    parts = np.array_split(places, -(-len(places) // 100))
    return [thumbnail(image) for part in parts for image in subject.data.test.load(part)[0]]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = command.parser("explore", __doc__)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, help="an .html file (explore.html in the workdir)")
    parser.add_argument("--images", type=int, default=IMAGES, help="test images on the map")
    parser.add_argument("--features", default="encoder", help="encoder, or projection")
    parser.add_argument("--data_dir", help="where the data set is now")
    options = parser.parse_args(arguments)
    out = options.out or Path(options.workdir, "explore.html")
    moved = command.data_remedy("--data_dir tells where it is now")
    with command.running(options.debug), moved:
        if out.suffix != ".html":
            raise ValueError(f"{out}: expected an .html file, which a browser opens")
        run = open_run(options.workdir)
        command.check_file(out)
        text = explore(open_subject(run, options.features, None, options.data_dir), options.images)
        write_whole(out, text)
        print(f"{out}: {len(text) / 1e6:.1f} MB, opens in any browser")


if __name__ == "__main__":
    main()
