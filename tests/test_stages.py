"""The data of a run: what is opened, chosen and kept."""

import numpy as np
import pytest
from PIL import Image

from supcon_jax import config as configuration
from supcon_jax import parallel, stages
from supcon_jax.data import sources

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


@pytest.mark.parametrize("gigabytes", [0.0, 1.0], ids=["streamed", "in memory"])
def test_bad_test_images_stop_a_run_that_skips_others(gigabytes, folder, monkeypatch):
    """Every test image counts once, so none may be missing."""
    monkeypatch.setattr(sources, "BAD_SHARE", 0.1)
    options = dict(on_error="skip", memory_limit_gb=gigabytes)
    (folder / "train/dark/3.png").write_text("not an image")
    assert open_folder(folder, **options).references.size == 11
    (folder / "val/dark/1.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"^cannot decode .*val/dark/1\.png: "):
        brightness(open_folder(folder, **options).test)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer.epsilon": -1.0}, "epsilon must be"),
        ({"schedule.learning_rate": -1.0}, "learning_rate must be"),
        ({"augment.crop_area": (0.5, 0.2)}, "crop_area must be"),
        ({"samples_per_class": 5, "batch_size": 64}, "batch_size=64 must be a multiple of"),
    ],
)
def test_errors_of_what_a_stage_is_built_from_name_the_stage(fields, message):
    config = configuration.load("digits")
    config.update_from_flattened_dict({f"linear.{name}": value for name, value in fields.items()})
    with pytest.raises(ValueError, match=f"^in config.linear: {message}"):
        stages.build_stage(config, "linear", stages.open_data(config), parallel.make_mesh())
