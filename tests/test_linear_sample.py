"""linear_sample: draws of a head without its logits, by their distribution, their
log-probability and its derivatives, and that neither chunks nor devices change them.

`python tests/test_linear_sample.py` runs what needs eight devices.
"""

import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from laws import QUICKLY, as_users_have_it, assert_within, quickly

import jaxsoft

KEY = jax.random.key(3)
TOKENS, FEATURES, CLASSES = 200, 6, 2019  # of 16 classes 126 blocks, and 3 more


def head(dtype=np.float32, classes=CLASSES):
    rng = np.random.default_rng(4)
    hidden = rng.normal(size=(TOKENS, FEATURES))
    vocab_weight = rng.normal(size=(classes, FEATURES))
    return jnp.asarray(hidden, dtype), jnp.asarray(vocab_weight, dtype)


def options():
    rng = np.random.default_rng(5)
    return {
        "vocab_bias": np.float32(rng.normal(size=CLASSES)),
        "where": rng.random((TOKENS, CLASSES)) < 0.7,
        "temperature": np.float32(
            rng.choice([-1, 1], (TOKENS, 1)) * rng.uniform(0.5, 2, (TOKENS, 1))
        ),
        "softcap": np.float32(3),
    }


def test_the_log_probability_and_its_gradient_are_those_of_the_draw():
    others = options()
    where = others.pop("where")
    smooth = dict(zip(("hidden", "vocab_weight"), head())) | others
    chunk_bytes = 4 * TOKENS * 700

    def both(draw):
        def of(smooth):
            value, pull, token = jax.vjp(draw, smooth, has_aux=True)
            return token, value, pull(jnp.cos(value))

        return quickly(of)(smooth)

    def drawn(smooth):
        of = jaxsoft.linear_sample(KEY, **smooth, where=where, chunk_bytes=chunk_bytes)
        return of.log_prob, of.token

    token, *results = both(drawn)

    def wanted(smooth):
        of = jaxsoft.linear_log_probs(labels=token, **smooth, where=where)
        return of.log_prob, token

    assert np.all(where[np.arange(TOKENS), token])
    for a, b in zip(
        jax.tree.leaves(results), jax.tree.leaves(both(wanted)[1:]), strict=True
    ):
        assert_within(a, b, 1e-4, "log_prob of the draw")


def test_no_chunk_changes_a_draw():
    hidden, weight = head()
    draws = [
        jaxsoft.linear_sample(
            KEY, hidden, weight.T, vocab_axis=1, chunk_bytes=4 * TOKENS * classes
        )
        for classes in (128, 1000, CLASSES)
    ]
    for draw in draws[1:]:
        assert np.array_equal(draw.token, draws[0].token)
        np.testing.assert_allclose(draw.log_prob, draws[0].log_prob, rtol=1e-5)


def chi_square(counts, expected):
    return np.sum((counts - expected) ** 2 / expected)


def test_draws_are_distributed_as_softmax():
    """Of 37 classes in three blocks, one masked: chi-square with 35 degrees of freedom
    is beyond 66.6 in one of 1000 cases."""
    draws, classes = 20_000, 37
    logits = np.random.default_rng(0).normal(size=classes).astype(np.float32)
    where = np.arange(classes) != 5
    # The weights of one feature, which is 1, are the logits.
    given = jnp.ones((draws, 1)), jnp.asarray(logits[:, None])
    draw = quickly(functools.partial(jaxsoft.linear_sample, where=where[None]))
    for temperature in (1.0, 0.5, -1.0):
        of = draw(KEY, *given, temperature=jnp.full((1, 1), temperature))
        counts = np.bincount(of.token, minlength=classes)
        log_p = np.asarray(
            jaxsoft.log_softmax(logits, where=where, temperature=temperature)
        )
        assert counts[5] == 0
        assert chi_square(counts[where], draws * np.exp(log_p[where])) < 66.6
        np.testing.assert_allclose(of.log_prob, log_p[of.token], rtol=1e-5)


def test_rows_and_keys_are_independent():
    """Two draws of fair coins agree in a half of the cases: from one row to the next,
    and from one key to another."""
    draw = jax.vmap(
        lambda key: jaxsoft.linear_sample(key, jnp.zeros((1000, 1)), jnp.ones((2, 1)))
    )
    token = np.asarray(draw(jax.random.split(KEY, 8)).token)
    for other in (np.roll(token, 1, 0), np.roll(token, 1, 1), token[:, ::-1]):
        assert abs(np.mean(token == other) - 0.5) < 3.3 * math.sqrt(0.25 / token.size)


def test_a_key_per_token_is_all_that_a_draw_depends_on():
    hidden, weight = head()
    keys = jax.random.split(KEY, TOKENS)
    token = jaxsoft.linear_sample(keys, hidden, weight).token
    last = jaxsoft.linear_sample(keys[-3:], hidden[-3:], weight).token
    assert np.array_equal(last, token[-3:])
    old = jax.random.key_data(keys)
    assert np.array_equal(jaxsoft.linear_sample(old, hidden, weight).token, token)
    one = jaxsoft.linear_sample(jax.random.PRNGKey(3), hidden, weight)
    assert np.array_equal(one.token, jaxsoft.linear_sample(KEY, hidden, weight).token)


