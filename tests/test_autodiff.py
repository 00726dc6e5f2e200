"""with_jvp for anybody's custom_vjp function, not only for those of this library."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from laws import quickly

import jaxsoft

# The derivatives of a test rule are products of a few float32 numbers.
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


# Under a rule that saves only its arguments, it must equal this in every derivative.
def reference(x, y):
    return jnp.sum(x) * y * jnp.sin(x)


@jaxsoft.with_jvp
@jax.custom_vjp
def product(x, y):
    return reference(x, y)


def _product_fwd(x, y):
    return reference(x, y), (x, y)


def _product_bwd(residuals, g):
    x, y = residuals
    dx = y * (jnp.sum(g * jnp.sin(x)) + jnp.sum(x) * g * jnp.cos(x))
    return dx, jnp.sum(x) * jnp.sum(g * jnp.sin(x))


product.defvjp(_product_fwd, _product_bwd)

X, Y = jnp.array([0.3, -1.2, 2.0]), jnp.float32(0.7)
TX, TY = jnp.array([1.0, 0.5, -2.0]), jnp.float32(-0.4)


def _gradient(f):
    return jax.grad(lambda x, y: jnp.sum(TX * f(x, y)), (0, 1))


DERIVATIVES = {
    "value": lambda f, x, y: f(x, y),
    "jvp": lambda f, x, y: jax.jvp(f, (x, y), (TX, TY)),
    "jvp in x": lambda f, x, y: jax.jvp(lambda x: f(x, y), (x,), (TX,)),
    "jvp in y": lambda f, x, y: jax.jvp(lambda y: f(x, y), (y,), (TY,)),
    "vjp": lambda f, x, y: jax.vjp(f, x, y)[1](TX),
    "linearize": lambda f, x, y: jax.linearize(f, x, y)[1](TX, TY),
    "jacfwd": lambda f, x, y: jax.jacfwd(f, (0, 1))(x, y),
    "jacrev": lambda f, x, y: jax.jacrev(f, (0, 1))(x, y),
    "hessian": lambda f, x, y: jax.hessian(f, (0, 1))(x, y),
    "reverse over reverse": lambda f, x, y: jax.jacrev(_gradient(f), (0, 1))(x, y),
    "reverse over forward": lambda f, x, y: jax.jacrev(jax.jacfwd(f))(x, y),
    "forward over forward": lambda f, x, y: jax.jacfwd(jax.jacfwd(f))(x, y),
    "third": lambda f, x, y: jax.jacfwd(jax.hessian(lambda y: jnp.sum(f(x, y))))(y),
}


def _all_derivatives(f, x, y):
    return {name: of(f, x, y) for name, of in DERIVATIVES.items()}


def test_derivatives_under_jit():
    expected, given, checkpointed = (
        quickly(functools.partial(_all_derivatives, f))(X, Y)
        for f in (reference, product, jax.checkpoint(product))
    )
    for name in DERIVATIVES:
        close(given[name], expected[name])
        close(checkpointed[name], expected[name])


@pytest.mark.parametrize("derivative", ["value", "jvp", "vjp", "linearize", "hessian"])
def test_derivatives_without_jit(derivative):
    of = DERIVATIVES[derivative]
    close(of(product, X, Y), jax.jit(functools.partial(of, reference))(X, Y))


def test_vmap():
    xs, ys = jnp.stack([X, 2 * X]), jnp.stack([Y, -Y])
    for axes in ((0, None), (None, 0)):
        args = [v if a == 0 else w for v, w, a in ((xs, X, axes[0]), (ys, Y, axes[1]))]
        given, expected = (
            quickly(jax.vmap(functools.partial(_all_derivatives, f), axes))(*args)
            for f in (product, reference)
        )
        close(given, expected)


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


@jaxsoft.with_jvp
@jax.custom_vjp
def on_trees(pair, options):
    return _on_trees(pair, options)


def _on_trees(pair, options):
    chosen = jnp.where(options["mask"], pair.left, pair.right)
    return {
        "power": chosen ** options["exponent"].astype(chosen.dtype),
        "sizes": (chosen.astype(jnp.int32), jnp.sum(chosen)),
        "positive": chosen > 0,
    }


def _on_trees_fwd(pair, options):
    return _on_trees(pair, options), (pair, options)


def _on_trees_bwd(residuals, cotangents):
    pair, options = residuals
    chosen = jnp.where(options["mask"], pair.left, pair.right)
    n = options["exponent"].astype(chosen.dtype)
    d = cotangents["power"] * n * chosen ** (n - 1) + cotangents["sizes"][1]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), options)
    mask = options["mask"]
    return Pair(jnp.where(mask, d, 0), jnp.where(mask, 0, d)), zeros


on_trees.defvjp(_on_trees_fwd, _on_trees_bwd)

PAIR = Pair(jnp.array([1.0, 2.0]), jnp.array([-3.0, 0.5]))
OPTIONS = {"mask": jnp.array([True, False]), "exponent": jnp.array(3)}


def _floats_of(out):
    return {"power": out["power"], "sum": out["sizes"][1]}


def test_trees_integers_and_booleans():
    """Arguments and results are pytrees with integer and boolean leaves."""
    out = on_trees(PAIR, OPTIONS)
    close(out, _on_trees(PAIR, OPTIONS))

    value, tangent = jax.jvp(lambda pair: on_trees(pair, OPTIONS), (PAIR,), (PAIR,))
    close(value, out)
    assert tangent["sizes"][0].dtype == jax.dtypes.float0
    assert tangent["positive"].dtype == jax.dtypes.float0
    expected = jax.jvp(
        lambda pair: _floats_of(_on_trees(pair, OPTIONS)), (PAIR,), (PAIR,)
    )[1]
    close(_floats_of(tangent), expected)

    for mode in (jax.jacfwd, jax.jacrev, lambda f: jax.jit(jax.jacfwd(jax.jacrev(f)))):
        given, wanted = (
            mode(lambda pair, f=f: _floats_of(f(pair, OPTIONS)))(PAIR)
            for f in (on_trees, _on_trees)
        )
        close(given, wanted)

    # Integers as primals of jax.jvp itself, with their tangents of dtype float0.
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jax.dtypes.float0), OPTIONS)
    _, tangent = jax.jvp(on_trees, (PAIR, OPTIONS), (PAIR, zeros))
    close(_floats_of(tangent), expected)


def test_integers_under_vmap():
    options = {
        "mask": jnp.array([[True, False], [False, True]]),
        "exponent": jnp.array([3, 2]),
    }

    def slope(f, options):
        return jax.jacfwd(lambda pair: _floats_of(f(pair, options)))(PAIR)

    given = quickly(jax.vmap(functools.partial(slope, on_trees)))(options)
    expected = jax.vmap(functools.partial(slope, _on_trees))(options)
    close(given, expected)


def test_only_integer_results_have_no_derivative():
    @jaxsoft.with_jvp
    @jax.custom_vjp
    def count(x):
        return jnp.sum(x > 0)

    count.defvjp(lambda x: (jnp.sum(x > 0), x), lambda x, _: (jnp.zeros_like(x),))
    value, tangent = jax.jvp(count, (X,), (TX,))
    assert value == 2
    assert tangent.dtype == jax.dtypes.float0


def power_of(position):
    """x ** n y, with the static n at any position."""

    def plain(*args):
        n, (x, y) = args[position], [a for i, a in enumerate(args) if i != position]
        return x**n * y

    def fwd(*args):
        return plain(*args), [a for i, a in enumerate(args) if i != position]

    def bwd(n, residuals, g):
        x, y = residuals
        return n * x ** (n - 1) * y * g, jnp.sum(x**n * g)

    rule = jax.custom_vjp(plain, nondiff_argnums=(position,))
    rule.defvjp(fwd, bwd)
    return jaxsoft.with_jvp(rule), plain


@pytest.mark.parametrize("position", [0, 1, 2])
def test_nondiff_argnums(position):
    f, plain = power_of(position)

    def with_static(f):
        def call(x, y):
            args = [x, y]
            args.insert(position, 3)
            return f(*args)

        return call

    for mode in (jax.jacfwd, jax.jacrev, jax.hessian):
        given, expected = (
            quickly(mode(with_static(g), (0, 1)))(X, Y) for g in (f, plain)
        )
        close(given, expected)


def test_the_rule_is_used_and_not_the_function():
    """A rule that disagrees with its function shows which one was differentiated."""

    @jaxsoft.with_jvp
    @jax.custom_vjp
    def clipped(x):
        return jnp.exp(x)

    clipped.defvjp(
        lambda x: (jnp.exp(x), jnp.exp(x)), lambda y, g: (jnp.minimum(y, 10) * g,)
    )
    x = jnp.array([0.0, 5.0])
    expected = jnp.array([1.0, 10.0])
    close(jax.jvp(clipped, (x,), (jnp.ones(2),))[1], expected)
    close(jax.vjp(clipped, x)[1](jnp.ones(2))[0], expected)


def test_an_argument_that_does_not_move_costs_nothing():
    """Its cotangent is not asked for: the rule's part for it leaves the program."""

    def dots(f):
        return str(jax.make_jaxpr(f)(jnp.ones((3, 3)), jnp.ones((3, 3)))).count("dot_")

    @jaxsoft.with_jvp
    @jax.custom_vjp
    def matmul(a, b):
        return a @ b

    matmul.defvjp(lambda a, b: (a @ b, (a, b)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    both = dots(lambda a, b: jax.jvp(matmul, (a, b), (a, b))[1])
    one = dots(lambda a, b: jax.jvp(lambda a: matmul(a, b), (a,), (a,))[1])
    assert one < both


def test_reverse_mode_saves_the_residuals_of_the_rule(capsys):
    big = jnp.ones(1000)
    print_saved_residuals(lambda x: jnp.sum(product(x, Y)), big)
    saved = [line for line in capsys.readouterr().out.splitlines() if "[1000]" in line]
    assert len(saved) == 1
    assert "from the argument" in saved[0]


def test_defvjp_before_wrapping_and_metadata():
    @jax.custom_vjp
    def f(x):
        """Doc."""
        return x

    f.defvjp(lambda x: (x, None), lambda _, g: (3 * g,))
    wrapped = jaxsoft.with_jvp(f)
    assert (wrapped.__name__, wrapped.__doc__) == ("f", "Doc.")
    assert jax.jvp(wrapped, (1.0,), (1.0,)) == (1.0, 3.0)


def test_keyword_arguments():
    def f(x, *, scale):
        return x * scale

    rule = jax.custom_vjp(lambda x, scale: f(x, scale=scale))
    rule.defvjp(lambda x, scale: (x * scale, scale), lambda scale, g: (g * scale, None))
    wrapped = jaxsoft.with_jvp(rule)
    assert wrapped(2.0, scale=3.0) == 6.0
    assert jax.grad(lambda x: wrapped(x, scale=3.0))(2.0) == 3.0
    assert jax.jvp(lambda x: wrapped(x=x, scale=3.0), (2.0,), (1.0,))[1] == 3.0
