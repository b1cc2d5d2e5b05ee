"""What is chosen from the images of a folder, and what is said about them."""

import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from supcon_jax import config as configuration
from supcon_jax import stages, train
from supcon_jax.data.folders import duplicates, look
from supcon_jax.fitting import fit_to_images
from supcon_jax.trained import open_run
from supcon_jax.validation import validate

CHINA, FLOWER = load_sample_image("china.jpg"), load_sample_image("flower.jpg")


@pytest.fixture
def make(tmp_path):
    """Folders of parts of two photographs: `make({"train/cat": 10}, size=40, grey=False)`."""

    def write(counts, size=40, grey=False):
        for place, (where, count) in enumerate(counts.items()):
            (tmp_path / where).mkdir(parents=True)
            whole = CHINA if place % 2 else FLOWER
            for i in range(count):
                top, left = divmod(37 * (100 * place + i), 200)
                part = Image.fromarray(whole[top % 300 :, left:]).crop((0, 0, size + 8, size))
                part.convert("L" if grey else "RGB").save(tmp_path / where / f"{i}.png")
        return tmp_path

    return write


def fitted(folder, recipe="supcon", **fields):
    config = configuration.load(f"folder:{recipe}")
    config.data.dir = str(folder)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    lines = fit_to_images(config)
    validate(config)
    return config, "\n".join(lines)


def test_splits_are_found_by_their_names(make):
    root = make({"training/a": 6, "training/b": 6, "val/a": 2, "val/b": 2, "other/a": 1})
    config, said = fitted(root)
    assert (config.data.train_split, config.data.test_split) == ("training", "val")
    assert "12 images of 2 classes in 'training'; tested on 'val'" in said


def test_without_a_test_split_a_part_is_kept_for_it(make):
    root = make({"a": 40, "b": 20})
    config, said = fitted(root, data__holdout=0.0)
    assert "60 images of 2 classes, and no test images: 20% of them are kept for it" in said
    data = stages.open_data(config)
    assert data.train.class_names == ("a", "b") and (data.train.size, data.test.size) == (48, 12)
    np.testing.assert_array_equal(np.bincount(data.test.labels()), [8, 4])
    images = [source.load(np.arange(source.size))[0] for source in (data.train, data.test)]
    together = np.concatenate(images).reshape(60, -1)
    assert len(np.unique(together, axis=0)) == 60  # none is in both
    again = stages.open_data(config)
    np.testing.assert_array_equal(again.test.load(np.arange(12))[0], images[1])


@pytest.mark.parametrize(
    ("side", "size", "loaded", "stem"),
    [(28, 28, 28, "cifar"), (90, 64, 64, "cifar"), (160, 128, 160, "imagenet")],
)
def test_the_size_follows_the_images(make, side, size, loaded, stem):
    config, said = fitted(make({"a": 5, "b": 5}, size=side))
    assert (config.data.image_size, config.data.load_size) == (size, loaded)
    assert config.model.stem == stem
    assert f"the short side of most images is about {side} pixels" in said


@pytest.mark.parametrize("grey", [True, False])
def test_colours_are_those_of_the_images(make, grey):
    root = make({"a": 5, "b": 5}, size=64, grey=grey)
    config, _ = fitted(root)
    files = sorted(root.rglob("*.png"))
    pixels = [np.asarray(Image.open(f).convert("RGB").resize((64, 64))) / 255 for f in files]
    mean, std = np.mean(pixels, (0, 1, 2)), np.std(pixels, (0, 1, 2))
    channels = 1 if grey else 3
    assert config.data.channels == channels
    np.testing.assert_allclose(config.data.mean, mean[:channels], atol=1e-4)
    np.testing.assert_allclose(config.data.std, std[:channels], atol=1e-4)
    assert len(fitted(root, data__channels=3)[0].data.mean) == 3


def test_lengths_follow_the_number_of_images(make):
    root = make({"train/a": 60, "train/b": 60, "test/a": 1, "test/b": 1})
    config, said = fitted(root, data__holdout=0.0)
    assert config.supcon.batch_size == config.linear.batch_size == 16  # up to a quarter of 120
    assert "supcon: batch_size=16, for 120 training images" in said
    assert config.supcon.epochs == 300 and config.linear.epochs == 100
    assert config.supcon.schedule.learning_rate == pytest.approx(0.5 / 16)
    assert "cross_entropy" not in said  # a stage that does not run


