"""Expected calibration error and reliability diagrams."""

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from supcon_jax.evaluation.calibration import (
    draw_reliability,
    expected_calibration_error,
    of_bins,
    reliability,
)

PIXELS, LABELS = load_digits(return_X_y=True)
MODEL = LogisticRegression(max_iter=30, C=0.05, tol=1e-2).fit(PIXELS[:900] / 16, LABELS[:900])
LOGITS = MODEL.decision_function(PIXELS[900:] / 16) * 3
TARGETS = LABELS[900:]


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def by_loops(probabilities, labels, bins):
    """The definition, one example at a time."""
    total = 0.0
    for b in range(bins):
        lower, upper = b / bins, (b + 1) / bins
        inside = [
            (max(row), int(row.argmax() == label))
            for row, label in zip(probabilities, labels, strict=True)
            if lower < max(row) <= upper
        ]
        if inside:
            confidence, correct = zip(*inside, strict=True)
            total += abs(sum(correct) - sum(confidence)) / len(labels)
    return total


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 100])
def test_equals_the_definition(bins):
    probabilities = softmax(LOGITS)
    expected = by_loops(probabilities, TARGETS, bins)
    assert expected > 0.003
    actual = expected_calibration_error(LOGITS, TARGETS, bins=bins)
    np.testing.assert_allclose(actual, expected, rtol=1e-9)
    of_probabilities = expected_calibration_error(
        probabilities, TARGETS, bins=bins, kind="probabilities"
    )
    np.testing.assert_allclose(of_probabilities, expected, rtol=1e-9)


def test_15_bins_by_default():
    assert len(reliability(LOGITS, TARGETS).examples) == 15
    expected = by_loops(softmax(LOGITS), TARGETS, 15)
    np.testing.assert_allclose(expected_calibration_error(LOGITS, TARGETS), expected, rtol=1e-9)


def test_bins_have_their_upper_edge():
    confidence = np.array([0.5, 0.6, 0.6000001, 0.8, 1.0])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    found = reliability(probabilities, np.array([0, 0, 1, 0, 0]), bins=5, kind="probabilities")
    np.testing.assert_array_equal(found.examples, [0, 0, 2, 2, 1])
    np.testing.assert_allclose(found.confidence[2:], [0.55, 0.70000005, 1.0])
    np.testing.assert_array_equal(found.accuracy[2:], [1.0, 0.5, 1.0])
    assert np.isnan(found.accuracy[:2]).all() and np.isnan(found.confidence[:2]).all()


def test_calibrated_data_has_almost_none():
    """Labels drawn from the probabilities themselves."""
    random = np.random.RandomState(0)
    probabilities = softmax(random.normal(size=(40_000, 5)) * 2)
    draws = random.random_sample((len(probabilities), 1))
    labels = (draws > probabilities.cumsum(axis=1)[:, :-1]).sum(axis=1)
    found = reliability(probabilities, labels, kind="probabilities")
    assert of_bins(found) < 0.01
    often = found.examples > 500
    assert often.sum() > 8
    np.testing.assert_allclose(found.accuracy[often], found.confidence[often], atol=0.05)
    sharper = expected_calibration_error(3 * np.log(probabilities), labels)
    assert sharper > 0.1


@pytest.mark.parametrize(("confidence", "right"), [(0.95, 60), (0.7, 60), (0.65, 90)])
def test_a_constant_confidence_errs_by_its_distance_from_accuracy(confidence, right):
    probabilities = np.tile([confidence, 1 - confidence], (100, 1))
    labels = np.array([0] * right + [1] * (100 - right))
    actual = expected_calibration_error(probabilities, labels, kind="probabilities")
    np.testing.assert_allclose(actual, abs(confidence - right / 100), rtol=1e-9)


def test_a_shift_of_the_logits_changes_nothing():
    shifted = LOGITS + np.linspace(-500, 500, len(LOGITS))[:, None]
    np.testing.assert_allclose(
        expected_calibration_error(shifted, TARGETS),
        expected_calibration_error(LOGITS, TARGETS),
        rtol=1e-6,
    )
    single = expected_calibration_error(LOGITS.astype(np.float32), TARGETS)
    np.testing.assert_allclose(single, expected_calibration_error(LOGITS, TARGETS), atol=2e-3)


def test_reliability_has_every_example_once():
    found = reliability(LOGITS, TARGETS)
    probabilities = softmax(LOGITS)
    assert found.examples.sum() == len(TARGETS)
    correct = (probabilities.argmax(axis=1) == TARGETS).sum()
    np.testing.assert_allclose(np.nansum(found.accuracy * found.examples), correct)
    confidence = probabilities.max(axis=1).sum()
    np.testing.assert_allclose(np.nansum(found.confidence * found.examples), confidence)
    edges = np.arange(16) / 15
    there = found.examples > 0
    assert (found.confidence[there] > edges[:-1][there]).all()
    assert (found.confidence[there] <= edges[1:][there]).all()


def test_draws_every_curve(tmp_path):
    one = {"severity 1": reliability(LOGITS, TARGETS)}
    two = {**one, "severity 5": reliability(LOGITS * 5, TARGETS)}
    first = draw_reliability(one, tmp_path / "new" / "one.png")
    second = draw_reliability(two, tmp_path / "two.png")
    assert first == tmp_path / "new" / "one.png"
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in (first, second)]
    assert pictures[0].shape == pictures[1].shape
    orange = (np.abs(picture.astype(int) - (255, 127, 14)).sum(-1) < 30 for picture in pictures)
    assert [bool(found.sum() > 100) for found in orange] == [False, True]


def test_the_legend_states_bins_and_errors(tmp_path):
    curves = {"model": reliability(LOGITS, TARGETS)}
    own = expected_calibration_error(LOGITS, TARGETS)
    assert own < 0.9
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        texts = [
            draw_reliability(curves, tmp_path / "one.svg", errors=errors).read_text()
            for errors in (None, {"model": 0.9})
        ]
    for text, error in zip(texts, (own, 0.9), strict=True):
        assert f"model (ECE {error:.3f}, 15 bins)" in text


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("outputs", "labels", "options", "message"),
    [
        (LOGITS[:0], TARGETS[:0], {}, "at least 1 bin"),
        (LOGITS[:5], TARGETS[:4], {}, "labels .4."),
        (LOGITS[0], TARGETS[:10], {}, "outputs .10."),
        (LOGITS, TARGETS, {"bins": 0}, "bins 0"),
        (LOGITS[:, :5], TARGETS, {}, "labels are 0 to 9, expected 0 to 4"),
        (LOGITS, TARGETS - 1, {}, "labels are -1 to 8"),
        (np.where(LOGITS > 9, np.nan, LOGITS), TARGETS, {}, "not finite"),
        (LOGITS, TARGETS, {"kind": "probabilities"}, "sum to 1"),
        (softmax(LOGITS) * 2, TARGETS, {"kind": "probabilities"}, "sum to 1"),
        (LOGITS, TARGETS, {"kind": "scores"}, "'logits' or 'probabilities'"),
    ],
)
def test_bad_input_gets_one_line(outputs, labels, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        expected_calibration_error(outputs, labels, **options)
    assert "\n" not in str(raised.value)