def of_logits(rows, **options):
    """A draw for each row of logits; they come as a bias, since 0 times an infinity in
    a product would be NaN."""
    nothing, weight = jnp.zeros((1, 1)), jnp.zeros((rows.shape[1], 1))

    def draw(key, row):
        of = jaxsoft.linear_sample(key, nothing, weight, vocab_bias=row, **options)
        return jax.tree.map(lambda v: v[0], of)

    return jax.vmap(draw)(jax.random.split(KEY, len(rows)), jnp.asarray(rows))


def test_edges():
    inf, nan = np.inf, np.nan
    rows = np.zeros((5, 20), np.float32)
    rows[0, :] = -inf
    rows[1, [3, 17]] = inf
    rows[2, 18] = nan
    rows[3, 4] = 1e30
    rows[4, 7] = -inf
    token, log_prob = of_logits(rows)
    assert token[0] == token[2] == -1
    assert log_prob[0] == 0
    assert token[1] in (3, 17)
    assert log_prob[1] == -np.float32(np.log(2))
    assert np.isnan(log_prob[2])
    assert token[3] == 4
    assert log_prob[3] == 0
    assert token[4] != 7
    assert 0 <= token[4] < 20
    nothing = of_logits(rows, where=np.zeros((1, 20), bool))
    assert np.all(nothing.token == -1)
    assert np.all(nothing.log_prob == 0)
    empty = jaxsoft.linear_sample(KEY, jnp.ones((2, 0, 3)), jnp.ones((5, 3)))
    assert empty.token.shape == empty.log_prob.shape == (2, 0)


def test_at_temperature_0_it_is_the_first_of_the_best():
    rows = np.random.default_rng(2).integers(0, 3, (9, 40)).astype(np.float32)
    of = of_logits(rows, temperature=jnp.zeros((1, 1)))
    assert np.array_equal(of.token, rows.argmax(1))
    ties = np.sum(rows == rows.max(1, keepdims=True), 1)
    np.testing.assert_allclose(of.log_prob, -np.log(ties), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_dtypes(dtype):
    hidden, weight = head(dtype)
    of = quickly(jaxsoft.linear_sample)(KEY, hidden, weight)
    wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
    assert of.token.dtype == jnp.int32
    assert of.log_prob.dtype == wide
    log_p = jaxsoft.linear_log_probs(hidden, weight, of.token).log_prob
    np.testing.assert_allclose(of.log_prob, log_p, rtol=1e-6)


@pytest.mark.slow  # it compiles as for users
def test_temporaries_fit_into_the_head_s_formula():
    """4 N C + 4 N D bytes, of which the numbers of the blocks take less than a half."""
    tokens, features, classes, chunk = 4096, 512, 65536, 4096
    given = (
        jax.ShapeDtypeStruct((tokens, features), jnp.float32),
        jax.ShapeDtypeStruct((classes, features), jnp.float32),
    )
    draw = as_users_have_it(jaxsoft.linear_sample)
    program = draw.lower(KEY, *given).compile()
    of_a_chunk = 4 * tokens * chunk + 4 * tokens * features
    assert program.memory_analysis().temp_size_in_bytes < of_a_chunk
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert largest == classes * features < tokens * classes


@pytest.mark.parametrize(
    "check", ["axis_name", pytest.param("shard_vocab", marks=pytest.mark.slow)]
)
def test_on_eight_devices(check):
    flags = ["--xla_force_host_platform_device_count=8"]
    flags += [f"--{name}={str(value).lower()}" for name, value in QUICKLY.items()]
    folders = [Path(jaxsoft.__file__).parent.parent, Path(__file__).parent]
    environment = {
        "XLA_FLAGS": " ".join(flags),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
    }
    done = subprocess.run(
        [sys.executable, __file__, check],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def of_all_devices(classes=2048):
    """A head with a tie across devices, and a temperature of each token."""
    hidden, weight = head(classes=classes)
    weight = weight.at[1500].set(weight[3])
    temperature = jnp.where(jnp.arange(TOKENS) % 5 == 0, 0, 0.9)[:, None]
    return hidden, weight, temperature


def check_axis_name():
    def draw(hidden, weight, temperature, axis_name=None):
        return jaxsoft.linear_sample(
            KEY, hidden, weight, temperature=temperature, axis_name=axis_name
        )

    split = jax.shard_map(
        functools.partial(draw, axis_name="v"),
        mesh=jax.make_mesh((8,), ("v",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("v"), P()),
        out_specs=P(),
    )
    for classes in (2048, 2000):  # of each device 256, and 250, in blocks of 16 and 2
        given = of_all_devices(classes)
        one, eight = (jax.jit(f)(*given) for f in (draw, split))
        assert np.array_equal(eight.token, one.token), classes
        np.testing.assert_allclose(eight.log_prob, one.log_prob, rtol=1e-5)


def check_shard_vocab():
    """With the tokens split too, on automatic and explicit axes; and the gradients."""

    def derivatives(draw):
        def loss(hidden, weight, temperature):
            of = draw(KEY, hidden, weight, temperature=temperature)
            return jnp.sum(jnp.sin(jnp.arange(float(TOKENS))) * of.log_prob), of

        f = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        return jax.jit(f)(*of_all_devices())

    (_, one), of_one = derivatives(jaxsoft.linear_sample)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("t", "v"), axis_types=(kind, kind))
        split = jaxsoft.shard_vocab(jaxsoft.linear_sample, mesh, "v", tokens="t")
        (_, eight), of_eight = derivatives(split)
        assert np.array_equal(eight.token, one.token)
        np.testing.assert_allclose(eight.log_prob, one.log_prob, rtol=1e-5)
        for a, b in zip(of_eight, of_one):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    globals()[f"check_{sys.argv[1]}"]()
