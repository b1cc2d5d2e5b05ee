"""Every recipe of every file: built whole, trained when shrunk, and as docs/recipes.md says."""

import functools
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from supcon_jax import config as configuration
from supcon_jax import stages
from supcon_jax.data.sources import Source
from supcon_jax.fitting import fit_to_images
from supcon_jax.models.resnet import DEPTHS
from supcon_jax.models.vit import SIZES
from supcon_jax.state import from_variables
from supcon_jax.validation import validate

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("configs/*.py"))
CLASSES = {"imagenet2012": 1000, "cifar100": 100}
IMAGES = {"imagenet2012": 1_281_167}
every_recipe = pytest.mark.parametrize(
    ("file", "recipe"),
    [(file.stem, recipe) for file in FILES for recipe in configuration.RECIPES],
)


def split(size, classes, shape):
    """Real digits in place of a data set that is not here, resized and coloured as it needs."""
    pixels = (load_digits(return_X_y=True)[0].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    height, width, channels = shape

    def load(indices):
        images = [Image.fromarray(pixels[i % 1797]).resize((width, height)) for i in indices]
        stacked = np.stack([np.asarray(image) for image in images])[..., None]
        return np.repeat(stacked, channels, -1), np.int32(indices % classes)

    names = tuple(str(c) for c in range(classes))
    labels = np.int32(np.arange(size) % classes)
    return Source("digits instead", size, names, shape, load, lambda: labels)


def data_of(config, size=None, classes=None):
    name = config.data.name
    size = size or IMAGES.get(name, 50_000)
    shape = (config.data.load_size, config.data.load_size, config.data.channels)
    whole = split(size, classes or CLASSES.get(name, 10), shape)
    return stages.Data(whole, whole, whole, whole)


@functools.cache
def variables_of(model, shape):
    """Shapes of a model's variables, traced once for all recipes that have the model."""
    image = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)


@every_recipe
def test_every_recipe_can_be_built_whole(file, recipe, mesh_of):
    """Model, optimizer and state in their published sizes, as shapes only."""
    config = configuration.load(f"{file}:{recipe}")
    fit_to_images(config)
    config.model.weights = config.model.weights or "needed by :linear"
    validate(config)
    data = data_of(config)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    for name in config.stages:
        stage = stages.build_stage(config, name, data, mesh_of(1))
        options = stages.carried(config[name])
        key, variables = jax.random.key(0), variables_of(stage.model, shape)
        create = partial(from_variables, stage.model, stage.tx, **options)
        state = jax.eval_shape(create, variables, key)
        count = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.frozen)))
        assert count > 1e4
        assert stage.steps == round(config[name].epochs * stage.steps_per_epoch) > 100
        peak = config[name].schedule.learning_rate
        warmup = round(config[name].warmup_epochs * stage.steps_per_epoch)
        np.testing.assert_allclose(stage.schedule(warmup), peak, rtol=1e-6)
        assert stage.schedule(stage.steps - 1) < 0.3 * peak


def shrunk(file, recipe):
    """The same recipe on 32 images of two classes, thin and short."""
    config = configuration.load(f"{file}:{recipe}")
    fit_to_images(config)
    config.model.weights = ""
    side = min(config.data.image_size, 32)
    config.data.update(image_size=side, load_size=side)
    config.model.update(width=0.0625, patch=8, size="ti")
    for name in config.stages:
        stage = config[name]
        stage.update(batch_size=8, epochs=0.5, warmup_epochs=0.0)
        stage.queue.size = min(stage.queue.size, 24)
        if "layers" in stage.head:
            stage.head.update(layers=(8,) * len(stage.head.layers))
    return config


def different_stages():
    """Every stage of every recipe, but one of those that differ in their rates or classes alone.

    Of `finetune`, which trains as `cross_entropy` does, that of one file.
    """
    seen = {}
    pairs = ((f.stem, r) for f in FILES for r in configuration.RECIPES)
    for file, recipe in (p for p in pairs if p[1] != "finetune" or p[0] == "digits"):
        config = shrunk(file, recipe)
        for name in config.stages:
            stage = config[name].to_dict()
            stage["schedule"].pop("learning_rate")
            stage["optimizer"].pop("weight_decay")
            stage.pop("loss_scale")
            deep = config.model.depth >= 50
            model = {**config.model.to_dict(), "depth": deep}
            key = str((name, stage, model, config.data.image_size, config.data.channels))
            seen.setdefault(key, (file, recipe, name))
    return list(seen.values())


@pytest.mark.slow
@pytest.mark.parametrize(("file", "recipe", "name"), different_stages())
def test_every_stage_trains_when_shrunk(file, recipe, name, mesh_of, monkeypatch):
    """Two steps, with one block a group (two in all of a transformer): they compile in seconds."""
    for depth, (_, bottleneck) in DEPTHS.items():
        monkeypatch.setitem(DEPTHS, depth, ((1, 1, 1, 1), bottleneck))
    monkeypatch.setitem(SIZES, "ti", SIZES["ti"]._replace(depth=2))
    config, mesh = shrunk(file, recipe), mesh_of(1)
    data = data_of(config, 32, 2)
    stage = stages.build_stage(config, name, data, mesh)
    state, losses = stages.create(stage, config, mesh, previous=None), []
    before = jax.tree.map(np.asarray, state.params)
    assert stage.steps == 2
    for batch in stages.batches(stage, 0, config, data.train, mesh):
        state, metrics = stage.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(losses) == 2 and np.isfinite(losses).all()
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, state.params)
    assert np.mean(jax.tree.leaves(moved)) > 0.5


def test_values_in_the_documentation_are_those_of_the_files():
    """docs/recipes.md: the cells below a recipe's name, in rows that name a field."""
    checked = 0
    for header, rows in tables((ROOT / "docs" / "recipes.md").read_text()):
        columns = [(place, name) for place, name in enumerate(header) if name in NAMES]
        for row in rows:
            field = row[0].strip("`")
            for place, name in columns:
                recipe = field.partition(".")[0]
                recipe = recipe if recipe in configuration.RECIPES else "supcon"
                recipe = "supcon" if recipe == "linear" else recipe
                values = configuration.flatten(configuration.load(f"{name}:{recipe}"))
                expected = values[field]
                if isinstance(expected, float):
                    assert float(row[place]) == pytest.approx(expected), (name, field)
                else:
                    assert row[place] == str(expected), (name, field)
                checked += 1
    assert checked > 150


NAMES = {file.stem for file in FILES}


def tables(text):
    """(header, rows) of each Markdown table, as lists of stripped cells."""
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        lines = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()
        ]
        yield lines[0], lines[2:]
