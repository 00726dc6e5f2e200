"""The compiled kernels of a CPU: the values, edges and derivatives of the plain forms,
with the digits of a kernel, in every transformation, and for any number of threads.

`python tests/test_native.py CHECK` runs what needs a process of its own.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxsoft
from jaxsoft._core.logits import Logits
from jaxsoft._core.mesh import Axes
from jaxsoft._passes import classes, library
from jaxsoft._passes.summary import Riders, summarize

NOT_OVERWRITING = classes.Overwriting(False)
needs_kernels = pytest.mark.skipif(
    not jaxsoft.cpu_kernels(), reason="the compiled kernels are not there"
)


def uses_kernels(f, *args) -> bool:
    return "jaxsoft_" in jax.jit(f).lower(*args).as_text()


def wide(v):
    v = v if v.dtype == np.float64 else v.astype(jnp.float32)
    return np.asarray(v).astype(np.float64)


# --- The same as the plain forms.

# shape, class axes, dtype, with a mask of this shape, with temperatures
CASES = {
    "short rows": ((37, 10), (-1,), "float32", None, False),
    "long rows": ((5, 1003), (-1,), "float32", None, False),
    "rows in parts": ((3, 40_001), (-1,), "float32", None, False),
    "the first axis": ((70, 37), (-2,), "float32", None, False),
    "the first axis, in parts": ((1500, 3), (-2,), "float32", None, False),
    "an axis between": ((3, 33, 17), (-2,), "float32", (3, 33, 1), True),
    "two axes": ((6, 5, 7), (-2, -1), "float32", (6, 5, 1), True),
    "axes out of order": ((6, 5, 7), (-1, -2), "float32", None, True),
    "a mask of classes": ((9, 133), (-1,), "float32", (1, 133), False),
    "attention": ((2, 3, 5, 80), (-1,), "float32", (2, 1, 5, 80), True),
    "temperatures": ((40, 70), (-1,), "float32", (40, 70), True),
    "bfloat16": ((19, 100), (-1,), "bfloat16", (19, 1), False),
    "float16": ((19, 20), (-1,), "float16", (19, 20), True),
    "one class": ((7, 1), (-1,), "float32", (7, 1), False),
    "no class": ((7, 0), (-1,), "float32", None, False),
    "no row": ((0, 7), (-1,), "float32", None, True),
    "one row": ((65,), (-1,), "float32", None, True),
}
IN_SHORT = (
    "short rows",
    "long rows",
    "rows in parts",
    "the first axis",
    "attention",
    "bfloat16",
    "float16",
    "no class",
)
TEMPERATURES = (1.0, 0.3, 2.0, 0.0, -1.5, 1e-6, 300.0)


def awkward_logits(rng, shape, dtype):
    x = rng.normal(size=shape) * rng.choice([1, 10, 100], size=(*shape[:-1], 1))
    for awkward in (np.inf, -np.inf, 1000.0, -1000.0, 0.0):
        x = np.where(rng.random(shape) < 0.03, awkward, x)
    first = (0,) * (len(shape) - 1)
    if x.size:
        x[first] = -np.inf
    return jnp.asarray(x, dtype)


def all_passes(axes, logits, v, labels, coefficients, per_row):
    m = summarize(axes, logits).m
    riders = Riders(None, labels, coefficients, None, with_e_d=True)
    at_label, scale = per_row
    with_values = summarize(axes, logits, Riders(values=v.astype(m.dtype)))
    total = 1 + with_values.s
    return {
        "softmax": classes.softmax(axes, logits),
        "log_softmax": classes.log_softmax(axes, logits),
        "softmax_pull": classes.softmax_pull(axes, logits, v),
        "log_softmax_pull": classes.log_softmax_pull(axes, logits, v),
        "log_softmax_push": classes._log_softmax_push(axes, logits, v),
        "summary": summarize(axes, logits, riders),
        # The value that the others are seen from is a form's own choice.
        "mean of values": with_values.value + with_values.deviation / total,
        "sum of values": with_values.value + with_values.others,
        "to_classes": classes.to_classes(axes, logits, m, scale, labels, at_label),
        "to_rows": classes._to_rows(axes, (logits, m, labels, NOT_OVERWRITING), v),
    }


def given(case, seed=0):
    shape, axes, dtype, mask, tempered = CASES[case]
    rng = np.random.default_rng([seed, *map(ord, case)])
    kept = tuple(1 if i - len(shape) in axes else n for i, n in enumerate(shape))
    x = awkward_logits(rng, shape, dtype)
    count = Axes(axes).count_here(shape)
    where = None if mask is None else jnp.asarray(rng.random(mask) < 0.7)
    tau = jnp.asarray(rng.choice(TEMPERATURES, size=kept), jnp.float32)
    v = jnp.asarray(rng.normal(size=shape), dtype)
    labels = jnp.asarray(rng.integers(-1, count + 1, size=kept), jnp.int32)
    of_classes = tuple(n if i - len(shape) in axes else 1 for i, n in enumerate(shape))
    coefficients = jnp.asarray(rng.random(shape), dtype), jnp.ones(of_classes, dtype)
    per_row = jnp.asarray(rng.normal(size=(2, *kept)), jnp.float32)
    logits = Logits(x, where, tau if tempered else None)
    return Axes(axes), logits, v, labels, coefficients, tuple(per_row)


@needs_kernels
@pytest.mark.parametrize(
    "case",
    [c if c in IN_SHORT else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
def test_the_same_as_the_plain_forms(case):
    axes, logits, v, *others = given(case)

    def every(logits, v, *others):
        return all_passes(axes, logits, v, *others)

    native = jax.jit(every)(logits, v, *others)
    with jaxsoft.use_cpu_kernels(False):
        plain = jax.jit(every)(logits, v, *others)
    # Plain exponentials lose up to 64 ulp of float32, and 1e-6 in the temperature
    # multiplies what is left of a derivative where it cancels.
    tolerance = 2e-2 if logits.x.dtype.itemsize == 2 else 3e-5
    small = 1.0 if logits.temperature is None else jnp.abs(logits.temperature)
    for name, expected in plain.items():
        for a, b in zip(jax.tree.leaves(native[name]), jax.tree.leaves(expected)):
            assert a.dtype == b.dtype
            scale = np.minimum(small, 1) if name.endswith(("pull", "push")) else 1.0
            a, b = wide(a) * scale, wide(b) * scale
            np.testing.assert_allclose(a, b, tolerance, tolerance, err_msg=name)


@needs_kernels
def test_float64_is_the_same_to_its_own_digits(x64):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(11, 300)) * 50)
    v = jnp.asarray(rng.normal(size=x.shape))
    where = jnp.asarray(rng.random(x.shape) < 0.8)
    for tau in (None, jnp.full((11, 1), -0.7)):
        axes, logits = Axes((-1,)), Logits(x, where, tau)

        def every(logits=logits, axes=axes):
            return (
                classes.softmax(axes, logits),
                classes.log_softmax(axes, logits),
                classes.softmax_pull(axes, logits, v),
                summarize(axes, logits, Riders(with_e_d=True)),
            )

        native = every()
        with jaxsoft.use_cpu_kernels(False):
            plain = every()
        for a, b in zip(jax.tree.leaves(native), jax.tree.leaves(plain)):
            assert a.dtype == jnp.float64
            # The rounding of a difference of 100, in a plain exponential.
            np.testing.assert_allclose(a, b, 1e-13, 1e-300)


@needs_kernels
def test_a_row_with_nan_is_nan_and_no_other():
    x = jnp.zeros((40, 70)).at[3, 5].set(jnp.nan).at[7].set(jnp.nan)
    hidden = jnp.ones(x.shape, bool).at[3, 5].set(False)
    for f in (jaxsoft.softmax, jaxsoft.log_softmax):
        for axis, y, where in ((-1, x, hidden), (0, x.T, hidden.T)):
            rows = np.isnan(f(y, axis)).sum(axis)
            assert list(np.flatnonzero(rows)) == [3, 7]
            rows = np.isnan(f(y, axis, where)).sum(axis)
            assert list(np.flatnonzero(rows)) == [7]


@needs_kernels
@pytest.mark.parametrize("n", [10, 100])
def test_a_row_whose_cotangent_is_0_has_derivative_0(n):
    axes = Axes((-1,))
    awkward = jnp.array([[jnp.nan], [jnp.inf], [-jnp.inf], [0.0]])
    logits, zero = Logits(jnp.tile(awkward, (1, n))), jnp.zeros((4, n))
    rows, m = jnp.zeros((4, 1)), summarize(axes, logits).m
    for pull in (classes.softmax_pull, classes.log_softmax_pull):
        assert np.array_equal(pull(axes, logits, zero), zero)
    assert np.array_equal(classes.to_classes(axes, logits, m, rows), zero)
    sums, _ = classes._to_rows(axes, (logits, m, None, NOT_OVERWRITING), zero)
    assert np.array_equal(sums, rows)


@needs_kernels
def test_labels_outside_the_classes_touch_nothing():
    axes, x = Axes((-1,)), jnp.zeros((6, 4))
    labels = jnp.array([[-1], [4], [2**31 - 1], [-(2**31)], [0], [3]], jnp.int32)
    found = jnp.array([[0.0], [0.0], [0.0], [0.0], [1.0], [1.0]])
    logits = Logits(x + 1)
    assert np.array_equal(summarize(axes, logits, Riders(labels=labels)).logit, found)
    rows = jnp.zeros((6, 1))
    dx = classes.to_classes(axes, logits, rows, rows, labels, rows + 1)
    assert np.array_equal(dx.sum(-1, keepdims=True), found)
    assert dx[4, 0] == dx[5, 3] == 1


@needs_kernels
def test_a_label_beyond_32_bits_is_no_class(x64):
    riders = Riders(labels=jnp.array([[2**32], [-1], [4], [3]]))
    with jax.numpy_dtype_promotion("standard"):
        summary = summarize(Axes((-1,)), Logits(jnp.ones((4, 4), jnp.float32)), riders)
    np.testing.assert_array_equal(summary.logit[:, 0], [0, 0, 0, 1])


# --- Digits.


def ulps_apart(a, exact):
    """In units of the last place of float32. Exact numbers that are subnormal are 0."""
    exact = np.where(np.abs(exact) < np.finfo(np.float32).tiny, 0, exact)
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.max(np.abs(np.asarray(a, np.float64) - exact) / unit)


def exact_distribution(x, tau=1.0):
    x = np.asarray(x, np.float64)
    d = (x - x.max(-1, keepdims=True)) / tau
    e, is_top = np.exp(d), d == 0
    s = (
        np.sum(np.where(is_top, 0, e), -1, keepdims=True)
        + (is_top.sum(-1) - 1)[:, None]
    )
    return e / (1 + s), d - np.log1p(s), s


@needs_kernels
@pytest.mark.parametrize("n", [10, 1000, 50_000])
@pytest.mark.parametrize("kind", ["normal", "at 1000", "at -1000", "sure", "equal"])
def test_within_4_ulp(kind, n, record_property):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(32 if n < 50_000 else 3, n)) * 8
    x = {
        "normal": x,
        "at 1000": x * 3 + 1000,
        "at -1000": x * 3 - 1000,
        "sure": np.where(np.arange(n) == 3, 30.0, x / 4),
        "equal": np.where(np.arange(n) == 3, 1.37, 0.0 * x),
    }[kind].astype(np.float32)
    p, log_p, s = exact_distribution(x)
    worst = {
        "softmax": ulps_apart(jaxsoft.softmax(x), p),
        "log_softmax": ulps_apart(jaxsoft.log_softmax(x), log_p),
        "tail": ulps_apart(summarize(Axes((-1,)), Logits(jnp.asarray(x))).s, s),
    }
    # The derivative of log p at a label that is not the most probable class: a number
    # per class, in which nothing cancels.
    axes, rows = Axes((-1,)), jnp.ones((len(x), 1))
    m = jnp.asarray(x.max(-1, keepdims=True))
    dx = classes.to_classes(axes, Logits(jnp.asarray(x)), m, rows)
    worst["to_classes"] = ulps_apart(dx, np.exp(np.float64(x) - np.float64(m)))
    at_tau = jaxsoft.softmax(x, temperature=jnp.float32(0.7))
    worst["tempered"] = ulps_apart(at_tau, exact_distribution(x, np.float32(0.7))[0])
    for name, ulps in worst.items():
        record_property(f"{name}, ulp", round(float(ulps), 2))
        assert ulps <= 4, name


# --- Transformations.


def weighed(x):
    return jnp.sum(jaxsoft.log_softmax(x) * jnp.sin(x)) + jnp.sum(jaxsoft.softmax(x)[0])


def scanned(w):
    x = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
    return jax.lax.scan(
        lambda c, row: (c + jaxsoft.entropy(row * w) * jnp.tanh(c + 1), None), 0.1, x
    )[0]


TRANSFORMED = {
    "jit": jax.jit(weighed),
    "grad": jax.grad(weighed),
    "jvp": lambda x: jax.jvp(weighed, (x,), (jnp.cos(x),))[1],
    "hessian": lambda x: jax.hessian(weighed)(x[:2]),
    "vmap": jax.vmap(lambda x: jax.grad(weighed)(x[None]), 1),
    "vmap of the class axis": jax.vmap(lambda x: jaxsoft.softmax(x, 0), 1, 1),
    "remat": jax.grad(jax.checkpoint(weighed)),
    "scan, twice": lambda x: jax.grad(
        lambda w: jax.grad(scanned)(w) @ jnp.ones(4, w.dtype)
    )(x[0, :4]),
}


@needs_kernels
@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformed(name):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 9)), jnp.float32)
    f = TRANSFORMED[name]
    native = f(x)
    with jaxsoft.use_cpu_kernels(False):
        plain = f(x)
    np.testing.assert_allclose(native, plain, 1e-4, 1e-5)


@needs_kernels
def test_programs_of_accelerators_have_nothing_native():
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
    for platforms in (["tpu"], ["cuda"]):
        f = jax.jit(jax.grad(weighed))
        text = jax.export.export(f, platforms=platforms)(x).mlir_module()
        assert "jaxsoft_" not in text


@needs_kernels
def test_the_switch_is_seen_when_a_function_is_traced():
    x, f = jnp.ones((4, 6)), jax.jit(jaxsoft.softmax)
    assert uses_kernels(f, x)
    with jaxsoft.use_cpu_kernels(False):
        assert not jaxsoft.cpu_kernels()
        assert not uses_kernels(f, x)
        traced = f.trace(x)
        with jaxsoft.use_cpu_kernels(True):
            assert uses_kernels(f, x)
        exported = jax.export.export(f)(x)
    assert jaxsoft.cpu_kernels()
    assert "jaxsoft_" not in traced.lower().as_text()
    again = jax.export.deserialize(exported.serialize()).call(x)
    np.testing.assert_allclose(again, f(x), 1e-6)


def test_the_switch_is_a_bool():
    with (
        pytest.raises(TypeError, match="use_cpu_kernels: use must be a bool"),
        jaxsoft.use_cpu_kernels("no"),  # type: ignore[arg-type]
    ):
        pass


@needs_kernels
def test_in_a_donated_buffer():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(64, 500)).astype(np.float32)
    f = jax.jit(jaxsoft.softmax, donate_argnums=0)
    np.testing.assert_array_equal(f(jnp.asarray(x)), jaxsoft.softmax(x))


# --- A library that cannot be used.


def truncated(path: Path) -> Path:
    path.write_bytes(library.library_path().read_bytes()[:4096])
    return path


def not_a_library(path: Path) -> Path:
    path.write_text("not a library")
    return path


def of_another_processor(path: Path) -> Path:
    content = bytearray(library.library_path().read_bytes())
    content[18:20] = (0xF3).to_bytes(2, "little")  # RISC-V, in the header of ELF
    path.write_bytes(content)
    return path


def without_symbols(path: Path) -> Path:
    folder = Path(sysconfig.get_config_var("DESTSHARED") or "")
    shutil.copy(next(folder.glob("_json*.so")), path)
    return path


@needs_kernels
@pytest.mark.parametrize(
    "make", [truncated, not_a_library, of_another_processor, without_symbols]
)
def test_a_library_of_no_use_gives_one_warning(make, tmp_path, monkeypatch):
    path = make(tmp_path / "kernels.so")
    monkeypatch.setattr(library, "library_path", lambda: path)
    gives_one_warning()


@needs_kernels
@pytest.mark.parametrize("version", [2, 1003])
def test_a_library_of_another_version_is_not_registered(version, monkeypatch):
    monkeypatch.setattr(library, "_version_of_jaxlib", lambda: version)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", None)
    gives_one_warning("jaxlib")


def gives_one_warning(says="are not used"):
    library.is_loaded.cache_clear()
    jax.clear_caches()
    x = jnp.arange(6.0).reshape(2, 3)
    try:
        with pytest.warns(RuntimeWarning, match=says) as warned:
            p = jaxsoft.softmax(x)
        assert not jaxsoft.cpu_kernels()
        assert len(warned) == 1
        np.testing.assert_allclose(p, jax.nn.softmax(x), 1e-6)
    finally:
        library.is_loaded.cache_clear()
        jax.clear_caches()


# --- What needs a process of its own.


def run_check(check: str, **environment: str) -> str:
    folders = [Path(jaxsoft.__file__).parent.parent, Path(__file__).parent]
    done = subprocess.run(
        [sys.executable, __file__, check],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def bits() -> None:
    rng = np.random.default_rng(7)
    digest = hashlib.sha256()
    for shape, axis in (
        ((1, 300_000), -1),
        ((3, 40_000), -1),
        ((200, 1000), -1),
        ((9000, 10), -1),
        ((2000, 40), 0),
    ):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        axes = Axes((axis % 2 - 2,))
        for result in (
            jaxsoft.softmax(x, axis),
            jaxsoft.log_softmax(x, axis),
            classes.softmax_pull(axes, Logits(x), jnp.sin(x)),
            summarize(axes, Logits(x), Riders(with_e_d=True)),
        ):
            for leaf in jax.tree.leaves(result):
                digest.update(np.asarray(leaf).tobytes())
    print(digest.hexdigest())


@needs_kernels
def test_the_same_bits_for_any_number_of_threads():
    """JAX makes as many threads as NPROC says."""
    assert len({run_check("bits", NPROC=str(n)) for n in (1, 2, 3, 8)}) == 1


def meshes() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)
    expected = jaxsoft.log_softmax(x)

    def summed(x):
        return jax.grad(lambda x: jnp.sum(jaxsoft.entropy(x, axis_name="d")))(x)

    for spec in (P("d"), P(None, "d")):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        f = jax.jit(jaxsoft.log_softmax)
        text = f.lower(split).compile().as_text()
        assert "jaxsoft_" not in text
        assert "all-gather" not in text
        np.testing.assert_allclose(f(split), expected, 1e-5, 1e-6)
    rows = jax.jit(
        jax.shard_map(jaxsoft.log_softmax, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    )
    assert "jaxsoft_" in rows.lower(x).as_text()
    np.testing.assert_allclose(rows(x), expected, 1e-5, 1e-6)
    spec = P(None, "d")
    over_classes = jax.jit(
        jax.shard_map(summed, mesh=mesh, in_specs=spec, out_specs=spec)
    )
    assert "jaxsoft_summary" in over_classes.lower(x).as_text()
    whole = jax.grad(lambda x: jnp.sum(jaxsoft.entropy(x)))(x)
    np.testing.assert_allclose(over_classes(x), whole, 1e-4, 1e-6)
    print("all is well")


@needs_kernels
def test_on_meshes():
    flags = "--xla_force_host_platform_device_count=2"
    assert run_check("meshes", XLA_FLAGS=flags) == "all is well"


def switch() -> None:
    print(jaxsoft.cpu_kernels(), jaxsoft.softmax(jnp.zeros(2)))


def test_the_environment_variable():
    assert run_check("switch", JAXSOFT_CPU_KERNELS="0") == "False [0.5 0.5]"


if __name__ == "__main__":
    {"bits": bits, "meshes": meshes, "switch": switch}[sys.argv[1]]()
