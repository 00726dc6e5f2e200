"""The divergences of two linear heads against those of their logits.

What is raised: test_errors.py. The vocabulary over devices: test_sharding.py.

Comparisons are made in float64 where they can be: there a term that is wrong or missing
cannot pass for rounding.
"""

import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import as_users_have_it
from test_linear import as_dtype, assert_same, value_and_pullback
from test_linear_memory import product_flops, shapes_of

import jaxsoft
from jaxsoft._passes.product import _scaled_in_place

# The arguments of a student and its teacher, by what draws them.
DRAWS: dict[str, Any] = {
    "vocab_bias": lambda rng, case: rng.normal(size=case.classes),
    "target_vocab_bias": lambda rng, case: rng.normal(size=case.classes),
    "temperature": lambda rng, case: (
        rng.choice([-1, 1]) * rng.uniform(0.5, 2, (*case.batch, 1))
    ),
    "softcap": lambda rng, case: rng.uniform(2, 5),
    "target_softcap": lambda rng, case: rng.uniform(2, 5),
    "sample_weight": lambda rng, case: (
        rng.uniform(0.2, 2, case.batch) * (rng.random(case.batch) > case.ignored)
    ),
}
ALL = tuple(DRAWS)
OF_STUDENT = ("hidden", "vocab_weight", "vocab_bias", "softcap")
OF_TEACHER = tuple(f"target_{name}" for name in OF_STUDENT)


