"""jaxsoft in the place of jax.nn: the same calls, shapes, dtypes, and numbers."""

import contextlib
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoft

NAMES = ("logsumexp", "logmeanexp", "softmax", "log_softmax")
DTYPES = ("bfloat16", "float16", "float32", "float64", "int32")
AXES = (0, -1, 2, (0, 2), (-1, 0, 1), (), None)

every_name = pytest.mark.parametrize("name", NAMES)


def both(name):
    return getattr(jaxsoft, name), getattr(jax.nn, name)


@every_name
def test_the_signature_of_jax_nn_is_a_prefix_of_ours(name):
    ours, theirs = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in both(name)
    )
    assert ours[: len(theirs)] == theirs
    for _, kind, default in ours[len(theirs) :]:
        assert kind is inspect.Parameter.KEYWORD_ONLY
        assert default is not inspect.Parameter.empty


@contextlib.contextmanager
def as_jax_nn_needs_it():
    """jax.nn itself promotes dtypes and ranks, and casts -inf to integers."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        np.errstate(invalid="ignore"),
    ):
        yield


def _options(name):
    """Calls beside dtype and axis: masks of every rank, weights, signs, kept axes."""
    yield {}
    for where in (np.ones((2, 3, 4), bool), np.arange(4) > 1, np.array(True)):
        yield {"where": where}
    if name in ("logsumexp", "logmeanexp"):
        yield {"keepdims": True}
        yield {"keepdims": True, "where": np.arange(4) > 1}
    if name == "logsumexp":
        for keepdims, return_sign in itertools.product((False, True), repeat=2):
            options = {"keepdims": keepdims, "return_sign": return_sign}
            yield {**options, "b": np.linspace(-1, 1, 24).reshape(2, 3, 4)}
            yield {**options, "where": np.arange(4) > 1}
        yield {"b": np.ones((5, 1, 3, 1))}


def described(tree):
    return jax.tree.map(lambda s: (s.shape, s.dtype), tree)


@every_name
def test_shapes_and_dtypes(name):
    """Over all axes in float32, and over two in the other dtypes."""
    cases = [("float32", axis) for axis in AXES]
    cases += [(dtype, (0, 2)) for dtype in (*DTYPES, "complex64")]
    for (dtype, axis), options in itertools.product(cases, _options(name)):
        with jax.enable_x64(dtype == "float64"):
            check_shapes_and_dtypes(name, dtype, axis, options)


def check_shapes_and_dtypes(name, dtype, axis, options):
    x = jax.ShapeDtypeStruct((2, 3, 4), dtype)
    inner = jnp.float32 if dtype == "int32" else dtype
    arrays = {n: jnp.asarray(v) for n, v in options.items() if n in ("b", "where")}
    if "b" in arrays:
        arrays["b"] = arrays["b"].astype(inner)
    flags = {n: v for n, v in options.items() if n not in arrays}

    def shapes(f):
        return described(
            jax.eval_shape(
                lambda x, arrays: f(x, axis=axis, **arrays, **flags), x, arrays
            )
        )

    ours, theirs = both(name)
    with as_jax_nn_needs_it():
        wanted = shapes(theirs)
    assert shapes(ours) == wanted, (name, dtype, axis, options)


@every_name
@pytest.mark.usefixtures("x64")
def test_numbers(name, rng):
    """Where jax.nn is right, we agree: moderate numbers, a few roundings apart."""
    ours, theirs = both(name)
    integers = jnp.asarray(rng.integers(-5, 5, (2, 3, 4)))
    where = jnp.asarray(rng.random((2, 3, 4)) < 0.8)
    for dtype in DTYPES:
        x = integers.astype(dtype)
        result = ours(x, axis=(0, 2), where=where)
        with as_jax_nn_needs_it():
            expected = theirs(x, axis=(0, 2), where=where)
        roundings = 8 * float(jnp.finfo(result.dtype).eps)
        result, expected = (np.asarray(v, np.float64) for v in (result, expected))
        np.testing.assert_allclose(
            result, expected, roundings, roundings, err_msg=f"{name}, {dtype}"
        )


@every_name
def test_complex_numbers(name, rng):
    ours, theirs = both(name)
    real, imaginary = rng.normal(size=(2, 2, 3))
    x = jnp.asarray(real + 1j * imaginary, jnp.complex64)
    where = jnp.array([True, False, True])
    for options in ({"axis": 1}, {"axis": 0, "where": where}):
        np.testing.assert_array_equal(ours(x, **options), theirs(x, **options))


@pytest.mark.parametrize("x", [[1.0, 2.0], (1, 2), np.float64(3), 2.5, True])
def test_whatever_jnp_makes_an_array_of(x):
    """Lists, numbers and NumPy's: a reduction over None takes scalars, and booleans."""
    for name in ("logsumexp", "logmeanexp"):
        ours, theirs = both(name)
        assert ours(x).dtype == jnp.float32
        np.testing.assert_allclose(ours(x), theirs(jnp.asarray(x)), rtol=1e-6)


def test_empty_axis():
    x = jnp.zeros((2, 0, 3))
    assert jaxsoft.softmax(x, axis=1).shape == (2, 0, 3)
    assert jaxsoft.log_softmax(x, axis=1).shape == (2, 0, 3)
    _, tangent = jax.jvp(lambda x: jaxsoft.softmax(x, axis=1), (x,), (x,))
    assert tangent.shape == (2, 0, 3)
    for name in ("logsumexp", "logmeanexp"):
        nothing = both(name)[0](x, axis=1)
        np.testing.assert_array_equal(nothing, np.full((2, 3), -np.inf))
    np.testing.assert_array_equal(jaxsoft.entropy(x, axis=1), np.zeros((2, 3)))
    # No label is a class of none, but an ignored one.
    losses = jaxsoft.cross_entropy(x, jnp.full((2, 3), -100), axis=1)
    np.testing.assert_array_equal(losses, np.zeros((2, 3)))
    losses = jaxsoft.cross_entropy(x, jnp.zeros((2, 3), int), axis=1)
    assert np.all(np.isnan(losses))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_a_weight_that_is_a_number_keeps_the_dtype(dtype):
    a = jnp.array([1.0, 2.0], dtype)
    for b in (2.0, 2):
        ours = jaxsoft.logsumexp(a, b=b)
        assert ours.dtype == jax.nn.logsumexp(a, b=b).dtype == dtype
