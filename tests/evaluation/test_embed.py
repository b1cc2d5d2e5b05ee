"""Embedding of whole splits on 1 and 8 devices, and the scores made of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from supcon_jax import parallel, steps
from supcon_jax.data import policies
from supcon_jax.data.sources import Source
from supcon_jax.evaluation.embed import Embedded, embed, knn_accuracy, top_k_accuracy
from supcon_jax.models import DEPTHS, Classifier, Model, ResNet
from supcon_jax.state import TrainState, create_state

PIXELS, LABELS = load_digits(return_X_y=True)
IMAGES = np.round(PIXELS * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
LABELS = LABELS.astype(np.int32)


def digits(size):
    names = tuple("0123456789")
    return Source(
        "digits", size, names, (8, 8, 1), lambda i: (IMAGES[i], LABELS[i]), lambda: LABELS
    )


def state_of(scale):
    nothing = dict(params={}, frozen={}, batch_stats={}, opt_state=optax.EmptyState())
    state = TrainState(step=jnp.zeros((), jnp.int32), key=jax.random.key(0), **nothing)
    return state.replace(params={"scale": jnp.float32(scale)})


def pixels_and_sums(state, batch, sizes):
    """A step that is easy to follow; it notes how many images each device gets."""
    sizes.append(batch["image"].shape[0])
    flat = state.params["scale"] * batch["image"].reshape(len(batch["image"]), -1)
    return {"features": flat, "outputs": flat.reshape(-1, 8, 8).sum(2)}


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    ("size", "batch_size"), [(1, 10), (9, 10), (10, 10), (11, 10), (50, 16), (64, 16), (33, 64)]
)
def test_every_image_is_embedded_once_in_order(mesh_of, devices, size, batch_size):
    mesh, sizes = mesh_of(devices), []
    step = parallel.data_parallel_eval(partial(pixels_and_sums, sizes=sizes), mesh)
    state = parallel.replicate(state_of(3.0), mesh)
    found = embed(step, state, digits(size), batch_size=batch_size, mesh=mesh)
    expected = 3.0 * IMAGES[:size].reshape(size, 64)
    np.testing.assert_array_equal(found.features, expected)
    np.testing.assert_array_equal(found.outputs, expected.reshape(size, 8, 8).sum(2))
    np.testing.assert_array_equal(found.labels, LABELS[:size])
    assert set(sizes) == {-(-batch_size // devices)}


def test_features_that_are_not_finite_are_refused(mesh_of):
    mesh = mesh_of(1)
    step = parallel.data_parallel_eval(partial(pixels_and_sums, sizes=[]), mesh)
    state = parallel.replicate(state_of(jnp.inf), mesh)
    with pytest.raises(FloatingPointError, match="features of 9 of the 9 images of digits are not"):
        embed(step, state, digits(9), batch_size=4, mesh=mesh)


def test_embedding_can_be_repeated(mesh_of):
    """The state is not donated."""
    mesh = mesh_of(8)
    step = parallel.data_parallel_eval(partial(pixels_and_sums, sizes=[]), mesh)
    state = parallel.replicate(state_of(2.0), mesh)
    first, second = (embed(step, state, digits(20), batch_size=8, mesh=mesh) for _ in range(2))
    np.testing.assert_array_equal(first.features, second.features)


@pytest.mark.parametrize("devices", [1, 8])
def test_embedding_of_a_network_is_that_of_each_image_alone(mesh_of, monkeypatch, devices):
    monkeypatch.setitem(DEPTHS, 1, ((1, 1), False))
    mesh = mesh_of(devices)
    model = Model(ResNet(1, width=0.25, stem="cifar"), Classifier(10))
    quick = jax.random.key(0, impl="unsafe_rbg")  # to compile
    state = create_state(model, optax.sgd(0.1), quick, (8, 8, 1))
    preprocess = partial(policies.center_crop, size=8, mean=(0.3,), std=(0.4,))
    step = partial(steps.eval_step, model=model, preprocess=preprocess)
    mapped = parallel.data_parallel_eval(step, mesh)
    found = embed(mapped, parallel.replicate(state, mesh), digits(21), batch_size=8, mesh=mesh)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    normalized = jnp.asarray((IMAGES[:21] / 255 - 0.3) / 0.4, jnp.float32)
    features, outputs = jax.jit(partial(model.apply, train=False))(variables, normalized)
    np.testing.assert_allclose(found.features, features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.outputs, outputs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def classified():
    """Digits with the logits of a weak classifier: it has seen forty of them."""
    model = LogisticRegression(max_iter=1000).fit(PIXELS[:40], LABELS[:40])
    features = np.float32(PIXELS[40:400])
    return Embedded(features, np.float32(model.decision_function(features)), LABELS[40:400])


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_accuracy_equals_scikit_learn(classified, k):
    expected = top_k_accuracy_score(classified.labels, classified.outputs, k=k)
    assert 0.5 < expected < 1
    assert top_k_accuracy(classified, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [10, 11, 1000])
def test_top_k_accuracy_of_all_classes_is_one(classified, k):
    assert top_k_accuracy(classified, k) == 1.0


def test_knn_accuracy_equals_scikit_learn(classified):
    references = Embedded(np.float32(PIXELS[400:]), np.zeros((1397, 1), np.float32), LABELS[400:])
    model = KNeighborsClassifier(
        10, metric="cosine", algorithm="brute", weights=lambda distances: np.exp(-distances / 0.2)
    )
    expected = model.fit(PIXELS[400:], LABELS[400:]).score(PIXELS[40:400], LABELS[40:400])
    actual = knn_accuracy(classified, references, neighbours=10, temperature=0.2)
    assert actual == pytest.approx(expected, abs=1e-12) and expected < 1
