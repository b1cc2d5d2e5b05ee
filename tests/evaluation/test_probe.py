"""The linear probe against scikit-learn's logistic regression, and its sweep over penalties."""

from functools import partial

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from supcon_jax.evaluation.probe import PENALTIES, Probe, fit_probe, predict_logits, sweep_probe

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS = np.float32(PIXELS / 16)
LABELS = LABELS.astype(np.int32)
TRAIN, TEST = (PIXELS[:1437], LABELS[:1437]), (PIXELS[1437:], LABELS[1437:])


def correlated(images, seed):
    """Features far from zero that correlate: lengths along their axes fall from 1 to 1e-3."""
    random = np.random.RandomState(seed)
    shared = np.random.RandomState(0)
    lengths = np.logspace(0, -3, 24)
    axes, offset = np.linalg.qr(shared.normal(size=(24, 24)))[0], shared.uniform(1, 3, 24)
    means = shared.normal(size=(5, 24)) * lengths
    labels = random.randint(5, size=images, dtype=np.int32)
    rows = means[labels] + random.normal(size=(images, 24)) * lengths * 0.7
    return np.float32(rows @ axes + offset), labels


def by_scikit_learn(features, labels, l2):
    """At two classes it has one vector of weights, the difference of ours."""
    strength = (2 if labels.max() == 1 else 1) / (l2 * len(labels))
    model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-8)
    with threadpool_limits(1):  # its threads wait by spinning
        return model.fit(features.astype(float), labels)


def objective(probe, features, labels, l2):
    kernel = probe.kernel.astype(float)
    logits = features.astype(float) @ kernel + probe.bias
    own = log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return -own.mean() + l2 / 2 * np.square(kernel).sum()


def gradient(probe, features, labels, l2):
    """Of kernel and bias, in float64."""
    kernel = probe.kernel.astype(float)
    excess = softmax(features.astype(float) @ kernel + probe.bias, axis=1)
    excess[np.arange(len(labels)), labels] -= 1
    return features.T.astype(float) @ excess / len(labels) + l2 * kernel, excess.mean(axis=0)


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_equals_scikit_learn_on_digits(l2):
    probe, model = fit_probe(*TRAIN, classes=10, l2=l2), by_scikit_learn(*TRAIN, l2)
    reference = Probe(model.coef_.T, model.intercept_)
    value, expected = objective(probe, *TRAIN, l2), objective(reference, *TRAIN, l2)
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(probe.kernel, reference.kernel, atol=0.02 * model.coef_.std())
    np.testing.assert_allclose(probe.bias, reference.bias, atol=0.05 * model.coef_.std())
    predicted = predict_logits(probe, TEST[0]).argmax(-1)
    assert (predicted == model.predict(TEST[0])).mean() > 0.999
    assert (predicted == TEST[1]).mean() > 0.85


@pytest.mark.parametrize("l2", [1e-2, 1e-4, 1e-6])
def test_equals_scikit_learn_on_correlated_features(l2):
    train, test = correlated(3000, 1), correlated(2000, 2)
    probe = fit_probe(*train, classes=5, l2=l2)
    model = by_scikit_learn(*train, l2)
    reference = Probe(model.coef_.T, model.intercept_)
    expected = objective(reference, *train, l2)
    assert objective(probe, *train, l2) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(probe.kernel, reference.kernel, atol=0.02 * model.coef_.std())
    accuracy = (predict_logits(probe, test[0]).argmax(-1) == test[1]).mean()
    assert accuracy == pytest.approx(model.score(*test), abs=1e-3)


def test_two_classes_equal_scikit_learn_at_twice_the_c():
    few = TRAIN[1] < 2
    features, labels = TRAIN[0][few], TRAIN[1][few]
    probe, model = (
        fit_probe(features, labels, classes=2, l2=0.01),
        by_scikit_learn(features, labels, 0.01),
    )
    difference = probe.kernel[:, 1] - probe.kernel[:, 0]
    np.testing.assert_allclose(difference, model.coef_[0], atol=1e-3)
    assert probe.bias[1] - probe.bias[0] == pytest.approx(model.intercept_[0], abs=1e-3)


