"""Separation of the classes and neural collapse, against loops and known cases."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from experiments.embedding.geometry import class_separation, neural_collapse


@pytest.fixture(scope="module")
def digits():
    """144 digits at length 1, classes of different sizes, float32."""
    pixels, labels = load_digits(return_X_y=True)
    features = (pixels - pixels.mean(0))[:144].astype(np.float32)
    assert len(np.unique(np.bincount(labels[:144]))) > 1
    return features / np.linalg.norm(features, axis=1, keepdims=True), labels[:144]


def simplex(classes, dim, seed=0):
    """Corners of a simplex equiangular tight frame, turned at random."""
    random = np.random.RandomState(seed)
    turn, _ = np.linalg.qr(random.normal(size=(dim, classes)))
    corners = np.eye(classes) - 1 / classes
    return np.sqrt(classes / (classes - 1)) * corners @ turn.T


def test_separation_is_the_mean_over_all_pairs(digits):
    features, labels = digits
    of = [np.float64(features[labels == c]) for c in range(10)]
    distances = np.array([[np.mean([1 - x @ y for x in a for y in b]) for b in of] for a in of])
    within = distances.diagonal().mean()
    between = distances[~np.eye(10, dtype=bool)].mean()
    found = class_separation(features, labels)
    np.testing.assert_allclose(found, (within, between, 1 - within / distances.mean()), rtol=1e-5)
    assert 0 < found.within < found.between


def test_separation_of_known_cases():
    corners = np.repeat(simplex(4, 6), 4, axis=0)
    labels = np.repeat(np.arange(4), 4)
    np.testing.assert_allclose(class_separation(corners, labels), (0, 4 / 3, 1), atol=1e-12)
    mixed = class_separation(corners, np.arange(16) % 4)  # the same images in every class
    np.testing.assert_allclose(mixed, (1, 1, 0), atol=1e-12)


def test_nc1_is_the_trace_of_the_covariances(digits):
    features, labels = np.float64(digits[0]), digits[1]
    of = [features[labels == c] for c in range(10)]
    means = np.array([x.mean(0) for x in of])
    within = np.mean([np.cov(x.T, ddof=0) for x in of], axis=0)
    between = sum(np.outer(m, m) for m in means - means.mean(0)) / 10
    expected = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 10
    assert neural_collapse(*digits).nc1 == pytest.approx(expected, rel=1e-5)


def test_nc2_is_the_mean_over_pairs_of_classes(digits):
    features, labels = digits
    means = np.array([np.float64(features[labels == c]).mean(0) for c in range(10)])
    centred = means - means.mean(0)
    lengths = [np.sqrt(m @ m) for m in centred]
    angles = [
        abs(centred[c] @ centred[d] / (lengths[c] * lengths[d]) + 1 / 9)
        for c in range(10)
        for d in range(10)
        if c != d
    ]
    found = neural_collapse(features, labels)
    assert found.equal_norms == pytest.approx(np.std(lengths) / np.mean(lengths), rel=1e-5)
    assert found.equal_angles == pytest.approx(np.mean(angles), rel=1e-5)


@pytest.mark.parametrize(("classes", "dim"), [(2, 5), (4, 4), (10, 64)])
def test_a_simplex_of_points_has_collapsed(classes, dim):
    labels = np.repeat(np.arange(classes), 6)
    points = 3 * simplex(classes, dim)[labels] + np.arange(dim)  # anywhere in space
    np.testing.assert_allclose(neural_collapse(points, labels), 0, atol=1e-9)


def test_collapse_does_not_depend_on_scale_turn_place_or_names(digits):
    features, labels = np.float64(digits[0]), digits[1]
    turn, _ = np.linalg.qr(np.random.RandomState(3).normal(size=(64, 64)))
    found = neural_collapse(features, labels)
    moved = neural_collapse(5 * features @ turn + 1, 7 * ((labels + 3) % 10))
    np.testing.assert_allclose(moved, found, rtol=1e-8)


def test_nc1_grows_with_the_square_of_the_spread():
    labels = np.repeat(np.arange(4), 2)
    spread = np.tile([[1.0], [-1.0]], (4, 1)) * np.array([0.2, 0.1, 0.0, 0.3, 0, 0])
    near = neural_collapse(simplex(4, 6)[labels] + spread, labels)
    far = neural_collapse(simplex(4, 6)[labels] + 2 * spread, labels)
    assert near.nc1 > 0
    assert far.nc1 == pytest.approx(4 * near.nc1)
    np.testing.assert_allclose(far[1:], 0, atol=1e-9)


def test_collapse_of_unequal_means():
    """Classes on a line, at -1, 0 and 4: norms 2, 1 and 3 about their mean."""
    line = np.array([-1.0, 0, 4]).repeat(2)[:, None] * np.array([[0.6, 0.8]])
    found = neural_collapse(line, np.repeat(np.arange(3), 2))
    assert found.equal_norms == pytest.approx(np.std([2, 1, 3]) / 2)
    assert found.equal_angles == pytest.approx((1.5 + 0.5 + 0.5) / 3)  # cosines 1, -1, -1
    assert found.nc1 == pytest.approx(0, abs=1e-12)


def test_bad_input_is_refused(digits):
    features, labels = digits
    with pytest.raises(ValueError, match="length 1"):
        class_separation(2 * features, labels)
    with pytest.raises(ValueError, match="all the same"):
        class_separation(np.ones((6, 4)) / 2, np.arange(6) % 2)
    with pytest.raises(ValueError, match="all the same"):
        neural_collapse(np.ones((6, 4)) / 2, np.arange(6) % 2)
    with pytest.raises(ValueError, match="two classes"):
        neural_collapse(features, np.zeros(144, int))
    with pytest.raises(ValueError, match="one label a feature"):
        neural_collapse(features, labels[:-1])
