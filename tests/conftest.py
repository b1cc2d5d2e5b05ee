"""Settings and fixtures of all tests."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Before jax starts: 8 simulated devices, on the CPU unless the environment names another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()

# `import reference` works in every pytest import mode, from every folder.
sys.path.insert(0, os.path.dirname(__file__))

# Most of the suite's time is compilation: compile quickly rather than well, and keep the programs.
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import jaxtyping
import pytest

from supcon_jax.parallel import make_mesh

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for the length of a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No run-time checks of annotations, for tests of what the functions refuse themselves."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def mesh_of() -> Callable[[int], jax.sharding.Mesh]:
    """`mesh_of(n)`: a mesh of the first n devices; skips the test where there are fewer."""

    def make(count: int) -> jax.sharding.Mesh:
        available = jax.devices()
        if len(available) < count:
            pytest.skip(f"needs {count} devices, there are {len(available)}")
        return make_mesh(available[:count])

    return make