@dataclasses.dataclass(frozen=True)
class Case:
    """Two heads, their tokens and options; beta None is linear_kl_divergence."""

    options: tuple[str, ...] = ()
    beta: float | None = None
    batch: tuple[int, ...] = (7,)
    features: tuple[int, int] = (5, 3)
    classes: int = 13
    chunk: int | None = 4  # classes in a chunk; None leaves it to the function
    vocab_axes: tuple[int, int] = (0, 1)
    where: str = ""  # "", "per token" or "shared"
    ignored: float = 0.3
    reduction: str = "none"
    constant: tuple[str, ...] = ()

    def draw(self, seed: int) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """(float arguments, mask, cotangent of the loss), float64."""
        rng = np.random.default_rng(seed)
        floats: dict[str, Any] = {}
        for i, of in enumerate(("", "target_")):
            weight = rng.normal(size=(self.classes, self.features[i]))
            floats[f"{of}hidden"] = rng.normal(size=(*self.batch, self.features[i]))
            floats[f"{of}vocab_weight"] = weight.T if self.vocab_axes[i] else weight
        floats |= {name: DRAWS[name](rng, self) for name in self.options}
        others = {}
        if self.where == "per token":
            others["where"] = rng.random((*self.batch, self.classes)) < 0.7
            others["where"][..., 0, :] = False
        if self.where == "shared":
            others["where"] = np.arange(self.classes) % 5 != 4
        cotangent = rng.normal(size=self.batch if self.reduction == "none" else ())
        return floats, others, cotangent

    def arguments(self, seed: int, dtype: Any = float) -> tuple[Any, Any, Any]:
        floats, others, cotangent = self.draw(seed)
        return as_dtype(floats, dtype), others, as_dtype(cotangent, dtype)

    @property
    def linear(self) -> Any:
        if self.beta is None:
            return jaxsoft.linear_kl_divergence
        return functools.partial(jaxsoft.linear_jensen_shannon, beta=self.beta)

    @property
    def dense(self) -> Any:
        if self.beta is None:
            return jaxsoft.kl_divergence
        return functools.partial(jaxsoft.jensen_shannon, beta=self.beta)

    def of_heads(self, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        tokens = max(int(np.prod(self.batch, dtype=int)), 1)
        return self.linear(
            **floats,
            **others,
            vocab_axis=self.vocab_axes[0],
            target_vocab_axis=self.vocab_axes[1],
            chunk_bytes=self.chunk and 8 * tokens * self.chunk,
            reduction=self.reduction,
        )

    def of_logits(self, floats: dict[str, Any], others: dict[str, Any]) -> Any:
        options = dict(floats)
        both = []
        for of, axis in zip(("", "target_"), self.vocab_axes):
            weight = options.pop(f"{of}vocab_weight")
            x = options.pop(f"{of}hidden") @ (weight if axis else weight.T)
            bias = options.pop(f"{of}vocab_bias", jnp.zeros((), x.dtype))
            x = x + jnp.broadcast_to(bias, x.shape)
            cap = options.pop(f"{of}softcap", None)
            both.append(x if cap is None else cap * jnp.tanh(x / cap))
        return self.dense(*both, **options, **others, reduction=self.reduction)

    def programs(self) -> tuple[Any, Any]:
        """Value and gradients by both ways, compiled."""
        heads = value_and_pullback(self.of_heads, self.constant)
        return heads, value_and_pullback(self.of_logits, self.constant)


CASES: dict[str, Case] = {
    "every option": Case(ALL, where="per token"),
    "every option, mixed": Case(
        ALL, 0.3, batch=(2, 3), vocab_axes=(1, 0), where="shared"
    ),
    "mean of a student": Case(
        ALL[:2] + ALL[3:],
        reduction="mean",
        where="shared",
        constant=(*OF_TEACHER, "sample_weight"),
    ),
    "sum of a student's bias": Case(
        ("vocab_bias",),
        reduction="sum",
        constant=("hidden", "vocab_weight", *OF_TEACHER[:2]),
    ),
    "reverse, mean": Case(ALL, 1, classes=3, chunk=100, reduction="mean"),
    "no tokens": Case(("sample_weight",), 0.5, batch=(2, 0), reduction="mean"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("x64")
def test_value_and_every_gradient_are_those_of_the_logits(case: Case):
    heads, logits = case.programs()
    for seed in range(2):
        given = case.arguments(seed)
        assert_same(heads(*given), logits(*given))


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    classes = int(rng.choice([2, 7, 11, 17, 24, 31]))
    options = tuple(name for name in DRAWS if rng.random() < 0.5)
    fixed = [(), OF_TEACHER, OF_STUDENT, ("vocab_weight",)][rng.integers(4)]
    return Case(
        options,
        [None, 0, 0.5, 0.9, 1][rng.integers(5)],
        batch=tuple(int(n) for n in rng.integers(1, 5, rng.integers(1, 4))),
        features=(int(rng.integers(1, 8)), int(rng.integers(1, 8))),
        classes=classes,
        chunk=int(rng.integers(1, classes + 3)),
        vocab_axes=(int(rng.integers(2)), int(rng.integers(2))),
        where=str(rng.choice(["", "per token", "shared"])),
        ignored=float(rng.choice([0, 0.3, 1])),
        reduction=str(rng.choice(["none", "sum", "mean"])),
        constant=tuple(n for n in fixed if n in options or n.endswith(HEADS)),
    )


HEADS = ("hidden", "vocab_weight")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
@pytest.mark.usefixtures("x64")
def test_random_combinations(seed: int):
    case = random_case(seed)
    heads, logits = case.programs()
    for again in (seed, seed + 100):
        given = case.arguments(again)
        assert_same(heads(*given), logits(*given))


# From 512 tokens on, a pass runs over the tokens of a weight that is not 0: on a
# quarter of the rows, a half or all.
MANY = {
    "mixed": Case(("sample_weight",), 0.5, batch=(520,), classes=7),
    "mean of a student": Case(
        ("sample_weight", "vocab_bias"),
        batch=(520,),
        classes=7,
        reduction="mean",
        constant=("sample_weight", *OF_TEACHER[:2]),
    ),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] * (case.beta is None))
        for name, case in MANY.items()
    ],
)
@pytest.mark.usefixtures("x64")
def test_tokens_of_weight_0(case: Case):
    """They are skipped unless the weights move, and may hold anything: their gradient
    is 0, and in the weight their divergence."""
    heads, logits = case.programs()
    for ignored in (0.3, 0.8, 1.0):
        given = dataclasses.replace(case, ignored=ignored).arguments(1)
        value, gradients = heads(*given)
        expected = logits(*given)
        assert_same((value, gradients), expected)
        dead = given[0]["sample_weight"] == 0
        spoilt = {**given[0], "hidden": jnp.where(dead[:, None], np.nan, 1.0)}
        spoilt["hidden"] = spoilt["hidden"] * given[0]["hidden"]
        value, gradients = heads(spoilt, *given[1:])
        gradients.pop("sample_weight", None)
        expected[1].pop("sample_weight", None)
        assert_same((value, gradients), expected)
    program = jax.jit(jax.grad(lambda h: jnp.sum(case.of_heads({**spoilt, **h}, {}))))
    text = program.lower({"hidden": given[0]["hidden"]}).as_text()
    assert "case" in text


