"""The data of a run: what is opened, chosen and kept."""

import numpy as np
import pytest
from PIL import Image

from supcon_jax import config as configuration
from supcon_jax import stages

SIDE = 8
IMAGE_GB = SIDE * SIDE * 3 / 1e9


@pytest.fixture
def folder(tmp_path):
    """Twelve images in `train`, four in `val`, of two classes; each is as bright as no other."""
    for split, images in (("train", 6), ("val", 2)):
        for name, of_class in (("dark", 0), ("light", 100)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(images):
                image = Image.new("RGB", (SIDE, SIDE), (of_class + i,) * 3)
                image.save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def open_folder(folder, **fields):
    config = configuration.load("imagenette")
    config.data.update(dir=str(folder), load_size=SIDE, image_size=SIDE, holdout=0.0, **fields)
    return stages.open_data(config)


def brightness(source):
    images, labels = source.load(np.arange(source.size))
    assert (images == images[:, :1, :1, :1]).all()
    np.testing.assert_array_equal(labels, images[:, 0, 0, 0] >= 100)
    return set(images[:, 0, 0, 0].tolist())


def test_only_the_chosen_images_are_decoded_and_kept(folder):
    """Memory for four: enough for two of each class, whatever the others are and become."""
    chosen = brightness(open_folder(folder, per_class=2).train)
    assert len(chosen) == 4 and len({i for i in chosen if i < 100}) == 2
    for file in (folder / "train").rglob("*.png"):
        if int(file.stem) + 100 * (file.parent.name == "light") not in chosen:
            file.write_bytes(b"damaged")
    data = open_folder(folder, per_class=2, memory_limit_gb=4 * IMAGE_GB)
    assert data.train.read is None and data.test.read is None and data.references.read is None
    assert brightness(data.train) == chosen


@pytest.mark.parametrize("source", ["digits", "folder"])
def test_nothing_may_be_held_out(source, folder):
    if source == "folder":
        data = open_folder(folder)
    else:
        config = configuration.load("digits")
        config.data.holdout = 0.0
        data = stages.open_data(config)
    assert data.heldout.size == 0
    images, labels = data.heldout.load(np.arange(0))
    assert images.shape == (0, *data.train.image_shape) and labels.shape == (0,)


def test_what_needs_more_memory_is_streamed(folder):
    data = open_folder(folder, memory_limit_gb=4 * IMAGE_GB)
    assert data.train.read is not None and data.test.read is None