def test_what_is_given_is_kept(make):
    root = make({"train/a": 8, "train/b": 8, "test/a": 1, "test/b": 1})
    given = dict(data__image_size=24, model__stem="imagenet", supcon__batch_size=8,
                 supcon__epochs=3.0, linear__schedule__learning_rate=0.7)  # fmt: skip
    config, said = fitted(root, **given)
    for field, value in given.items():
        assert configuration.flatten(config)[field.replace("__", ".")] == value
    assert config.data.load_size == 24
    assert "image_size" not in said and "supcon: batch_size" not in said


def test_nothing_is_chosen_for_other_recipes(make):
    config = configuration.load("imagenette")
    config.data.dir = str(make({"train/a": 8}))
    before = configuration.flatten(config)
    assert fit_to_images(config) == [] and configuration.flatten(config) == before


def test_oddities_are_named(make):
    root = make({"train/a": 30, "train/b": 2, "train/c": 1, "test/a": 2, "test/b": 1, "test/c": 1})
    shutil.copy(root / "train" / "a" / "3.png", root / "test" / "b" / "copy.png")
    said = fitted(root)[1]
    assert "warning: classes with a single image: c" in said
    assert "'a' has 30 images, 'c' 1" in said
    assert "1 of 5 test images are training images too" in " ".join(said.split())
    assert str(root / "test/b/copy.png") in said
    pair = (root / "train" / "a" / "3.png", root / "test" / "b" / "copy.png")
    assert duplicates((root / "train").rglob("*.png"), (root / "test").rglob("*.png")) == [pair]


def test_copies_on_both_sides_of_the_own_split_are_counted(make):
    root = make({"a": 25, "b": 25})
    assert "training images too" not in fitted(root)[1]
    for file in list(root.rglob("*.png")):
        shutil.copy(file, file.with_stem(f"{file.stem}-copy"))
    config, said = fitted(root, data__holdout=0.0)
    data = stages.open_data(config)
    training, test = (
        {image.tobytes() for image in source.load(np.arange(source.size))[0]}
        for source in (data.train, data.test)
    )
    assert data.test.size == 20 and len(test & training) >= 10
    copied = sum(
        image.tobytes() in training for image in data.test.load(np.arange(data.test.size))[0]
    )
    assert f"warning: {copied} of 20 test images are training images too" in " ".join(said.split())


def test_lines_fit_a_terminal(make, monkeypatch):
    counts = {f"{split}/{name}": n for split, n in (("training", 30), ("validation", 2))
              for name in ("ragdoll", "siamese")}  # fmt: skip
    monkeypatch.chdir(make(counts | {f"training/{i}": 1 for i in range(8)}))
    shutil.copy("training/ragdoll/3.png", "validation/ragdoll/copy.png")
    for recipe in ("supcon", "simclr", "cross_entropy"):
        said = fitted(".", recipe)[1].splitlines()
        assert len(said) > 8 and max(map(len, said)) <= 80


def test_few_images_fit_in_the_batch(make):
    config, said = fitted(make({"a": 4, "b": 4}))
    data = stages.open_data(config)
    assert config.supcon.batch_size == 4 and (data.train.size, data.test.size) == (6, 2)
    assert "epochs=300, which are 300 steps" in said


def test_without_a_folder_the_choice_is_for_a_plan():
    config, said = fitted("")
    assert said == "" and config.supcon.batch_size == 1024
    with pytest.raises(FileNotFoundError, match="no folder of images is given: set"):
        stages.open_data(config)


def test_what_is_refused(make, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: set --config\.data\.dir"):
        look(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no class folders with images in"):
        look(str(tmp_path))
    root = make({"one/a": 12, "few/a": 2, "few/b": 4})
    with pytest.raises(ValueError, match=r"one has images of one class only \(a\), .* two class"):
        fitted(root / "one")
    with pytest.raises(ValueError, match=r"few has 6 images; add some, at least 8 are needed$"):
        fitted(root / "few")
    for file in root.rglob("few/*/*.png"):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="none of 6 images can be decoded, such as"):
        look(str(root / "few"))


def test_one_command_trains_on_a_folder(make, tmp_path, capfd):
    root = make({"sky/blue": 20, "sky/grey": 20})
    config = configuration.load("folder")
    config.data.dir = str(root / "sky")
    config.model.update(depth=10, width=0.0625)
    for stage in (config.supcon, config.linear):
        stage.update(epochs=1.0)
    results = train.train_and_evaluate(config, tmp_path / "run", pictures=False)
    assert results["test"]["images"] == 8
    said = capfd.readouterr().err
    assert "40 images of 2 classes, and no test images" in said and "image_size=40" in said
    run = open_run(tmp_path / "run")
    assert run.config.data.image_size == 40 and run.class_names == ("blue", "grey")
    assert config.data.image_size == 0  # the caller's is left as it was
