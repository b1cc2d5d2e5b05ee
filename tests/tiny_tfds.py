"""A small real TFDS data set in array_record format, made in a second without TensorFlow."""

import io
import os
from collections.abc import Iterator
from typing import Any

NAME = "tiny_digits"


def prepare_digits(data_dir: str | os.PathLike[str], n_train: int, n_test: int) -> str:
    """Writes scikit-learn's digits as `data_dir/tiny_digits/1.0.0`.

    Training images are the first `n_train` of `load_digits`, test images the next `n_test`, with
    values 0 to 240 in steps of 15. TFDS shuffles what it writes.

    Args:
      data_dir: TFDS's root folder.
      n_train: number of training images.
      n_test: number of test images.

    Returns:
      The name of the data set, "tiny_digits". It is not registered, so that it is read with
      `tfds.builder_from_directory(f"{data_dir}/tiny_digits/1.0.0").as_data_source("train")` or
      `tfds.data_source(name, split="train", data_dir=data_dir)`.
    """
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    builder = _builder_class(tfds)(data_dir=data_dir, n_train=n_train, n_test=n_test)
    builder.download_and_prepare(
        file_format="array_record",
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
    return NAME


def _builder_class(tfds: Any) -> type:
    class TinyDigits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, n_train: int, n_test: int, **kwargs: Any):
            self._ranges = {"train": (0, n_train), "test": (n_train, n_train + n_test)}
            super().__init__(**kwargs)

        def _info(self) -> Any:
            features = {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(*ends) for split, ends in self._ranges.items()}

        def _generate_examples(self, start: int, stop: int) -> Iterator[Any]:
            from sklearn.datasets import load_digits

            digits = load_digits()
            for i in range(start, stop):
                yield i, {"image": _png(digits.images[i]), "label": int(digits.target[i])}

    return TinyDigits


def _png(image: Any) -> io.BytesIO:
    """Float `[8, 8]` of whole numbers up to 16 -> PNG file with values up to 240."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((image * 15).astype("uint8")).save(file, "PNG")
    file.seek(0)
    return file
