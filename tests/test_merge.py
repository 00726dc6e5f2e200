"""The merge: any tree of merges has the summary of the whole, and every form of a pass
has the values of the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_within

from jaxsoft._core.logits import Logits, shifted
from jaxsoft._core.mesh import Axes
from jaxsoft._passes import classes, forms
from jaxsoft._passes.divergence import (
    Rows,
    _divergence_push,
    divergence,
    divergence_pull,
)
from jaxsoft._passes.entropy import entropy, entropy_pull
from jaxsoft._passes.merge import Summary, merge, quotient
from jaxsoft._passes.summary import Riders, summarize

AXES = Axes((1,))
INF = np.inf


def direct(z, t, q, v, label):
    """The summary by the formulas, in float64; of the tied maxima the first."""
    top = int(np.argmax(z))
    m = z[top]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        gap = np.where(z == m, 0, z - m)
        d = np.where(gap == 0, 0, gap / t)
        e = np.exp(d)
        e_d = np.sum(np.where(e == 0, 0, e * np.where(e == 0, 0, d)))
        below = np.sum(np.where(q == 0, 0, q * gap))
    others = np.arange(len(z)) != top
    return Summary(
        m=m,
        s=np.sum(e[others]),
        e_d=e_d,
        logit=z[label],
        total=(np.sum(q),),
        below=(below,),
        value=v[top],
        deviation=np.sum(e * (v - v[top])),
        others=np.sum(v[others]),
    )


def rows_of(rng, classes: int) -> np.ndarray:
    """Rows with ties, infinities, masked classes and large logits."""
    z = rng.normal(size=classes) * rng.choice([1, 30, 1e3, 1e37])
    kind = rng.integers(0, 5, classes)
    z = np.where(kind == 0, np.round(z), z)
    z[kind == 1] = rng.choice([-INF, z[0]])
    if rng.random() < 0.2:
        z[rng.integers(0, classes, 2)] = INF
    return z


@functools.partial(jax.jit, static_argnames="shift")
def merged_pair(a, b, shift):
    return merge(a, b, shift)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shift", [quotient, shifted], ids=["reduced", "scanned"])
def test_any_tree_of_merges_is_the_whole(shift, rng):
    for case in range(60):
        size = int(rng.integers(1, 9))
        z, q = rows_of(rng, size), rng.choice([0, 0.3, 1], size)
        v, t = rng.normal(size=size), rng.choice([0, 0.5, 1, 3])
        label = int(rng.integers(size))
        numbers = [
            jax.tree.map(
                jnp.asarray,
                Summary(
                    m=z[i],
                    s=0.0,
                    temperature=float(t),
                    e_d=0.0,
                    logit=z[i] if i == label else 0.0,
                    total=(q[i],),
                    below=(0.0,),
                    value=v[i],
                    deviation=0.0,
                    others=0.0,
                ),
            )
            for i in range(size)
        ]
        while len(numbers) > 1:  # two neighbours, anywhere
            i = int(rng.integers(len(numbers) - 1))
            numbers[i : i + 2] = [merged_pair(*numbers[i : i + 2], shift)]
        given = numbers[0]._replace(temperature=None)
        wanted = direct(z, t, q, v, label)
        if np.all(np.isneginf(z)):
            given, wanted = given._replace(s=0), wanted._replace(s=0)
        for name in Summary._fields:
            for a, w in zip(
                jax.tree.leaves(getattr(given, name)),
                jax.tree.leaves(getattr(wanted, name)),
                strict=True,
            ):
                size_of_terms = 1 if np.isinf(w) else np.abs(w) + np.sum(np.abs(v))
                what = f"case {case}, {name} of z = {z}, t = {t}"
                assert_within(a, w, 1e-12 * size_of_terms, what)


FORMS_OF_REDUCTIONS = ("plain", "merged", "in_block")


def every_pass(logits, g, q, labels):
    riders = Riders(labels=labels, coefficients=(q,), with_e_d=True)
    summary = summarize(AXES, logits, riders)
    weighted = summarize(AXES, logits, Riders(weights=q))
    # Of no row but the last are logits NaN.
    prediction = jnp.roll(logits.x, 1, 0).at[0].set(0)
    rows = Rows(logits, prediction)
    of_rows, of_row = divergence(AXES, rows), entropy(AXES, logits)
    return {
        "entropy": of_row,
        "entropy_pull": entropy_pull(AXES, logits, of_row, g[:, :1]),
        "divergence": of_rows,
        "divergence_pull": divergence_pull(AXES, rows, of_rows, g[:, :1]),
        "divergence_push": _divergence_push(
            AXES,
            (rows, of_rows),
            (g, 2 * g, None if logits.temperature is None else g[:, :1]),
        ),
        "summary": summary,
        "sum with weights": weighted.weight + weighted.s,
        "softmax": classes.softmax(AXES, logits),
        "log_softmax": classes.log_softmax(AXES, logits),
        "softmax_pull": classes.softmax_pull(AXES, logits, g),
        "log_softmax_pull": classes.log_softmax_pull(AXES, logits, g),
        "log_softmax_push": classes._log_softmax_push(AXES, logits, g),
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("with_temperature", [False, True])
@pytest.mark.parametrize("form", FORMS_OF_REDUCTIONS[1:])
def test_the_forms_agree(form, with_temperature, rng):
    """In float64, on rows with ties, infinities and masks, and a row of NaN whose
    cotangent is 0."""
    rows, size = 64, 6
    x = np.stack([rows_of(rng, size) for _ in range(rows)])
    x = np.where(np.abs(x) > 1e36, np.sign(x) * np.minimum(np.abs(x), 1e36), x)
    x[rng.random(x.shape) < 0.03] = INF
    where = rng.random(x.shape) < 0.8
    g, q = rng.normal(size=x.shape), rng.choice([0, 0.3, 1], x.shape)
    x[-1], g[-1] = np.nan, 0
    labels = rng.integers(-1, size, (rows, 1)).astype(np.int32)
    t = rng.choice([0, -0.7, 0.5, 1, -3], (rows, 1)) if with_temperature else None
    logits = Logits(*(None if v is None else jnp.asarray(v) for v in (x, where, t)))
    given = [jnp.asarray(v) for v in (g, q, labels)]
    results = {}
    for name in ("plain", form):
        with forms.cpu_form(name):
            results[name] = jax.jit(every_pass)(logits, *given)
    for name, plain in results["plain"].items():
        other = results[form][name]
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
            scale = np.where(np.isfinite(b), np.abs(b), 0) + 10 * np.max(np.abs(g))
            assert_within(a, b, 1e-12 * scale, f"{form}, {name}", unit=1)
        if name.endswith(("pull", "push")):
            for v in jax.tree.leaves((plain, other)):
                np.testing.assert_array_equal(np.asarray(v)[-1], 0)
                assert not np.any(np.isnan(v)), name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("form", ["plain", "native"])
def test_passes_are_each_others_transposes(form, rng):
    """In rows of which every second one is sure of a class."""
    x, g, t = rng.normal(size=(3, 8, 5))
    x[::2, 1] += 20
    tau, where = rng.choice([-0.7, 0.5, 1], (8, 1)), rng.random((8, 5)) < 0.8
    scale, at_label = rng.normal(size=(2, 8, 1))
    labels = rng.integers(-1, 5, (8, 1)).astype(np.int32)
    with forms.cpu_form(form):
        logits = Logits(*map(jnp.asarray, (x, where, tau)))
        m = summarize(AXES, logits).m
        pulled = classes.log_softmax_pull(AXES, logits, g)
        pushed = classes._log_softmax_push(AXES, logits, t)
        written = classes.to_classes(AXES, logits, m, scale, labels, at_label)
        fixed = logits, m, labels, classes.Overwriting(False)
        of_scale, of_label = classes._to_rows(AXES, fixed, jnp.asarray(t))
        of_one = jax.grad(
            lambda t: jnp.sum(scale * classes._to_rows(AXES, fixed, t)[0])
        )(t)
        expected = classes.to_classes(AXES, logits, m, scale, labels, 0 * at_label)
    np.testing.assert_allclose(of_one, expected, rtol=1e-10)
    np.testing.assert_allclose(dot(pulled, t), dot(g, pushed), rtol=1e-10)
    both = dot(of_scale, scale) + dot(of_label, at_label)
    np.testing.assert_allclose(dot(written, t), both, rtol=1e-10)


def dot(a, b):
    return np.sum(np.asarray(a) * b, 1)
