"""The closed form of the gradient, pair by pair, against jax.grad of the losses (float64)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.bases import base
from experiments.gradients import run
from experiments.gradients.closed_form import differences, gradient, pairs_of, sizes, thinned, unit
from experiments.gradients.run import (
    EDGES,
    by_cosine,
    projections_of,
    pull_name,
    pulls,
    quarters,
    shares,
)
from supcon_jax.data import policies
from supcon_jax.losses import l2_normalize, supcon_in_loss, supcon_loss
from supcon_jax.parallel import make_mesh
from supcon_jax.stages import build_model, build_stage, create, open_data
from supcon_jax.steps import forward

LOSSES = {False: supcon_loss, True: supcon_in_loss}
TEMPERATURE = 0.3


@pytest.fixture(params=[False, True], ids=["L_out", "L_in"])
def inside(request):
    return request.param


@pytest.fixture(scope="module")
def images():
    """Two views of 10 digits (one with its neighbour in the data set), mapped to 6 dimensions."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = np.array([0, 1, 2, 10, 11, 20, 30, 31, 3, 13])
    views = np.stack([pixels[chosen], 0.9 * pixels[chosen] + 0.1 * pixels[chosen + 1]], 1)
    kernel = np.random.RandomState(0).normal(size=(64, 6))
    return views @ kernel / 20, labels[chosen]


@pytest.fixture
def views(images):
    """Views under one another, with the labels, and the pairs."""
    w, labels = images
    labels = np.repeat(labels, 2)
    return w.reshape(-1, w.shape[-1]), labels, pairs_of(labels)


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def of_anchor(w, others, labels, i, *, inside, normalised):
    """L_i of the library, where all other views are without gradient: they are in the queue."""
    make = l2_normalize if normalised else (lambda x: x)
    queue = (make(others), labels, jnp.arange(len(labels)) != i)
    losses = LOSSES[inside](
        make(w)[None], labels[i][None], temperature=TEMPERATURE, queue=queue, contrast_mode="one"
    )
    return losses[0]


@pytest.mark.parametrize("normalised", [True, False])
def test_the_terms_of_an_anchor_add_up_to_its_gradient(x64, views, inside, normalised):
    w, labels, pairs = views
    options = dict(inside=inside, normalised=normalised)
    through_anchor = jax.jit(jax.grad(lambda *a: of_anchor(*a, **options)))
    expected = [through_anchor(w[i], w, jnp.asarray(labels), i) for i in range(len(w))]
    found = gradient(w, pairs, temperature=TEMPERATURE, **options)
    assert_close(found, np.stack(expected))


@pytest.mark.parametrize("normalised", [True, False])
def test_both_roles_of_a_view_add_up_to_the_whole_gradient(x64, images, views, inside, normalised):
    def total(w):
        z = l2_normalize(w) if normalised else w
        return z.shape[1] * LOSSES[inside](z, jnp.asarray(images[1]), temperature=TEMPERATURE).sum()

    expected = jax.jit(jax.grad(total))(jnp.asarray(images[0]))
    w, _, pairs = views
    options = dict(inside=inside, normalised=normalised, as_contrast=True)
    found = gradient(w, pairs, temperature=TEMPERATURE, **options)
    assert_close(found, np.asarray(expected).reshape(w.shape))


def test_sizes_are_the_lengths_of_the_terms(views, inside):
    w, _, pairs = views
    z = unit(w)
    c = differences(z, pairs, temperature=TEMPERATURE, inside=inside) / TEMPERATURE
    found = sizes(w, pairs, temperature=TEMPERATURE, inside=inside)
    terms = np.zeros((len(w), *w.shape))
    for i in range(len(w)):
        for a in range(len(w)):
            tangent = (np.eye(w.shape[1]) - np.outer(z[i], z[i])) / np.linalg.norm(w[i])
            terms[i, a] = c[i, a] * tangent @ z[a]
            assert found[i, a] == pytest.approx(np.linalg.norm(terms[i, a]), rel=1e-7, abs=1e-12)
    expected = gradient(w, pairs, temperature=TEMPERATURE, inside=inside)
    np.testing.assert_allclose(terms.sum(1), expected, atol=1e-12)


