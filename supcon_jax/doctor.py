"""What is installed or missing, and whether the loss is right on every device.

    python -m supcon_jax.doctor

Needs the core installation only. The exit status is 1 where a device computes a wrong loss.
"""

import importlib.metadata
import platform
import re
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np

import supcon_jax
from supcon_jax.losses import supcon_loss
from supcon_jax.terminal import fail, parser

TOLERANCE = 1e-5  # of the loss and of the largest entry of its gradient


def versions() -> list[tuple[str, str]]:
    """Of Python, this package, and what it needs."""
    found = [("python", platform.python_version()), ("supcon_jax", supcon_jax.__version__)]
    names = ("jax", "jaxlib", *_required("train"))
    return found + [(name, _version(name)) for name in dict.fromkeys(names)]


def _required(extra: str) -> list[str]:
    """Packages of an extra, as the installed package says."""
    try:
        lines = importlib.metadata.requires("supcon-jax") or []
    except importlib.metadata.PackageNotFoundError:  # used from a folder, not installed
        return []
    of_extra = (line for line in lines if re.search(f"extra == ['\"]{extra}['\"]", line))
    return [match.group() for line in of_extra if (match := re.match(r"[\w.-]+", line))]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def reference(features: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """Eq. 2 by its letters, in float64: the loss of each sample, `[batch]`."""
    batch, views, dim = features.shape
    z = features.reshape(-1, dim).astype(np.float64)
    y = np.repeat(labels, views)
    losses = np.zeros(len(z))
    for i in range(len(z)):
        others = np.arange(len(z)) != i
        s = z @ z[i] / temperature
        positive = others & (y == y[i])
        losses[i] = np.mean(np.log(np.exp(s[others]).sum()) - s[positive])
    return losses.reshape(batch, views).mean(1)


def check(device: jax.Device) -> tuple[float, float]:
    """Largest relative error of loss and gradient on a device, and the seconds it took.

    The loss is compared with `reference`, its gradient with differences of that.
    """
    start = time.perf_counter()
    random = np.random.RandomState(0)
    features = random.normal(size=(16, 2, 8)).astype(np.float32)
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    labels, along = random.randint(0, 4, 16), random.normal(size=features.shape)
    z, y = (jax.device_put(x, device) for x in (features, labels))

    @jax.jit
    def loss_and_gradient(z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, pulled_back = jax.vjp(lambda z: supcon_loss(z, y, temperature=0.2), z)
        return losses, pulled_back(jax.numpy.full_like(losses, 1 / len(losses)))[0]

    losses, gradient = loss_and_gradient(z, y)
    slope = float(np.sum(np.asarray(gradient) * along))
    step = 1e-5
    ends = [reference(features + sign * step * along, labels, 0.2).mean() for sign in (1, -1)]
    expected, slope_expected = reference(features, labels, 0.2), (ends[0] - ends[1]) / (2 * step)
    errors = (
        np.abs(np.asarray(losses) / expected - 1).max(),
        abs(slope - slope_expected) / max(1.0, abs(slope_expected)),
    )
    return float(max(errors)), time.perf_counter() - start


def _devices(debug: bool) -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:  # the platform of JAX_PLATFORMS is not here
        fail(error, debug)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; it needs no more than the losses do."""
    debug = parser("doctor", __doc__).parse_args(arguments).debug
    found = versions()
    for name, version in found:
        print(f"{name:24} {version}")
    if any(version == "missing" for _, version in found):
        print('\nFor training: pip install "supcon-jax[train]"; the loss alone needs jax only.')
    wrong = False
    print()
    for device in _devices(debug):
        error, seconds = check(device)
        wrong |= not error < TOLERANCE
        said = f"loss {'right' if error < TOLERANCE else 'WRONG'}, error {error:.1e}"
        print(f"{device!s:24} {device.device_kind}: {said}, {seconds:.1f} s")
    if wrong:
        print("\na wrong loss: please report this with the lines above", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