@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_the_gradient_vanishes_at_the_result(l2):
    probe = fit_probe(*TRAIN, classes=10, l2=l2)
    of_kernel, of_bias = gradient(probe, *TRAIN, l2)
    assert abs(of_kernel).max() < 1e-5 and abs(of_bias).max() < 1e-5
    at_zero, _ = gradient(Probe(np.zeros((64, 10)), np.zeros(10)), *TRAIN, l2)
    assert abs(at_zero).max() > 1e-2


def test_the_bias_is_not_penalised():
    """So a shift of the features changes nothing but the bias, and a strong penalty leaves it."""
    probe = fit_probe(*TRAIN, classes=10, l2=0.01)
    shifted = fit_probe(TRAIN[0] + 3, TRAIN[1], classes=10, l2=0.01)
    np.testing.assert_allclose(shifted.kernel, probe.kernel, atol=2e-3)
    rare = (TRAIN[1] > 0) | (np.arange(1437) % 4 == 0)
    strong = fit_probe(TRAIN[0][rare], TRAIN[1][rare], classes=10, l2=1e4)
    shares = np.bincount(TRAIN[1][rare]) / rare.sum()
    np.testing.assert_allclose(softmax(strong.bias), shares, rtol=2e-3)


def test_the_penalty_is_relative_to_the_scale_of_the_features():
    probe = fit_probe(*TRAIN, classes=10, l2=0.01)
    larger = fit_probe(100 * TRAIN[0], TRAIN[1], classes=10, l2=100.0)
    np.testing.assert_allclose(100 * larger.kernel, probe.kernel, atol=1e-3)


def test_a_start_changes_the_time_but_not_the_result():
    first = fit_probe(*TRAIN, classes=10, l2=0.1)
    cold, warm = (fit_probe(*TRAIN, classes=10, l2=0.01, start=start) for start in (None, first))
    np.testing.assert_allclose(warm.kernel, cold.kernel, atol=2e-3)
    done = fit_probe(*TRAIN, classes=10, l2=0.01, start=cold, steps=2)  # or it would warn
    np.testing.assert_allclose(done.kernel, cold.kernel, atol=1e-4)


def test_too_few_steps_are_told():
    with pytest.warns(RuntimeWarning, match="l2 = 1e-05 has not converged in 3 steps"):
        fit_probe(*TRAIN, classes=10, l2=1e-5, steps=3)


def test_classes_without_images_are_not_predicted():
    probe = fit_probe(*TRAIN, classes=13, l2=1e-3)
    assert all(np.isfinite(part).all() for part in probe)
    without = fit_probe(*TRAIN, classes=10, l2=1e-3)
    predicted = predict_logits(probe, TEST[0]).argmax(-1)
    assert (predicted == predict_logits(without, TEST[0]).argmax(-1)).mean() > 0.999


@pytest.fixture(scope="module")
def noisy():
    """Digits beside numbers by chance, some labels by chance: too much for a weak penalty."""
    random = np.random.RandomState(0)
    chance = np.float32(random.normal(size=(1437, 200)) / 2)
    wrong = random.random_sample(1437) < 0.3
    labels = np.where(wrong, random.randint(10, size=1437, dtype=np.int32), TRAIN[1])
    return np.concatenate([TRAIN[0], chance], axis=1), labels


def test_sweep_takes_the_penalty_that_is_best_on_what_it_holds_out(noisy):
    found = sweep_probe(*noisy, classes=10, penalties=(10.0, 1e-5, 0.1))
    assert list(found.accuracies) == [10.0, 0.1, 1e-5] and found.l2 == 0.1
    best, *others = sorted(found.accuracies.values(), reverse=True)
    assert found.accuracies[0.1] == best > others[0] + 0.02
    assert not found.on_edge
    final = fit_probe(*noisy, classes=10, l2=0.1)
    np.testing.assert_allclose(found.probe.kernel, final.kernel, atol=1e-3)


