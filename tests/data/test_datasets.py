"""The table of data sets: complete, valid fields, whose statistics are those of the images."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from supcon_jax import config as configuration
from supcon_jax.data import prepare
from supcon_jax.data.datasets import DATASETS, dataset
from supcon_jax.data.sources import open_source
from supcon_jax.validation import validate

RECORD = Path(__file__).parents[2] / "experiments" / "data_statistics" / "results.json"
MEASURED = ("digits", "fashion_mnist", "tiny_imagenet32", "imagenette")


@pytest.mark.parametrize("name", DATASETS)
def test_fields_are_those_of_the_configuration(name):
    config = configuration.base()
    ours = set(config.data) - {"dir", "holdout"}
    config.data.update(dataset(name))
    validate(config)
    expected = {"source", "name", "train_split", "test_split", "load_size", "image_size"}
    assert set(dataset(name)) == expected | {"channels", "mean", "std"} <= ours
    assert all(0 < value < 1 for value in (*config.data.mean, *config.data.std))
    assert (config.data.source == "tfds") == bool(config.data.name)


def test_one_data_set_replaces_another_whole():
    config = configuration.base()
    config.data.update(dataset("imagenet"))
    config.data.update(dataset("digits"))
    fresh = configuration.base()
    fresh.data.update(dataset("digits"))
    assert config.data == fresh.data


def test_table_is_not_changed_by_its_users():
    dataset("digits").update(name="changed")
    assert dataset("digits")["name"] == ""


def test_unknown_data_set_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="cifar") as caught:
        dataset("cifar")
    assert str(caught.value) == (
        "unknown data set 'cifar'; there are digits, fashion_mnist, cifar10, cifar100, svhn, "
        "stl10, tiny_imagenet32, imagenette, imagenet"
    )


@pytest.mark.parametrize("name", MEASURED)
def test_statistics_are_those_recorded(name):
    found = json.loads(RECORD.read_text())["table"][name]
    data = dataset(name)
    np.testing.assert_allclose(data["mean"], found["mean"], atol=5e-4)
    np.testing.assert_allclose(data["std"], found["std"], atol=5e-4)
    assert found["shape"] == [data["load_size"], data["load_size"], data["channels"]]


def test_statistics_of_the_digits():
    data = dataset("digits")
    options = {field: data[field] for field in ("name", "load_size", "channels")}
    source = open_source("digits", "train", directory="", memory_limit_gb=1.0, **options)
    images, _ = source.load(np.arange(source.size))
    np.testing.assert_allclose(images.mean() / 255, data["mean"], atol=5e-4)
    np.testing.assert_allclose(images.std() / 255, data["std"], atol=5e-4)
    whole = load_digits().images / 16
    np.testing.assert_allclose(
        [whole.mean(), whole.std()], [*data["mean"], *data["std"]], atol=2e-3
    )


def test_what_tfds_has_can_be_prepared():
    names = {data["name"] for data in DATASETS.values() if data["source"] == "tfds"}
    assert names - {"imagenet2012"} == set(prepare.KNOWN)