def test_lengths_count_without_normalisation(views, inside):
    w, _, pairs = views
    options = dict(temperature=20.0, inside=inside)
    c = differences(w, pairs, **options) / 20
    expected = np.linalg.norm(c[:, :, None] * w, axis=-1)
    found = sizes(w, pairs, **options, normalised=False)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_without_normalisation_the_factor_is_gone(views, inside):
    z, options = unit(views[0]), dict(temperature=TEMPERATURE, inside=inside)
    pairs = views[2]
    off = ~np.eye(len(z), dtype=bool)
    plain = sizes(z, pairs, **options, normalised=False)
    sines = np.sqrt(1 - (z @ z.T)[off] ** 2)
    np.testing.assert_allclose(sizes(z, pairs, **options)[off], plain[off] * sines, atol=1e-12)
    c = differences(z, pairs, **options) / TEMPERATURE
    np.testing.assert_allclose(plain, np.abs(c), atol=1e-12)
    longer = sizes(2 * z, pairs, temperature=4 * TEMPERATURE, inside=inside, normalised=False)
    np.testing.assert_allclose(longer, plain / 4 * 2, atol=1e-12)


def test_an_equal_positive_has_no_term_and_one_at_right_angles_the_most():
    """One positive at each angle, the loss's own weights apart."""
    angles = np.deg2rad([0, 0, 45, 90])
    w = np.stack([np.cos(angles), np.sin(angles)], 1)
    pairs = pairs_of(np.zeros(4, int))
    options = dict(temperature=1e6, inside=False)  # all P_ip are 1 / 3, and so is X_ip
    np.testing.assert_allclose(sizes(w, pairs, **options)[0], 0, atol=1e-12)
    pairs = pairs_of(np.array([0, 0, 1, 1]))
    found = sizes(w, pairs, **options)[0] * 1e6
    np.testing.assert_allclose(found, np.array([0, 0, np.sqrt(0.5), 1]) / 3, rtol=1e-5, atol=1e-12)


def test_an_anchor_without_positives_has_no_gradient(inside):
    w = np.random.RandomState(1).normal(size=(3, 4))
    pairs = pairs_of(np.array([0, 0, 1]))
    found = sizes(w, pairs, temperature=TEMPERATURE, inside=inside)
    assert (found[2] == 0).all()
    assert (found[0, 1:] > 0).all()


def test_more_negatives_push_a_hard_positive_more(views, inside):
    """Eqs. 23 and 24: |P - X| grows with each negative; at equal negatives, see the next test."""
    w, _, pairs = views
    order = np.random.RandomState(2).random_sample(pairs.negative.shape)
    pushes = []
    for share in (0.25, 0.5, 1.0):
        fewer = pairs._replace(negative=thinned(pairs.negative, share, order))
        found = differences(unit(w), fewer, temperature=TEMPERATURE, inside=inside)
        cosines = np.where(pairs.positive, unit(w) @ unit(w).T, np.inf)
        pushes.append(np.abs(found)[np.arange(len(w)), cosines.argmin(1)])
    assert (pushes[2] > pushes[1]).all() and (pushes[1] > pushes[0]).all()


def test_eq_24_leaves_out_a_factor_that_falls_with_the_positives():
    """|P_ip - X_ip| = (sum_N + sum_P - |P|) / (|P| (sum_N + sum_P)) for a positive at cosine 0."""
    w = np.array([[1, 0, 0], [0, 1, 0], [0.8, 0.6, 0], [0.6, 0.8, 0], [-0.6, 0, 0.8], [0, 0, 1.0]])
    coefficients = []
    for positives in (2, 3):
        labels = np.array([0, 0, 0, 0 if positives == 3 else 9, 1, 1])
        pairs = pairs_of(labels)
        if positives == 2:  # the third is neither a positive nor a negative
            pairs.negative[:, 3] = pairs.negative[3] = False
        found = abs(differences(w, pairs, temperature=TEMPERATURE, inside=False)[0, 1])
        powers = np.exp(w @ w[0] / TEMPERATURE)
        pull = powers[pairs.negative[0]].sum() + powers[pairs.positive[0]].sum()
        assert found == pytest.approx((pull - positives) / (positives * pull))
        coefficients.append(found)
    assert coefficients[1] < coefficients[0]


def test_thinned_keeps_the_first_of_each_row():
    mask = np.array([[1, 1, 1, 1, 0], [0, 1, 0, 0, 1]], bool)
    order = np.array([[3, 2, 1, 0, -5], [-9, 1, -9, -9, 0]], float)
    found = thinned(mask, 0.5, order)
    np.testing.assert_array_equal(found, [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])
    assert (thinned(mask, 1.0, order) == mask).all()
    assert (thinned(mask, 0.01, order).sum(1) == 1).all()


