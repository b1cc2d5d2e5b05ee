"""Objectives of the baselines: what they minimise, and what they report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from short_runs import small

from supcon_jax import losses, objectives, stages
from supcon_jax.models import Classifier, MarginClassifier, make_head
from supcon_jax.validation import validate


def unit(key, *shape):
    return losses.l2_normalize(jax.random.normal(jax.random.key(key), shape))


def test_triplet():
    z, labels = unit(0, 12, 2, 8), jnp.arange(12) % 3
    values, weights, metrics = objectives.contrastive(
        z, {"label": labels}, {}, loss="triplet", temperature=0.2
    )
    np.testing.assert_array_equal(values, losses.triplet_loss(z, labels, temperature=0.2))
    np.testing.assert_array_equal(weights, 1)
    np.testing.assert_array_equal(metrics["excess"][0], values)
    assert metrics.keys() == {"collapsed", "excess", "contrastive_accuracy", "lonely"}
    together = jnp.broadcast_to(z[:1, :1], z.shape)
    collapsed = objectives.contrastive(
        together, {"label": labels}, {}, loss="triplet", temperature=0.2
    )[0]
    np.testing.assert_allclose(collapsed, metrics["collapsed"][0], rtol=1e-5)


def test_a_loss_that_was_added(monkeypatch):
    """It is found by its name, gets the options, and has no metric that needs its formula."""
    got = {}

    def distances(features, labels, *, temperature, axis_name, **options):
        got.update(options)
        return temperature * jnp.square(features[:, 0] - features[:, 1]).sum(-1)

    config = small(supcon__objective__loss="distances", supcon__objective__block_size=2)
    with pytest.raises(ValueError, match="one of supcon, supcon_in, triplet; got 'distances'"):
        validate(config)
    monkeypatch.setitem(objectives.LOSSES, "distances", distances)
    validate(config)
    z, labels = unit(0, 12, 2, 8), jnp.array([*range(8), 0, 1, 2, 3])
    batch, options = {"label": labels}, config.supcon.objective.to_dict()
    del options["name"]
    values, weights, metrics = objectives.contrastive(z, batch, {}, **options)
    np.testing.assert_allclose(values, 0.2 * (2 - 2 * (z[:, 0] * z[:, 1]).sum(-1)), rtol=1e-5)
    np.testing.assert_array_equal(weights, 1)
    assert metrics.keys() == {"contrastive_accuracy", "lonely"}
    assert metrics["lonely"][0].mean() == pytest.approx(4 / 12)
    assert (got["block_size"], got["positives_cap"], got["queue"]) == (2, None, None)


@pytest.mark.parametrize("margin", [2, 4])
def test_margin(margin):
    x = jax.random.normal(jax.random.key(0), (10, 6))
    labels = jnp.arange(10) % 4
    head = make_head("classifier", classes=4, margin=margin)
    assert isinstance(head, MarginClassifier)
    variables = head.init(jax.random.key(1), x, True)
    outputs = head.apply(variables, x, True)
    values, weights, metrics = objectives.cross_entropy(
        outputs[:, None], {"label": labels}, {"step": 0}, margin=margin
    )
    w = variables["params"]["kernel"].T
    expected = losses.large_margin_softmax(x, w, labels, margin=margin)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert (values > losses.large_margin_softmax(x, w, labels, margin=1)).all()
    logits = head.apply(variables, x, False)
    np.testing.assert_allclose(logits, x @ w.T, rtol=1e-5, atol=1e-6)
    right = logits.argmax(-1) == labels
    handicapped = losses.with_margin(*jnp.split(outputs, 2, axis=-1), labels, margin)
    assert (handicapped.argmax(-1) == labels).sum() < right.sum()
    np.testing.assert_array_equal(metrics["accuracy"][0], right)  # as the logits are evaluated
    np.testing.assert_array_equal(weights, 1)


def test_the_margin_grows():
    """At step k of n, the own logit is as far between the two losses' as (k + 1) / n is to 1."""
    x = jax.random.normal(jax.random.key(0), (10, 6))
    labels = jnp.arange(10) % 4
    head = make_head("classifier", classes=4, margin=2)
    variables = head.init(jax.random.key(1), x, True)
    outputs, w = head.apply(variables, x, True)[:, None], variables["params"]["kernel"]
    plain, own = x @ w, jax.nn.one_hot(labels, 4, dtype=bool)
    whole = losses.with_margin(*jnp.split(outputs[:, 0], 2, axis=-1), labels, 2)
    for step, share in ((0, 0.2), (2, 0.6), (4, 1.0), (9, 1.0)):
        values = objectives.cross_entropy(
            outputs, {"label": labels}, {"step": step}, margin=2, margin_steps=5
        )[0]
        logits = jnp.where(own, (1 - share) * plain + share * whole, plain)
        expected = -jax.nn.log_softmax(logits)[own]
        np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_no_margin_is_the_plain_classifier():
    assert isinstance(make_head("classifier", classes=4, margin=1), Classifier)


def test_the_recipe_makes_the_head(mesh_of):
    config = small("cross_entropy", cross_entropy__objective__margin=2)
    config.cross_entropy.objective.margin_epochs = 1.0  # five steps
    validate(config)
    data = stages.open_data(config)
    stage = stages.build_stage(config, "cross_entropy", data, mesh_of(1))
    assert isinstance(stage.model.head, MarginClassifier)
    state = stages.create(stage, config, mesh_of(1), None)
    batch = next(stages.batches(stage, 0, config, data.train, mesh_of(1)))
    outputs = stage.eval_step(state, {"image": batch["image"]})["outputs"]
    assert outputs.shape == (256, 10)
    losses = []
    for _ in range(16):  # on one batch
        state, metrics = stage.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[4]  # both with the whole margin


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"supcon__objective__positives_cap": 2}, "positives_cap must be -1 for triplet; got 2"),
        ({"supcon__objective__exchange": "ring"}, "exchange must be 'gather' for triplet"),
        ({"supcon__objective__use_labels": False}, "use_labels must be True for triplet"),
    ],
)
def test_options_that_triplet_has_no_use_for_are_refused(fields, message):
    config = small(supcon__objective__loss="triplet")
    validate(config)
    config = small(supcon__objective__loss="triplet", **fields)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_margin_for_mixed_images_is_refused():
    fields = {"cross_entropy__mix": "mixup", "cross_entropy__objective__margin": 2}
    with pytest.raises(ValueError, match="margin must be 1 for mixed images"):
        validate(small("cross_entropy", **fields))
