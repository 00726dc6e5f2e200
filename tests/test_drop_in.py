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


@every_name
@pytest.mark.parametrize("dtype", [*DTYPES, "complex64"])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_shapes_and_dtypes(name, dtype, axis):
    with jax.enable_x64(dtype == "float64"):
        check_shapes_and_dtypes(*both(name), name, dtype, axis)


def described(tree):
    return jax.tree.map(lambda s: (s.shape, s.dtype), tree)


def check_shapes_and_dtypes(ours, theirs, name, dtype, axis):
    x = jax.ShapeDtypeStruct((2, 3, 4), dtype)
    inner = jnp.float32 if dtype == "int32" else dtype
    for options in _options(name):
        traced = {}
        if "b" in options:
            traced["b"] = jnp.asarray(options.pop("b")).astype(inner)
        if "where" in options:
            traced["where"] = jnp.asarray(options.pop("where"))

        def call(f, x, traced, axis=axis, options=options):
            return f(x, axis=axis, **traced, **options)

        with as_jax_nn_needs_it():
            wanted = jax.eval_shape(lambda *a: call(theirs, *a), x, traced)
        given = jax.eval_shape(lambda *a: call(ours, *a), x, traced)
        assert described(given) == described(wanted), (options, traced)


@every_name
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("x64")
def test_numbers(name, dtype, rng):
    """Where jax.nn is right, we agree: moderate numbers, a few roundings apart."""
    ours, theirs = both(name)
    x = jnp.asarray(rng.integers(-5, 5, (2, 3, 4))).astype(dtype)
    where = jnp.asarray(rng.random((2, 3, 4)) < 0.8)
    result = ours(x, axis=(0, 2), where=where)
    with as_jax_nn_needs_it():
        expected = theirs(x, axis=(0, 2), where=where)
    roundings = 8 * float(jnp.finfo(result.dtype).eps)
    np.testing.assert_allclose(
        np.asarray(result, np.float64),
        np.asarray(expected, np.float64),
        rtol=roundings,
        atol=roundings,
    )


@every_name
def test_complex_numbers(name, rng):
    ours, theirs = both(name)
    x = jnp.asarray(
        rng.normal(size=(2, 3)) + 1j * rng.normal(size=(2, 3)), jnp.complex64
    )
    where = jnp.array([True, False, True])
    np.testing.assert_array_equal(ours(x, axis=1), theirs(x, axis=1))
    np.testing.assert_array_equal(
        ours(x, axis=0, where=where), theirs(x, axis=0, where=where)
    )


@pytest.mark.parametrize("x", [[1.0, 2.0], (1, 2), np.float64(3), 2.5, True])
def test_whatever_jnp_makes_an_array_of(x):
    """Lists, numbers and NumPy's: a reduction over None takes scalars, and booleans."""
    for name in ("logsumexp", "logmeanexp"):
        ours, theirs = both(name)
        np.testing.assert_allclose(
            ours(jnp.asarray(x)), theirs(jnp.asarray(x)), rtol=1e-6
        )
        assert ours(x).dtype == jnp.float32


@every_name
def test_axes_are_a_matter_of_layout(name, rng):
    """Reducing other axes is reducing the last one of a transposed array."""
    ours, _ = both(name)
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    over_two = ours(x, axis=(0, 2))
    flat = ours(jnp.transpose(x, (1, 0, 2)).reshape(3, 8), axis=-1)
    if flat.ndim == 2:
        flat = jnp.transpose(flat.reshape(3, 2, 4), (1, 0, 2))
    np.testing.assert_allclose(over_two, flat, rtol=1e-6)


def test_empty_axis():
    x = jnp.zeros((2, 0, 3))
    assert jaxsoft.softmax(x, axis=1).shape == (2, 0, 3)
    assert jaxsoft.log_softmax(x, axis=1).shape == (2, 0, 3)
    _, tangent = jax.jvp(lambda x: jaxsoft.softmax(x, axis=1), (x,), (x,))
    assert tangent.shape == (2, 0, 3)
    for name in ("logsumexp", "logmeanexp"):
        np.testing.assert_array_equal(
            both(name)[0](x, axis=1), np.full((2, 3), -np.inf)
        )
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