@pytest.mark.usefixtures("x64")
def test_a_cotangent_0_and_a_class_that_is_excluded():
    """Whatever is there, the gradients are those of the others."""
    case = Case(("vocab_bias", "softcap", "target_softcap"), 0.4, where="shared")
    heads, _ = case.programs()
    floats, others, cotangent = case.arguments(2)
    cotangent = cotangent.at[2].set(0)
    expected = heads(floats, others, cotangent)
    spoilt = dict(floats)
    for name in ("hidden", "target_hidden"):
        spoilt[name] = floats[name].at[2].set(np.nan)
    spoilt["vocab_weight"] = floats["vocab_weight"].at[4].set(np.inf)
    spoilt["target_vocab_weight"] = floats["target_vocab_weight"].at[:, 9].set(np.nan)
    value, gradients = heads(spoilt, others, cotangent)
    live = np.arange(7) != 2
    assert_same((value[live], gradients), (expected[0][live], expected[1]))
    assert np.isnan(value[2])


# A token of weight 0 has no derivative of the mixed second order, in forward mode.
@pytest.mark.parametrize(
    "case",
    [
        Case((), reduction="sum", classes=5, constant=OF_TEACHER[:2]),
        pytest.param(
            Case(ALL, 0.5, batch=(3,), classes=5, chunk=2, ignored=0),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["sum of a student", "mixed"],
)
@pytest.mark.usefixtures("x64")
def test_derivatives_in_both_modes_and_of_second_order(case: Case):
    floats, others, cotangent = case.arguments(1)
    tangents = case.arguments(2)[0]
    fixed = {name: floats.pop(name) for name in case.constant}
    tangents = {name: tangents[name] for name in floats}

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, floats):
        def g(moving):
            return f({**fixed, **moving}, others)

        def total(moving):
            return jnp.vdot(cotangent, jnp.sin(g(moving)))

        along = jax.jvp(g, (floats,), (tangents,))
        forward = jax.jvp(jax.grad(total), (floats,), (tangents,))[1]
        reverse = jax.grad(lambda v: jax.jvp(total, (v,), (tangents,))[1])(floats)
        return along, forward, reverse

    assert_same(derivatives(case.of_heads, floats), derivatives(case.of_logits, floats))


@pytest.mark.parametrize(
    ("reduction", "dtype"),
    [("mean", "bfloat16"), pytest.param("none", "float16", marks=pytest.mark.slow)],
)
@pytest.mark.usefixtures("x64")
def test_half_precision_is_summed_in_float32(reduction, dtype):
    """Over 600 tokens and 50 chunks; a sum in bfloat16 stalls after 256 terms."""
    case = Case(
        batch=(600,),
        classes=199,
        vocab_axes=(0, 0),
        reduction=reduction,
        constant=OF_TEACHER[:2],
    )
    heads, logits = case.programs()
    floats, others, _ = case.arguments(3, dtype)
    cotangent = np.ones(600 if reduction == "none" else ())
    value, gradients = heads(floats, others, jnp.asarray(cotangent, jnp.float32))
    assert value.dtype == jnp.float32
    assert {g.dtype for g in gradients.values()} == {jnp.dtype(dtype)}
    wanted = logits(as_dtype(floats, float), others, jnp.asarray(cotangent))
    np.testing.assert_allclose(value, wanted[0], rtol=1e-4)
    for name, gradient in gradients.items():
        scale = np.max(np.abs(wanted[1][name]))
        error = np.max(np.abs(np.asarray(gradient, float) - wanted[1][name])) / scale
        # Of the factors and of the result, and of the scale.
        assert error < 2 * float(jnp.finfo(dtype).eps), name


@pytest.mark.parametrize("beta", [0.5, pytest.param(None, marks=pytest.mark.slow)])
def test_nearly_equal_heads_keep_two_digits(beta, record_property):
    """As float32 products leave them; the divergence is 1e-8."""
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)
    teacher = jnp.asarray(rng.normal(size=(1009, 256)) / 16, jnp.float32)
    case = Case(beta=beta, batch=(64,), classes=1009, chunk=128, vocab_axes=(0, 0))

    def of(student):
        given = {"hidden": hidden, "target_hidden": hidden}
        weights = {"vocab_weight": student, "target_vocab_weight": teacher}
        return case.of_heads({**given, **weights}, {})

    value = np.float64(as_users_have_it(of)(teacher * (1 + 2**-12)))
    x = np.float64(hidden) @ np.float64(teacher).T
    y = np.float64(hidden) @ np.float64(np.asarray(teacher * (1 + 2**-12))).T
    with jax.enable_x64(True):
        expected = np.asarray(case.dense(jnp.asarray(y), jnp.asarray(x)))
    error = np.max(np.abs(value / expected - 1))
    record_property("worst relative error", f"{error:.1e}")
    assert error < 0.01
    assert np.all(as_users_have_it(of)(teacher) == 0)
    assert np.all(as_users_have_it(of)(teacher * (1 + 2**-23)) >= 0)


# Matrix products, from the compiled program; and no array of tokens times classes.

