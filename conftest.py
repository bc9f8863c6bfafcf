"""Settings every test and doctest obeys; here at the root, so that doctests obey them too."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu or CUDA plugin is noisy
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tests.support.compilation import environment, is_left_out

os.environ.update(environment())  # which JAX reads when it is imported

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # a hit: 4 ms for 20

_LAWS = hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("laws", _LAWS)
hypothesis.settings.load_profile("laws")


def pytest_addoption(parser):
    parser.addoption(
        "--cases",
        type=int,
        help="of each test run at most so many cases, at least 2, the first, the last and some "
        "between; of the tests in tests/trace, where versions of JAX differ, all",
    )


def pytest_ignore_collect(collection_path, config):
    """Leaves out the files that `COMPILED` does not ask for."""
    leave = collection_path.is_file() and is_left_out(collection_path, config.rootpath)
    return True if leave else None  # None: others may still leave it out


def pytest_configure(config):
    """`-m quick` draws a few examples of each law, where the suite draws fifty."""
    if config.option.markexpr == "quick":
        hypothesis.settings.register_profile("quick", _LAWS, max_examples=5)
        hypothesis.settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks the first case of each law as `quick`; leaves out what `--cases` does not ask for."""
    most, cases = config.getoption("cases"), {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for first, *_ in cases.values():
        apart = {"slow", "whole", "compiler"} & {mark.name for mark in first.iter_markers()}
        if not apart and isinstance(first, pytest.Function):
            first.add_marker("quick")
    if most is None:
        return
    for test, of in cases.items():
        if len(of) > most and not test.startswith("tests/trace/"):
            kept = {round(k * (len(of) - 1) / max(most - 1, 1)) for k in range(most)}
            cases[test] = [item for k, item in enumerate(of) if k in kept]
    kept = {item for of in cases.values() for item in of}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


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