def test_sweep_scores_images_that_it_has_not_seen():
    """Labels by chance are learned by heart, and are of no use for others."""
    random = np.random.RandomState(0)
    features = random.normal(size=(400, 300)).astype(np.float32)
    labels = random.permutation(np.arange(400) % 4).astype(np.int32)
    found = sweep_probe(features, labels, classes=4, penalties=(1e-4,), holdout=0.25)
    assert found.accuracies[1e-4] < 0.4
    assert (predict_logits(found.probe, features).argmax(-1) == labels).mean() > 0.95


@pytest.mark.parametrize("holdout", [0.1, 0.2])
def test_every_class_gives_its_share(monkeypatch, holdout):
    from supcon_jax.evaluation import probe

    seen = []
    fit = probe._fit
    monkeypatch.setattr(probe, "_fit", lambda *a, **k: seen.append(a[1]) or fit(*a, **k))
    draw = partial(probe.sweep_probe, *TRAIN, classes=10, penalties=(1.0,), holdout=holdout)
    draw(seed=0), draw(seed=0), draw(seed=1)
    counts, left = np.bincount(TRAIN[1]), [np.bincount(labels) for labels in seen[::2]]
    assert abs(counts - left[0] - holdout * counts).max() <= 1
    assert len(seen[0]) == 1437 - round(holdout * 1437) and len(seen[1]) == 1437
    np.testing.assert_array_equal(seen[0], seen[2])
    assert (seen[0] != seen[4]).any()


def test_what_is_held_out_and_scored_can_be_given():
    (features, labels), (more, of_more) = TRAIN, TEST
    held, seen = np.arange(1797) >= 1437, []

    def wrong(predicted, ids):
        np.testing.assert_array_equal(ids, of_more)
        seen.append((predicted != ids).sum())
        return float(seen[-1])

    found = sweep_probe(
        np.concatenate([features, more]),
        np.concatenate([labels, of_more]),
        classes=10,
        penalties=(1.0, 1e-3),
        held=held,
        score=wrong,
    )
    assert found.accuracies == {1.0: seen[0], 1e-3: seen[1]}
    assert found.l2 == 1.0  # the one with more wrong
    alone = fit_probe(features, labels, classes=10, l2=1e-3)
    wrongs = (predict_logits(alone, more).argmax(-1) != of_more).sum()
    assert seen[1] == pytest.approx(wrongs, abs=1) and seen[0] > wrongs + 5


def test_of_equally_accurate_penalties_the_one_with_less_cross_entropy_is_taken():
    easy = TRAIN[1] < 2
    features, labels = TRAIN[0][easy], TRAIN[1][easy]
    found = sweep_probe(features, labels, classes=2, penalties=(1e-4, 1e-2, 1e-3))
    assert set(found.accuracies.values()) == {1.0} and found.l2 == 1e-4


@pytest.mark.parametrize("penalties", [(10.0, 0.1), (0.1, 1e-5), (0.1,)])
def test_a_choice_on_the_edge_is_seen(noisy, penalties):
    found = sweep_probe(*noisy, classes=10, penalties=penalties)
    assert found.l2 == 0.1 and found.on_edge


def test_the_usual_penalties_go_from_weak_to_strong():
    assert PENALTIES[0] == 1e-7 and PENALTIES[-1] == 10.0
    np.testing.assert_allclose(np.diff(np.log10(PENALTIES)), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(classes=9), "labels must be ids from 0 to 8; got 0 to 9"),
        (dict(labels=LABELS[:5]), "1437 rows of features and 5 labels"),
        (dict(features=np.float32(np.full((1437, 2), np.nan))), "features must be finite"),
        (dict(penalties=(0.0, 1.0)), "penalties must be above 0"),
        (dict(penalties=()), "penalties must be above 0, at least one; got"),
        (dict(holdout=0.0), "a share must leave images on both sides"),
        (dict(holdout=1.0), "a share must leave images on both sides"),
    ],
)
def test_bad_input_is_told(unchecked, change, message):
    arguments = dict(features=TRAIN[0], labels=TRAIN[1], classes=10) | change
    with pytest.raises(ValueError, match=message):
        sweep_probe(**arguments)


def test_bad_penalty_of_one_fit_is_told():
    with pytest.raises(ValueError, match=r"penalties must be above 0, at least one; got \[-1.0\]"):
        fit_probe(*TRAIN, classes=10, l2=-1.0)