TOKENS, FEATURES, CLASSES = 1024, 64, 131072
PRODUCT = 2 * TOKENS * FEATURES * CLASSES
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("beta", "reduction", "moving", "products"),
    [
        (None, "mean", (0, 1), 6),
        (0.5, "mean", (0, 1), 8),
        pytest.param(None, "none", (0, 1), 8, marks=SLOW),
        pytest.param(1, "sum", (0, 1), 8, marks=SLOW),
        pytest.param(None, "mean", (0,), 5, marks=SLOW),
        pytest.param(None, "none", (), 4, marks=SLOW),
        pytest.param(0.5, "none", (0, 1, 2, 3), 10, marks=SLOW),
    ],
)
def test_products_of_a_program(beta, reduction, moving, products, record_property):
    case = Case(beta=beta)

    def loss(cotangent, *given):
        return jnp.sum(cotangent * case.linear(*given, reduction=reduction))

    shapes = [(TOKENS, FEATURES), (CLASSES, FEATURES)] * 2
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    cotangent = jax.ShapeDtypeStruct(
        (TOKENS,) if reduction == "none" else (), jnp.float32
    )
    positions = tuple(i + 1 for i in moving)
    f = jax.value_and_grad(loss, positions) if moving else loss
    traced = as_users_have_it(f).trace(cotangent, *given)
    assert not any(
        TOKENS in shape and CLASSES in shape for shape in shapes_of(traced.jaxpr.jaxpr)
    )
    program = traced.lower().compile()
    flops = product_flops(program.as_text()) / PRODUCT
    record_property("matrix products", f"{flops:.3f}")
    assert flops == pytest.approx(products, rel=1e-6)


def test_chunk_bytes_are_those_of_both_heads():
    """The largest array of a program without arguments that are larger."""
    hidden, weight = jnp.ones((6, 2)), jnp.ones((64, 2))

    def f(*given):
        return jaxsoft.linear_kl_divergence(*given, chunk_bytes=2 * 4 * 6 * 32)

    jaxpr = jax.make_jaxpr(f)(hidden, weight, hidden, weight).jaxpr
    assert {s[1] for s in shapes_of(jaxpr) if s[:1] == (6,) and len(s) > 1} == {
        1,
        2,
        32,
    }


@pytest.mark.parametrize("rows", [1, 31, 32, 70])
def test_scaled_in_place(rows):
    """As an accelerator does it, by parts of which the last may start early."""
    v = jnp.arange(3.0 * rows).reshape(rows, 3)
    for g in (jnp.full((1, 1), 2.0), 1 + jnp.arange(float(rows))[:, None]):
        np.testing.assert_array_equal(_scaled_in_place(None, v, g), g * v)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_it_is_lowered_for_accelerators(platform):
    """With what a head has, a gradient that is scaled in parts, and under vmap."""

    def loss(hidden, weight, bias, cap, teacher):
        return jaxsoft.linear_kl_divergence(
            hidden,
            weight,
            hidden,
            teacher,
            vocab_bias=bias,
            softcap=cap,
            reduction="mean",
        )

    shapes = (8, 4, 3), (9, 3), (9,), (), (9, 3)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    gradient = jax.vmap(jax.grad(loss, (0, 1, 2, 3)), (0, None, None, None, None))
    traced = jax.jit(gradient).trace(*given)
    assert "while" in traced.lower(lowering_platforms=(platform,)).as_text()


ON_A_TPU = """
import functools
from benchmarks import targets
device = targets.device("v5e")
import jax, jax.numpy as jnp, jaxsoft
hidden, weight = (
    targets.argument(device, (n, 4096), jnp.bfloat16) for n in (8192, 131072)
)
for name in ("linear_kl_divergence", "linear_jensen_shannon"):
    loss = functools.partial(getattr(jaxsoft, name), reduction="mean")
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    program = step.lower(hidden, weight, hidden, weight).compile()
    print("bytes", program.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.slow
def test_temporaries_on_a_tpu(record_property):
    """8192 tokens, 4096 features, 131072 classes, bfloat16: value and gradients of the
    student. The process has a compiler of its own."""
    pytest.importorskip("libtpu")
    folders = Path(jaxsoft.__file__).parent.parent, Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TPU],
        env={"PATH": "", "PYTHONPATH": ":".join(map(str, folders))},
        capture_output=True,
        text=True,
        check=True,
    )
    sizes = [int(n) / 1e6 for n in re.findall(r"bytes (\d+)", done.stdout)]
    record_property("temporaries", ", ".join(f"{n:.0f} MB" for n in sizes))
    assert len(sizes) == 2
    assert max(sizes) <= 400
