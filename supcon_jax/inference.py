"""A finished run in use: features and classes of images that it has not seen.

apply_fn, variables, preprocess = load_encoder("runs/digits-supcon")
features = apply_fn(variables, preprocess("image.png")[None])
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, PyTree, UInt8
from PIL import Image

from supcon_jax.data.decode import DecodeError, fit, middle_square, usable_cores
from supcon_jax.data.folders import images_in
from supcon_jax.data.pipeline import prefetch
from supcon_jax.losses import l2_normalize
from supcon_jax.parallel import AXIS, make_mesh
from supcon_jax.trained import Run, load_stage, open_run

Picture = str | Path | bytes | Image.Image | UInt8[np.ndarray, "height width channels"]
Pixels = Float[np.ndarray, "height width channels"]
Network = Callable[[PyTree, Any], jax.Array]


class Encoder(NamedTuple):
    """What turns images into features.

    Attributes:
      apply_fn: `(variables, images [n, size, size, channels]) -> features [n, dim]` float32,
        compiled for each n.
      variables: "params" and "batch_stats".
      preprocess: an image (a path, the bytes of a file, Pillow's, or an array `[height, width,
        channels]` uint8) to `[size, size, channels]` float32, as in the evaluation of the run.
    """

    apply_fn: Network
    variables: PyTree
    preprocess: Callable[[Picture], Pixels]


class Classifier(NamedTuple):
    """What turns images into probabilities; as `Encoder`, with the names of the classes.

    Attributes:
      apply_fn: `(variables, images) -> probabilities [n, classes]` float32.
      variables: "params" and "batch_stats".
      preprocess: see `Encoder`.
      class_names: of the probabilities.
    """

    apply_fn: Network
    variables: PyTree
    preprocess: Callable[[Picture], Pixels]
    class_names: tuple[str, ...]


def load_encoder(
    workdir: str | Path, *, layer: str = "encoder", normalised: bool | None = None
) -> Encoder:
    """The encoder of a finished run, on all devices.

    Args:
      workdir: of the run.
      layer: "encoder", or "projection": the output of the contrastive head, of length 1.
      normalised: features of length 1; by default as the run's heads got them.

    Returns:
      Its function, its variables and its preprocessing.

    Raises:
      FileNotFoundError: no finished run there.
      ValueError: damaged files, or a run without this layer.
    """
    run = open_run(workdir)
    stage = run.stage_of(layer)
    if normalised is None:
        normalised = run.normalises(layer)
    trained = load_stage(run, stage, make_mesh())

    @jax.jit
    def apply_fn(variables: PyTree, images: jax.Array) -> jax.Array:
        applied: Any = trained.model.apply(variables, images, train=False)
        features, outputs = applied
        found = (outputs if layer == "projection" else features).astype(jnp.float32)
        return l2_normalize(found) if normalised else found

    return Encoder(apply_fn, trained.variables, _preprocess_of(run))


def load_classifier(workdir: str | Path) -> Classifier:
    """The classifier of a finished run, on all devices.

    Args:
      workdir: of the run.

    Returns:
      Its function, its variables, its preprocessing and the names of the classes.

    Raises:
      FileNotFoundError: no finished run there.
      ValueError: damaged files, or a run whose last stage is no classifier.
    """
    run = open_run(workdir)
    stage = run.config.stages[-1]
    if run.config[stage].head.name != "classifier":
        raise ValueError(
            f"{workdir} has no classifier: its last stage is {stage}; train one with the stages "
            f"{(*run.config.stages, 'linear')}"
        )
    trained = load_stage(run, stage, make_mesh())

    @jax.jit
    def apply_fn(variables: PyTree, images: jax.Array) -> jax.Array:
        applied: Any = trained.model.apply(variables, images, train=False)
        return jax.nn.softmax(applied[1])

    return Classifier(apply_fn, trained.variables, _preprocess_of(run), run.class_names)


def _preprocess_of(run: Run) -> Callable[[Picture], Pixels]:
    data = run.config.data
    return partial(
        preprocess,
        load_size=data.load_size,
        size=data.image_size,
        channels=data.channels,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )


def preprocess(
    image: Picture,
    *,
    load_size: int,
    size: int,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Pixels:
    """An image as the evaluation gives it to the encoder.

    Args:
      image: a path, the bytes of a file, Pillow's image, or an array.
      load_size: the short side is scaled to this, and the middle square cut out.
      size: of the middle of that, in pixels.
      channels: 1 (grey) or 3 (RGB).
      mean: of each channel, on [0, 1] pixels; subtracted.
      std: of each channel; divided by.

    Returns:
      `[size, size, channels]` float32.

    Raises:
      DecodeError: not an image that can be decoded.
      FileNotFoundError: there is no such file.
    """
    options = {"size": load_size, "channels": channels}
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if isinstance(image, Image.Image):
        square = fit(image, **options)
    else:
        where = "the image" if isinstance(image, bytes) else str(image)
        source = image if isinstance(image, bytes) else _file(Path(image))
        square = middle_square(where, source, **options)
    edge = (load_size - size) // 2
    middle = square[edge : edge + size, edge : edge + size]
    scaled = middle / np.float32(255) - np.array(mean, np.float32)
    return scaled / np.array(std, np.float32)


def _file(image: Path) -> Path:
    if not image.is_file():
        what = "a folder, not an image" if image.is_dir() else "there is no such file"
        raise FileNotFoundError(f"{image}: {what}")
    return image


def find_images(places: Sequence[str | Path]) -> list[Path]:
    """The files named, and those with an image's extension in the folders named, in order.

    Raises:
      FileNotFoundError: a place that is not there, or no image in any of them.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place}: there is no such file or folder")
        found += images_in(place) if place.is_dir() else [place]
    if not found:
        raise FileNotFoundError(f"no images in {', '.join(map(str, places))}")
    return found


def apply_to_files(
    network: Encoder | Classifier,
    files: Sequence[Path],
    *,
    batch_size: int = 64,
    unreadable: Callable[[str], None],
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """What a network makes of image files, in their order, decoded while it computes.

    Args:
      network: of `load_encoder` or `load_classifier`.
      files: images.
      batch_size: images at a time; rounded up to a multiple of the number of devices.
      unreadable: is told of each file that cannot be decoded, which is left out.

    Yields:
      Files and their rows, a batch at a time.

    Raises:
      ValueError: a batch of less than one image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}")
    mesh = make_mesh()
    size = -(-batch_size // mesh.size) * mesh.size
    split = NamedSharding(mesh, PartitionSpec(AXIS))

    def attempt(file: Path) -> Pixels | str:
        try:
            return network.preprocess(file)
        except (DecodeError, OSError) as error:
            return str(error)

    def batches(pool: ThreadPoolExecutor) -> Iterator[tuple[list[Path], list[Pixels | str]]]:
        for start in range(0, len(files), size):
            part = list(files[start : start + size])
            yield part, list(pool.map(attempt, part))

    with ThreadPoolExecutor(usable_cores()) as pool:
        for part, decoded in prefetch(batches(pool)):
            good = [(file, image) for file, image in zip(part, decoded, strict=True)
                    if not isinstance(image, str)]  # fmt: skip
            for image in decoded:
                if isinstance(image, str):
                    unreadable(image)
            if good:
                images = np.stack([image for _, image in good])
                padded = np.concatenate([images, np.repeat(images[:1], size - len(images), 0)])
                rows = network.apply_fn(network.variables, jax.device_put(padded, split))
                yield [file for file, _ in good], np.asarray(rows)[: len(good)]
