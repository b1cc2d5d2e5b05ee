"""The self-test: what it says, and that it notices a wrong loss."""

import jax
import numpy as np
import pytest
from reference import supcon

from supcon_jax import doctor


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    """Each device compiles its own programs."""
    devices = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: devices)


def test_its_reference_is_that_of_the_tests():
    random = np.random.RandomState(1)
    features = random.normal(size=(6, 2, 3))
    labels = np.array([0, 1, 0, 2, 1, 0])
    expected, _ = supcon(features, labels, temperature=0.3)
    np.testing.assert_allclose(doctor.reference(features, labels, 0.3), expected, rtol=1e-12)


def test_it_names_versions_and_devices(capsys):
    doctor.main([])
    said = capsys.readouterr().out
    for name in ("python", "supcon_jax", "jax", "flax", "optax", "orbax-checkpoint"):
        assert f"\n{name} " in f"\n{said}"
    assert said.count("loss right") == len(jax.devices())
    assert max(map(len, said.splitlines())) <= 80


def test_what_is_missing_is_said(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_required", lambda extra: ["flax", "not-there"])
    doctor.main([])
    said = capsys.readouterr().out
    assert "not-there                missing" in said
    assert 'pip install "supcon-jax[train]"' in said


@pytest.mark.parametrize("wrong", [lambda x: 1.001 * x, lambda x: jax.lax.stop_gradient(x)])
def test_a_wrong_loss_or_gradient_is_noticed(monkeypatch, capsys, wrong):
    right = doctor.supcon_loss
    monkeypatch.setattr(doctor, "supcon_loss", lambda *a, **k: wrong(right(*a, **k)))
    with pytest.raises(SystemExit) as stopped:
        doctor.main([])
    assert stopped.value.code == 1
    assert "WRONG" in capsys.readouterr().out
