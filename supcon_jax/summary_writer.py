"""TensorBoard event files for CLU without TensorFlow.

`clu.metric_writers` imports TensorFlow for one class, its `SummaryWriter`. Where TensorFlow is
absent this module takes that class's place; everything else of CLU then works unchanged:

    from supcon_jax import summary_writer

    summary_writer.install_without_tensorflow()
    from clu import metric_writers

The class is made when CLU asks for it, because its base lives in the very package whose import
fails until the place is taken. `summary_writer.SummaryWriter` is the class, after the above.
"""

import functools
import importlib.util
import io
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.histogram import metadata as histogram_metadata
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb
    from tensorboard.plugins.image import metadata as image_metadata
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto
except ImportError as error:
    raise ImportError(
        "writing TensorBoard event files needs the package tensorboard: pip install tensorboard"
    ) from error

_PLACE_IN_CLU = "clu.metric_writers.summary_writer"
_DEFAULT_BUCKETS = 30
_LOGGER = logging.getLogger(__name__)


def install_without_tensorflow() -> bool:
    """Takes the place of CLU's `SummaryWriter` if TensorFlow cannot be imported.

    Must run before the first import of `clu.metric_writers`. Where TensorFlow is installed it
    does nothing, and CLU writes with TensorFlow.

    Returns:
      Whether this module stands at CLU's place.
    """
    if _has_tensorflow():
        return False
    this = sys.modules[__name__]
    return sys.modules.setdefault(_PLACE_IN_CLU, this) is this


def _has_tensorflow() -> bool:
    spec = importlib.util.find_spec("tensorflow")
    # A folder that an uninstall left behind is found too, as a namespace package: no origin.
    return spec is not None and spec.origin is not None


def __getattr__(name: str) -> Any:
    if name != "SummaryWriter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clu.metric_writers import interface

    return _class_on(interface.MetricWriter)


@functools.cache
def _class_on(base: type) -> type:
    # Cached: the import above asks for the class itself when it is the first one of CLU.
    about = {"__doc__": _EventFile.__doc__, "__module__": __name__}
    return type("SummaryWriter", (_EventFile, base), about)


class _EventFile:
    """A CLU `MetricWriter` of TensorBoard event files, by the `tensorboard` package alone."""

    def __init__(self, logdir: str):
        """Opens a new event file.

        Args:
          logdir: folder that TensorBoard is pointed at; made if missing.
        """
        self._file = EventFileWriter(logdir)

    def _add(self, step: int, summary: Summary) -> None:
        self._file.add_event(Event(wall_time=time.time(), step=int(step), summary=summary))

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Writes arrays as they are.

        Args:
          step: training step.
          values: tag to array of any shape.
          metadata: tag to `SummaryMetadata`, as a message or its bytes; says which TensorBoard
            plugin shows the array.
        """
        for tag, value in values.items():
            about = (metadata or {}).get(tag)
            if isinstance(about, bytes):
                about = SummaryMetadata.FromString(about)
            self._add(step, _tensor(tag, np.asarray(value), about))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes numbers; TensorBoard stores them as float32.

        Args:
          step: training step.
          scalars: tag to number or array of one element, of any real dtype.
        """
        for tag, value in scalars.items():
            self._add(step, scalar_pb(tag, np.asarray(value).item()))

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes images as PNG.

        Args:
          step: training step.
          images: tag to `[n, h, w, c]` or `[h, w, c]`, c 1 (grey), 3 (RGB) or 4 (RGBA), uint8 or
            float in [0, 1].

        Raises:
          ValueError: if the images have another shape or dtype.
        """
        for tag, value in images.items():
            batch = _as_uint8_batch(tag, np.asarray(value))
            height, width = batch.shape[1:3]
            strings = [str(width).encode(), str(height).encode(), *map(_png, batch)]
            about = image_metadata.create_summary_metadata(None, None)
            self._add(step, _tensor(tag, np.array(strings, object), about))

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Ignores the videos, and says so the first time."""
        _warn_ignored("videos")

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """Ignores the sounds, and says so the first time."""
        _warn_ignored("audios")

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes texts, which TensorBoard shows as Markdown.

        Args:
          step: training step.
          texts: tag to text.
        """
        for tag, value in texts.items():
            self._add(step, text_pb(tag, value))

    def write_histograms(
        self,
        step: int,
        arrays: Mapping[str, Any],
        num_buckets: Mapping[str, int | None] | None = None,
    ) -> None:
        """Writes the distribution of the elements that are finite.

        Args:
          step: training step.
          arrays: tag to array of any shape.
          num_buckets: tag to number of buckets of equal width; 30 where not given.
        """
        for tag, value in arrays.items():
            buckets = (num_buckets or {}).get(tag) or _DEFAULT_BUCKETS
            about = histogram_metadata.create_summary_metadata(None, None)
            self._add(step, _tensor(tag, _histogram(np.asarray(value), buckets), about))

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyper-parameters of the run; once a run.

        Args:
          hparams: nested mapping, for example a `ConfigDict`; names are joined with dots, and
            a value that is no number, bool or string is written as its text.
        """
        from clu.internal.utils import flatten_dict

        plain = (bool, int, float, str, np.generic)
        flat = {k: v if isinstance(v, plain) else str(v) for k, v in flatten_dict(hparams)}
        self._add(0, hparams_pb(flat))

    def flush(self) -> None:
        """Returns when everything written so far is on disk."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()


def _tensor(tag: str, value: np.ndarray, about: SummaryMetadata | None) -> Summary:
    tensor = make_tensor_proto(value)
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=about)])


def _as_uint8_batch(tag: str, images: np.ndarray) -> np.ndarray:
    """`[h, w, c]` or `[n, h, w, c]`, uint8 or float -> `[n, h, w, c]` uint8."""
    batch = images[None] if images.ndim == 3 else images
    is_float = jnp.issubdtype(batch.dtype, jnp.floating)
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image {tag!r}: expected [n, h, w, 1, 3 or 4], got {images.shape}")
    if batch.dtype != np.uint8 and not is_float:
        raise ValueError(f"image {tag!r}: expected uint8 or float in [0, 1], got {images.dtype}")
    if is_float:
        batch = np.rint(255 * np.clip(batch.astype(np.float32), 0, 1)).astype(np.uint8)
    return batch


def _png(image: np.ndarray) -> bytes:
    """`[h, w, c]` uint8 -> PNG file."""
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()


def _histogram(values: np.ndarray, buckets: int) -> np.ndarray:
    """Array -> `[buckets, 3]`: left edge, right edge, count. Zeros if nothing is finite."""
    # np.histogram refuses float64 values too close together to divide: float32 never are.
    values = values.ravel().astype(np.float32).astype(np.float64)
    counts, edges = np.histogram(values[np.isfinite(values)], bins=buckets)
    return np.stack([edges[:-1], edges[1:], counts], axis=1)


@functools.cache
def _warn_ignored(kind: str) -> None:
    _LOGGER.warning("%s are not written to TensorBoard event files without TensorFlow", kind)