def test_quarters_are_shares_of_the_sum():
    terms = np.array([5.0, 1, 2, 4, 3, 5, 7, 3])
    found = quarters(np.array([0.3, 0.9, 0.8, 0.1, 0.5, 0.6, 0.7, 0.2]), terms)
    assert found == {"hardest": pytest.approx(100 * 7 / 30), "easiest": pytest.approx(10)}


def test_hard_positives_are_far_and_hard_negatives_near(views):
    w, _, pairs = views
    options = dict(temperature=TEMPERATURE, inside=False)
    terms, cosines = sizes(w, pairs, **options), unit(w) @ unit(w).T
    found = shares(w, pairs, **options)
    for kind, mask, sign in (("positives", pairs.positive, 1), ("negatives", pairs.negative, -1)):
        ranked = sorted(zip(sign * cosines[mask], terms[mask], strict=True), key=lambda x: x[0])
        expected = 100 * sum(term for _, term in ranked[: len(ranked) // 4]) / terms[mask].sum()
        assert found[f"hardest {kind}"] == pytest.approx(expected, rel=1e-6)
        assert found[f"hardest {kind}, not normalised"] != pytest.approx(expected, rel=1e-2)


def test_bins_hold_all_pairs(views, inside):
    w, _, pairs = views
    terms = sizes(w, pairs, temperature=TEMPERATURE, inside=inside)
    found = by_cosine(w, pairs, temperature=TEMPERATURE, inside=inside)
    cosines = unit(w) @ unit(w).T
    for row, mask in zip(found, pairs, strict=True):
        assert row[0].sum() == pytest.approx(terms[mask].sum())
        numbers, _ = np.histogram(np.clip(cosines[mask], -1, 1), EDGES)
        np.testing.assert_array_equal(row[2], numbers)


def test_pulls_are_of_the_hardest_positive(views, inside):
    w, labels, pairs = views
    z, options = unit(w), dict(temperature=TEMPERATURE, inside=inside)
    expected = []
    for i, c in enumerate(differences(z, pairs, **options)):
        others = [a for a in range(len(w)) if a != i and labels[a] == labels[i]]
        expected.append(abs(c[min(others, key=lambda a, i=i: z[i] @ z[a])]))
    found = pulls(w, pairs, **options)
    for kind in ("negative", "positive"):
        assert found[pull_name(1.0, kind)] == pytest.approx(100 * np.mean(expected))
    assert found[pull_name(0.25, "negative")] < found[pull_name(0.5, "negative")]


def test_the_hardest_positive_stays_when_positives_are_left_out(views, inside, monkeypatch):
    w, _, pairs = views
    monkeypatch.setattr(run, "SHARES", (1e-6,))
    found = pulls(w, pairs, temperature=TEMPERATURE, inside=inside)[pull_name(1e-6, "positive")]
    cosines = unit(w) @ unit(w).T
    own = np.exp(np.min(cosines, axis=1, where=pairs.positive, initial=2) / TEMPERATURE)
    others = np.sum(np.exp(cosines / TEMPERATURE), axis=1, where=pairs.negative)
    assert found == pytest.approx(100 * np.mean(others / (own + others)))  # |P - 1|


@pytest.mark.slow
def test_projections_are_what_the_loss_gets_before_it_is_normalised():
    config = base("smoke")
    config.seed = 3
    data, mesh = open_data(config), make_mesh(jax.devices()[:1])
    stage = build_stage(config, "supcon", data, mesh)
    state = create(stage, config, mesh, previous=None)
    w, labels = next(projections_of(config, data)(state))
    assert len(w) == len(labels) == 2 * config.supcon.batch_size
    assert (labels[::2] == labels[1::2]).all()
    assert np.ptp(np.linalg.norm(w, axis=1)) > 0.1

    config.model.batch_norm = "local"
    chosen = np.random.RandomState(0).permutation(data.train.size)[: len(w) // 2]
    images, expected_labels = data.train.load(np.sort(chosen))
    np.testing.assert_array_equal(labels[::2], expected_labels)
    augment = partial(
        policies.make_views,
        policies=[policies.make_policy(size=config.data.image_size, **config.supcon.augment)] * 2,
        mean=config.data.mean,
        std=config.data.std,
    )
    views = augment(
        jax.random.split(jax.random.key(0), len(images)), {"image": jnp.asarray(images[:, None])}
    )
    model = build_model(config, "supcon", classes=10)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs, _ = forward(model, jax.device_get(variables), views)
    np.testing.assert_allclose(unit(w), outputs.reshape(len(w), -1), atol=1e-4)
