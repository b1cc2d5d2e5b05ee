"""Files of a finished run: other programs get the same features and classes from them."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file
from short_runs import small
from test_torch_weights import features_in_torch

from supcon_jax import inference, stages, train
from supcon_jax.data.sources import open_source
from supcon_jax.models import encoder_from_torch, encoder_to_torch, load_torch_encoder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train.train_and_evaluate(small(), workdir, pictures=False)
    return workdir


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """The folder of the files, and what the command says."""
    folder = tmp_path_factory.mktemp("exported") / "files"
    return folder, run(workdir, folder)


@pytest.fixture(scope="module")
def folder(exported):
    return exported[0]


def run(workdir, folder):
    """In a process of its own: the tests' type checks do not know a batch of any size."""
    command = [sys.executable, "-m", "supcon_jax.export", "--workdir", workdir, "--out", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def images(workdir):
    source = open_source(
        "digits", "test", name="", directory="", load_size=8, channels=1, memory_limit_gb=1.0
    )
    preprocess = inference.load_encoder(workdir).preprocess
    return np.stack([preprocess(image) for image in source.load(np.arange(12))[0]])


def test_every_file_is_there(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "card.json",
        "classifier.safetensors",
        "encoder.safetensors",
        "features.stablehlo",
        "projection.safetensors",
    ]


def test_the_encoder_comes_back(workdir, folder, images):
    apply_fn, variables, _ = inference.load_encoder(workdir, normalised=False)
    model = stages.build_model(small(), "linear", classes=10).encoder
    loaded = load_torch_encoder(folder / "encoder.safetensors", model)
    found = model.apply(loaded, jnp.asarray(images), train=False)
    np.testing.assert_allclose(found, apply_fn(variables, images), rtol=1e-4, atol=1e-5)
    again = encoder_from_torch(encoder_to_torch(loaded), model)
    np.testing.assert_array_equal(again["params"]["conv_stem"]["kernel"],
                                  loaded["params"]["conv_stem"]["kernel"])  # fmt: skip


def test_pytorch_computes_the_same_features(workdir, folder, images):
    apply_fn, variables, _ = inference.load_encoder(workdir, normalised=False)
    found = features_in_torch(load_file(folder / "encoder.safetensors"), images)
    expected = apply_fn(variables, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_classifier_is_that_of_the_run(workdir, folder, images):
    features = inference.load_encoder(workdir)
    head = load_file(folder / "classifier.safetensors")
    assert {name: array.shape for name, array in head.items()} == {
        "Dense_0.weight": (10, 32),
        "Dense_0.bias": (10,),
    }
    rows = np.asarray(features.apply_fn(features.variables, images), np.float64)
    logits = rows @ head["Dense_0.weight"].T + head["Dense_0.bias"]
    classifier = inference.load_classifier(workdir)
    expected = classifier.apply_fn(classifier.variables, images)
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_the_compiled_function_needs_jax_alone(workdir, folder, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    code = f"""
import sys
sys.modules["supcon_jax"] = sys.modules["flax"] = None  # importing them would fail
import jax, numpy as np
from jax import export
function = export.deserialize(bytearray(open({str(folder / "features.stablehlo")!r}, "rb").read()))
images = np.load("images.npy")
np.savez("features.npz", whole=function.call(images), one=function.call(images[:1]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "features.npz")
    apply_fn, variables, _ = inference.load_encoder(workdir)
    np.testing.assert_allclose(found["whole"], apply_fn(variables, images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["one"], found["whole"][:1], rtol=1e-4, atol=1e-5)


def test_the_card_says_what_the_weights_are_of(workdir, folder):
    card = json.loads((folder / "card.json").read_text())
    results = json.loads((workdir / "results.json").read_text())
    assert card["test"] == results["test"]
    assert card["config"]["supcon"]["batch_size"] == 256
    assert card["preprocessing"]["mean"] == [0.305] and card["features_of_length_1"] is True
    assert card["class_names"] == [str(digit) for digit in range(10)]


def test_what_torchvision_takes_is_said(exported):
    folder, said = exported
    card = json.loads((folder / "card.json").read_text())
    why = "torchvision has no ResNet of depth=10, groups=1, group_width=64"
    assert card["torchvision"] is None and card["torchvision_why_none"] == why
    assert said.splitlines()[-1] == f"no network of torchvision takes the encoder: {why}"


@pytest.mark.slow
def test_a_vit_is_exported_too(tmp_path):
    config = small(stages=("cross_entropy",), model__name="vit", model__size="ti", model__patch=4)
    train.train_and_evaluate(config, tmp_path / "run", pictures=False)
    run(tmp_path / "run", tmp_path / "files")
    arrays = load_file(tmp_path / "files" / "encoder.safetensors")
    assert arrays and "classifier.safetensors" in {f.name for f in (tmp_path / "files").iterdir()}
    assert all(np.isfinite(array).all() for array in arrays.values())
