"""Configurations: every file and recipe is valid; what is wrong is named with its remedy."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from supcon_jax import config as configuration
from supcon_jax.fitting import fit_to_images
from supcon_jax.validation import validate

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("configs/*.py"))


@pytest.mark.parametrize("recipe", configuration.RECIPES)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_file_and_recipe_is_valid_and_has_the_fields_of_base(file, recipe):
    config = configuration.load(f"{file}:{recipe}")
    if recipe in ("linear", "finetune"):
        config.model.weights = "encoder.npz"
    fit_to_images(config)
    validate(config)
    assert config.is_locked
    assert set(configuration.flatten(config)) == set(configuration.flatten(configuration.base()))
    assert config.stages == configuration.RECIPES[recipe]


def test_shipped_configurations_are_found_by_name():
    (digits,) = [file for file in FILES if file.stem == "digits"]
    assert configuration.load("digits").to_dict() == configuration.load(str(digits)).to_dict()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", "no configuration 'digts'; did you mean 'digits'?"),
        ("configs/nothing_like_it.py", "no configuration 'configs/nothing_like_it.py'"),
    ],
)
def test_unknown_file_names_the_nearest(name, message):
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        configuration.load(name)


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown recipe 'supcn'; did you mean 'supcon'\?"):
        configuration.load("digits:supcn")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.source", "digit", "config.data.source must be one of digits, folder, tfds; got "
         "'digit'; did you mean 'digits'?"),
        ("model.depth", 51, "must be one of 10, 18, 34, 50, 101, 152, 200; got 51"),
        ("model.stem", "cfar", "did you mean 'cifar'?"),
        ("supcon.objective.denominator_mode", "one_pos", "did you mean 'one_positive'?"),
        ("supcon.objective.temperature", 0.0, "temperature must be positive; got 0.0"),
        ("supcon.objective.positives_cap", 3, "must be -1 or a multiple of the views; got 3"),
        ("supcon.objective.block_size", -1, "block_size must be 0 or more; got -1"),
        ("supcon.epochs", -1.0, "config.supcon.epochs must be positive; got -1.0"),
        ("linear.batch_size", 0, "config.linear.batch_size must be 1 or more; got 0"),
        ("data.holdout", 1.5, "config.data.holdout must be a share from 0 to below 1; got 1.5"),
        ("data.image_size", 16, "config.data.image_size must be from 1 to data.load_size (8)"),
        ("data.mean", (0.1, 0.2), "config.data.mean must be 1 numbers; got (0.1, 0.2)"),
        ("stages", ("supcon", "liner"), "no stage 'liner'; did you mean 'linear'?"),
        ("stages", ("linear",), "config.linear.start_from must be scratch for the first stage, or "
         "config.model.weights the file of an encoder; got 'previous'"),
        ("supcon.optimizer.name", "larz", "one of sgd, nesterov, lars, rmsprop, adamw; got 'larz'; "
         "did you mean 'lars'?"),
        ("stages", ("supcon", "supcon"), "config.stages must be different stages, as each runs "
         "once; got ('supcon', 'supcon')"),
        ("supcon.augment.flip", 2.0, "config.supcon.augment.flip must be a probability from 0 to "
         "1; got 2.0"),
        ("linear.augment.magnitude", 20.0, "config.linear.augment.magnitude must be from 0 to 10; "
         "got 20.0"),
        ("supcon.optimizer.momentum", 2.0, "config.supcon.optimizer.momentum must be from 0 to "
         "below 1; got 2.0"),
        ("supcon.optimizer.weight_decay_kind", "lars", "config.supcon.optimizer.weight_decay_kind "
         "of sgd must be l2 or decoupled; got 'lars'"),
        ("supcon.schedule.final_ratio", 3.0, "config.supcon.schedule.final_ratio must be from 0 "
         "to 1; got 3.0"),
        ("supcon.schedule.warmup_start", 9.0, "config.supcon.schedule.warmup_start must be from 0 "
         "to the peak 0.5; got 9.0"),
        ("supcon.schedule.boundaries", (3, 1), "config.supcon.schedule.boundaries must be "
         "increasing epochs, 0 or more; got (3, 1)"),
        ("supcon.schedule.decay_epochs", 0.0, "config.supcon.schedule.decay_epochs must be "
         "positive; got 0.0"),
        ("linear.schedule.name", "cos", "one of cosine, exponential, step, constant; got 'cos'"),
        ("supcon.augment.name", "randaugment", "did you mean 'rand_augment'?"),
        ("supcon.augment.table", "svhn", "must be one of imagenet, cifar; got 'svhn'"),
        ("supcon.micro_batches", 0, "must be a divisor of the batch size 128; got 0"),
        ("linear.micro_batches", 3, "must be a divisor of the batch size 128; got 3"),
        ("supcon.mix", "mixup", "config.supcon.mix must be none but for cross_entropy with one"),
        ("linear.mix", "cutmixup", "must be one of none, mixup, cutmix; got 'cutmixup'"),
        ("supcon.average", 1.0, "config.supcon.average must be from 0 to below 1; got 1.0"),
        ("linear.queue.size", 512, "must be 0 but for a contrastive stage with two views or more"),
        ("supcon.queue.size", 100, "must be 0, or at least the 128 features that a batch adds"),
        ("supcon.queue.size", 128, "contrast_mode must be one beside a queue: the other views"),
        ("supcon.head.kernel_init", "zeros", "must be other than zeros, which stay so"),
        ("model.batch_norm_momentum", 1.0, "must be from 0 to below 1; got 1.0"),
        ("finetune.optimizer.name", "nestrov", "did you mean 'nesterov'?"),
        ("model.name", "vti", "must be one of resnet, vit; got 'vti'; did you mean 'vit'?"),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(field, value, message):
    config = configuration.load("digits")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("queue.momentum", 1.0, "config.supcon.queue.momentum must be from 0 to below 1; got 1.0"),
        ("queue.from_epoch", -1.0, "config.supcon.queue.from_epoch must be 0 or more; got -1.0"),
        ("queue.size", -1, "at least the 128 features that a batch adds; got -1"),
        ("views", 1, "config.supcon.queue.size must be 0 but for a contrastive stage with two"),
        ("objective.positives_cap", 2, "must be -1 beside a queue, whose positives all count"),
    ],
)
def test_wrong_values_beside_a_queue_are_refused(field, value, message):
    config = configuration.load("digits")
    config.supcon.queue.size, config.supcon.objective.contrast_mode = 256, "one"
    validate(config)
    config.supcon.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)


@pytest.mark.parametrize(("recipe", "cap"), [("supcon", 0), ("simclr", -1)])
def test_one_view_needs_positives_among_the_other_images(recipe, cap):
    """Without any, a run would train on nothing, at loss 0."""
    config = configuration.load(f"digits:{recipe}")
    config[recipe].views, config[recipe].objective.positives_cap = 1, cap
    message = f"config.{recipe}.views must be 2 or more where other images are no positives"
    with pytest.raises(ValueError, match=re.escape(message)):
        validate(config)
    config[recipe].views = 2
    validate(config)


@pytest.mark.parametrize("cap", [-1, 1])
def test_one_view_with_labels_is_allowed(cap):
    """N-pairs is one view and one positive."""
    config = configuration.load("digits:supcon")
    config.supcon.views, config.supcon.objective.positives_cap = 1, cap
    validate(config)


def test_unknown_fields_on_the_command_line_name_the_nearest():
    config = configuration.load("digits")
    configuration.check_names(config, ["--workdir=x", "--config.supcon.epochs=3", "-v"])
    message = "unknown field config.supcon.epoch; did you mean 'supcon.epochs'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        configuration.check_names(config, ["--config.supcon.epoch=3"])


def test_hash_depends_on_what_the_result_depends_on():
    def hashed(recipe="supcon", **fields):
        config = configuration.load(f"digits:{recipe}")
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
        return configuration.config_hash(configuration.used(config))

    assert hashed() == hashed(data__dir="elsewhere", log__every_steps=1, checkpoint__keep=9)
    assert hashed() == hashed(cross_entropy__epochs=1.0)  # a stage that does not run
    others = {
        hashed(seed=1),
        hashed("simclr"),
        hashed(linear__epochs=1.0),
        hashed(model__width=1.0),
    }
    assert len(others | {hashed()}) == 5


def test_difference_names_each_changed_field():
    old, new = configuration.load("digits"), configuration.load("digits")
    new.supcon.epochs, new.log.every_steps = 7.0, 1
    lines = configuration.difference(configuration.used(old), configuration.used(new))
    assert lines == ["supcon.epochs: 90.0 -> 7.0"]


def test_used_configuration_is_plain_json():
    plain = configuration.used(configuration.load("cifar10:cross_entropy"))
    assert json.loads(json.dumps(plain)) == plain
    assert "supcon" not in plain
    assert plain["stages"] == ["cross_entropy"]


def test_base_is_locked():
    with pytest.raises(KeyError, match="epochs"):
        configuration.base().supcon.update(epoch=3)
    assert isinstance(configuration.base(), ConfigDict)


RECIPE = """
from supcon_jax import config, suites
from supcon_jax.models import ENCODERS, ViT

ENCODERS["mine"] = ViT
suites.SUITES["mine"] = print


def get_config(recipe):
    return config.load(f"digits:{recipe}")
"""


def test_a_recipe_file_may_add_to_the_tables(tmp_path):
    """Also to that of the suites, which import the module that the command is."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    command = [sys.executable, "-m", "supcon_jax.train", "--config", str(tmp_path / "recipe.py")]
    done = subprocess.run(
        [*command, "--config.model.name=min", f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: config.model.name must be one of resnet, vit, mine; got 'min'; "
        "did you mean 'mine'?\n"
    )
