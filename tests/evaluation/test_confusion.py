"""Confusion matrices, accuracies of classes, and their picture, of a weak classifier of digits."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as by_scikit_learn

from supcon_jax.evaluation.confusion import (
    Confused,
    confusion_matrix,
    draw_confusion,
    most_confused,
    per_class_accuracy,
)

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def classified():
    pixels, labels = load_digits(return_X_y=True)
    model = LogisticRegression(max_iter=1000).fit(pixels[:40], labels[:40])
    return model.predict(pixels[40:]), labels[40:]


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_matrix_equals_scikit_learn(classified, kind):
    predicted, labels = (ids.astype(kind) for ids in classified)
    actual = confusion_matrix(predicted, labels, 12)
    np.testing.assert_array_equal(actual, by_scikit_learn(labels, predicted, labels=range(12)))
    assert actual.sum() == 1757 and not np.array_equal(actual, actual.T)


def test_accuracies_of_classes(classified):
    predicted, labels = classified
    actual = per_class_accuracy(predicted, labels, 12)
    expected = [(predicted[labels == c] == c).mean() for c in range(10)]
    np.testing.assert_allclose(actual[:10], expected, rtol=1e-12)
    assert np.isnan(actual[10:]).all() and np.ptp(actual[:10]) > 0.1
    balanced = balanced_accuracy_score(labels, predicted)
    assert np.nanmean(actual) == pytest.approx(balanced, rel=1e-12)


@pytest.mark.parametrize("bad", [-1, 10])
def test_ids_out_of_range_are_told(classified, bad):
    predicted, labels = classified
    wrong = np.where(np.arange(len(labels)) == 5, bad, labels)
    with pytest.raises(ValueError, match=f"labels must be ids from 0 to 9; got {bad}"):
        confusion_matrix(predicted, wrong, 10)
    with pytest.raises(ValueError, match=f"predicted must be ids from 0 to 9; got {bad}"):
        per_class_accuracy(wrong, labels, 10)


def test_different_numbers_are_told(unchecked, classified):
    with pytest.raises(ValueError, match="got 1756 for 1757 labels"):
        confusion_matrix(classified[0][1:], classified[1], 10)


def test_most_confused_pairs_are_those_of_the_largest_shares():
    matrix = np.array([[90, 5, 5, 0], [0, 8, 2, 0], [1, 0, 3, 0], [0, 0, 0, 0]])
    expected = [Confused(2, 0, 1, 0.25), Confused(1, 2, 2, 0.2), Confused(0, 1, 5, 0.05),
                Confused(0, 2, 5, 0.05)]  # fmt: skip
    assert most_confused(matrix, 10) == expected
    assert most_confused(matrix, 2) == expected[:2]
    assert most_confused(np.diag([3, 0, 4]), 5) == []


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, save = [], Figure.savefig

    def kept(figure, *args, **options):
        drawn.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    return drawn


def texts_of(axis):
    return {text.get_text() for text in axis.texts}


def test_picture_of_few_classes_has_shares_in_its_cells(classified, figures, tmp_path):
    matrix = confusion_matrix(*classified, 10)
    path = draw_confusion(matrix, NAMES, tmp_path / "confusion.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 600
    axis, *_ = figures[0].axes
    image = axis.get_images()[0].get_array()
    np.testing.assert_allclose(image.sum(axis=1), 1)
    np.testing.assert_allclose(np.diag(image), per_class_accuracy(*classified, 10))
    assert len(axis.texts) == (matrix > 0).sum()
    shown = {text.get_position(): text.get_text() for text in axis.texts}
    assert shown[(4, 4)] == f"{100 * image[4, 4]:.0f}"
    row, column = np.argwhere(matrix * (1 - np.eye(10)) >= 5)[0]
    assert shown[(column, row)] == f"{100 * image[row, column]:.0f}"
    assert [label.get_text() for label in axis.get_yticklabels()] == list(NAMES)
    assert axis.get_ylabel() == "label" and axis.get_xlabel() == "predicted"


def test_picture_of_many_classes_lists_the_most_confused(figures, tmp_path):
    random = np.random.RandomState(0)
    matrix = 100 * np.eye(100, dtype=int) + (random.random_sample((100, 100)) < 0.02)
    matrix[17, 60] = 40
    names = [f"class $ {i}" for i in range(100)]
    path = draw_confusion(matrix, names, tmp_path / "confusion.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 1000
    drawn, listed, *_ = figures[0].axes
    assert not drawn.texts and len(listed.texts) == 25
    assert drawn.get_images()[0].norm(0.01) == pytest.approx(0.1)  # rare confusions can be seen
    pair = most_confused(matrix, 1)[0]
    assert listed.texts[0].get_text().endswith(f"{pair.share:.0%}  class $ 17 as class $ 60")
    assert [label.get_text() for label in drawn.get_xticklabels()] == names


def test_names_of_a_thousand_classes_are_left_out(figures, tmp_path):
    names = [f"class {i}" for i in range(300)]
    draw_confusion(np.eye(300, dtype=int), names, tmp_path / "confusion.png")
    shown = {label.get_text() for label in figures[0].axes[0].get_yticklabels()}
    assert not shown & set(names) and not figures[0].axes[1].texts


def test_pictures_leave_the_figures_of_a_notebook_alone(classified, tmp_path):
    before = matplotlib.get_backend()
    plt.switch_backend("svg")
    try:
        draw_confusion(confusion_matrix(*classified, 10), NAMES, tmp_path / "confusion.png")
        assert not plt.get_fignums() and matplotlib.get_backend() == "svg"
    finally:
        plt.switch_backend(before)


def test_another_number_of_names_is_told(tmp_path):
    with pytest.raises(ValueError, match="3 classes need as many names; got 2"):
        draw_confusion(np.eye(3, dtype=int), ("a", "b"), tmp_path / "confusion.png")
