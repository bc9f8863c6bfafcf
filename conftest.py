"""Settings every test and doctest obeys; here at the root, so that doctests obey them too."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu or CUDA plugin is noisy
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

hypothesis.settings.register_profile(
    "laws", max_examples=50, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("laws")


@pytest.fixture(autouse=True)
def names_of_the_docs(doctest_namespace):
    """Doctests and README's code start with the imports a reader would have."""
    import jax.numpy as jnp
    import optax

    import unitscale_jax as us

    doctest_namespace.update(us=us, jax=jax, jnp=jnp, optax=optax)


@pytest.fixture
def relaxed_promotion():
    """Standard dtype promotion, which optax's Adam family needs (it computes float ** int32)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
