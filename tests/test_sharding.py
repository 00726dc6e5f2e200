"""The class axis split over devices: values, gradients, and what the devices send.

A process has the number of devices that it started with. So the checks run in processes
of their own, which execute this file: `python tests/test_sharding.py CHECK`.
"""

import functools
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from laws import QUICKLY

import jaxsoft
from jaxsoft import shard_vocab

TIMEOUT_SECONDS = 240
TOKENS, CLASSES, FEATURES = 8, 32, 5
MANY_TOKENS, MANY_CLASSES, MANY_FEATURES = 64, 4096, 48


def started(devices: int, *arguments: str) -> subprocess.Popen:
    folders = [Path(jaxsoft.__file__).parent.parent, Path(__file__).parent]
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        *(f"--{name}={str(value).lower()}" for name, value in QUICKLY.items()),
    ]
    return subprocess.Popen(
        [sys.executable, __file__, *arguments],
        env={
            **os.environ,
            "XLA_FLAGS": " ".join(flags),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(map(str, folders)),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(processes: list[subprocess.Popen]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
            assert process.returncode == 0, output
            assert "all is well" in output
    finally:
        for process in processes:
            process.kill()
            process.communicate()


FAST = ["axis_name", "a_mean_and_types"]
SLOW = ["forward_mode", "collectives", "shard_vocab", "split_by_jit", "types"]


@pytest.mark.parametrize(
    "check", [*FAST, *(pytest.param(check, marks=pytest.mark.slow) for check in SLOW)]
)
def test_on_eight_devices(check: str) -> None:
    finished([started(8, check)])


@pytest.mark.slow
def test_over_two_processes() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    finished([started(2, "processes", port, str(i)) for i in range(2)])


LINEAR = jaxsoft.linear_cross_entropy


# From here on, what the processes run.


def data(tokens=TOKENS, classes=CLASSES, features=FEATURES):
    rng = np.random.default_rng(7)

    def normal(*shape, scale=1.0):
        return np.float32(scale * rng.standard_normal(shape))

    labels = rng.integers(0, classes, tokens).astype(np.int32)
    where = rng.random((tokens, classes)) < 0.8
    where[np.arange(tokens), labels] = True
    labels[2] = -100
    x = normal(tokens, classes, scale=3)
    x[0, 3] = x[0, classes - 2] = x[0].max() + 1  # a tie across devices
    where[0, [3, classes - 2]] = True
    return {
        "x": x,
        "other": normal(tokens, classes, scale=3),
        "hidden": normal(tokens, features),
        "vocab_weight": normal(classes, features),
        "vocab_bias": normal(classes),
        "labels": labels,
        "q": rng.dirichlet(np.ones(classes), tokens).astype(np.float32),
        "where": where,
        "class_weight": np.float32(rng.random(classes)),
        "sample_weight": np.float32(rng.random(tokens)),
        "temperature": np.float32(0.7),
        "label_smoothing": np.float32(0.1),
        "z_loss": np.float32(0.01),
        "softcap": np.float32(5),
        "small_hidden": normal(tokens, 3),
        "small_vocab_weight": normal(classes, 3),
    }


OPTIONS = ("class_weight", "sample_weight", "temperature")
OPTIONS += ("label_smoothing", "z_loss", "softcap", "where")


def of(names, **more):
    """The arguments of these names, as keywords; more of another name."""
    values = data()
    return {name: values[name] for name in names} | {
        name: values[as_] for name, as_ in more.items()
    }


def two_labels():
    """Per token: its label, and its first class that is included."""
    labels = np.stack([data()["labels"], data()["where"].argmax(1)], 1)
    labels[2, 0] = labels[4] = -100
    return labels.astype(np.int32)


# What is called, with all that it may be differentiated in.
CALLS = {
    "logsumexp": (
        functools.partial(jaxsoft.logsumexp, axis=-1),
        of(["where", "temperature"], a="x", b="q"),
    ),
    "logmeanexp": (
        functools.partial(jaxsoft.logmeanexp, axis=-1),
        of(["x", "where", "temperature"]),
    ),
    "softmax": (jaxsoft.softmax, of(["x"])),
    "softmax, options": (jaxsoft.softmax, of(["x", "where", "temperature"])),
    "log_softmax": (jaxsoft.log_softmax, of(["x", "where", "temperature"])),
    "entropy": (jaxsoft.entropy, of(["where", "temperature"], logits="x")),
    "kl_divergence": (
        jaxsoft.kl_divergence,
        of(
            ["where", "temperature", "sample_weight"], logits="x", target_logits="other"
        ),
    ),
    "jensen_shannon": (
        jaxsoft.jensen_shannon,
        of(["where", "temperature"], logits="x", target_logits="other"),
    ),
    "cross_entropy": (jaxsoft.cross_entropy, of(["labels", *OPTIONS], logits="x")),
    "cross_entropy, q": (jaxsoft.cross_entropy, of(OPTIONS, logits="x", labels="q")),
    "linear_cross_entropy": (
        functools.partial(LINEAR, chunk_bytes=4 * TOKENS * 3),
        of(["hidden", "vocab_weight", "vocab_bias", "labels", *OPTIONS]),
    ),
    "linear_log_probs": (
        functools.partial(jaxsoft.linear_log_probs, chunk_bytes=4 * TOKENS * 3),
        of(["hidden", "vocab_weight", "vocab_bias", "temperature", "where"])
        | {"labels": two_labels()},
    ),
    "linear_kl_divergence": (
        functools.partial(jaxsoft.linear_kl_divergence, chunk_bytes=8 * TOKENS * 3),
        of(
            ["hidden", "vocab_weight", "vocab_bias", "where", "softcap"],
            target_hidden="small_hidden",
            target_vocab_weight="small_vocab_weight",
            target_vocab_bias="class_weight",
        ),
    ),
    "linear_jensen_shannon": (
        functools.partial(jaxsoft.linear_jensen_shannon, beta=0.3),
        of(
            ["hidden", "vocab_weight", "temperature", "sample_weight"],
            target_hidden="small_hidden",
            target_vocab_weight="small_vocab_weight",
        ),
    ),
    "linear_cross_entropy, metrics": (
        functools.partial(LINEAR, with_metrics=True, chunk_bytes=4 * TOKENS * 3),
        of(["hidden", "vocab_weight", "labels", "z_loss"]),
    ),
}


def spec_of(name, value, tokens, vocab, sliced):
    """How a caller of shard_map splits an argument."""
    if name == "class_weight":
        return P(vocab) if sliced else P()
    if name.endswith(("vocab_weight", "vocab_bias")):
        return P(vocab)
    if name.endswith(("hidden", "sample_weight")) or value.dtype == np.int32:
        return P(tokens)
    return P(tokens, vocab) if value.ndim == 2 else P()


def derivatives(function, arguments, with_tangent=True):
    """Value, all gradients under a random cotangent, and a tangent."""
    smooth = {k: v for k, v in arguments.items() if v.dtype == np.float32}

    def of_smooth(smooth):
        out = function(**{**arguments, **smooth})
        # An integer result, top_label, has no derivative.
        return [v for v in jax.tree.leaves(out) if v.dtype == jnp.float32], out

    values, pullback, out = jax.vjp(of_smooth, smooth, has_aux=True)
    rng = np.random.default_rng(1)
    # Of the type of the values, which says how they are split.
    cotangents = [
        jnp.zeros_like(v) + np.float32(rng.standard_normal(v.shape)) for v in values
    ]
    if not with_tangent:
        return out, pullback(cotangents)
    directions = {k: jnp.cos(v) for k, v in smooth.items()}
    _, tangents = jax.jvp(lambda s: of_smooth(s)[0], (smooth,), (directions,))
    return out, pullback(cotangents), tangents


@functools.cache
def reference(name, with_tangent=True):
    function, arguments = CALLS[name]
    of = functools.partial(derivatives, function, with_tangent=with_tangent)
    return jax.jit(of)(arguments)


def assert_same(ours, reference, what="", term=0):
    """To float32 rounding: sums over a row in another order, of terms that cancel. A
    number that all rows share is a sum of terms of the given size."""

    def assert_leaf(a, b):
        a, b = np.asarray(a), np.asarray(b)
        scale = np.abs(b[np.isfinite(b)]).max(initial=0 if b.ndim else term)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * scale, err_msg=what)

    jax.tree.map(assert_leaf, ours, reference)


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes)
    )


# Of the other functions the sums over devices are these; forward mode has all.
FEW = ("logsumexp", "softmax", "kl_divergence", "cross_entropy", "cross_entropy, q")
FEW += ("linear_cross_entropy", "linear_log_probs", "linear_jensen_shannon")


def check_axis_name(names=FEW, with_tangent=False):
    eight, six = mesh_of(v=8), mesh_of(t=2, v=2, w=2)
    for name in names:
        function, arguments = CALLS[name]
        meshes = [(six, "t", ("v", "w"), name == "cross_entropy, q")]
        if name in ("cross_entropy", "linear_cross_entropy"):
            meshes.append((eight, None, "v", True))
        for mesh, tokens, vocab, sliced in meshes:
            specs = {
                k: spec_of(k, v, tokens, vocab, sliced) for k, v in arguments.items()
            }
            out = P(tokens, vocab) if "softmax" in name else P(tokens)

            def on_device(arguments, function=function, vocab=vocab):
                return function(**arguments, axis_name=vocab)

            split = jax.shard_map(
                on_device, mesh=mesh, in_specs=(specs,), out_specs=out
            )

            def ours(arguments, split=split):
                f = lambda **arguments: split(arguments)  # noqa: E731
                return derivatives(f, arguments, with_tangent)

            wanted = reference(name, with_tangent)
            assert_same(jax.jit(ours)(arguments), wanted, f"{name} on {mesh}")
    check_frozen_head(eight)


def check_forward_mode():
    check_axis_name(CALLS, with_tangent=True)


def check_frozen_head(mesh):
    arguments = of(["hidden", "vocab_weight", "labels"])
    hidden, vocab_weight, labels = arguments.values()

    def gradient(vocab_weight, axis_name=None):
        def total(hidden):
            loss = LINEAR(hidden, vocab_weight, labels, axis_name=axis_name)
            return jnp.sum(jnp.sin(loss))

        return jax.grad(total)(hidden)

    on_device = functools.partial(gradient, axis_name="v")
    split = jax.shard_map(on_device, mesh=mesh, in_specs=P("v"), out_specs=P())
    assert_same(jax.jit(split)(vocab_weight), jax.jit(gradient)(vocab_weight))


def check_shard_vocab():
    mesh, explicit = mesh_of(t=2, v=4), mesh_of(AxisType.Explicit, t=2, v=4)
    function, arguments = CALLS["linear_cross_entropy"]
    split = shard_vocab(function, explicit, "v", tokens="t")
    ours = jax.jit(functools.partial(derivatives, split))(arguments)
    assert_same(ours, reference("linear_cross_entropy"))
    for function, arguments in CALLS.values():
        split = shard_vocab(function, mesh, "v", tokens="t")
        assert_same(split(**arguments), function(**arguments), str(function))
    check_reductions(*CALLS["cross_entropy"], mesh, "sum")
    of_means = "kl_divergence", "cross_entropy, q", "linear_cross_entropy"
    for name in (*of_means, "linear_jensen_shannon"):
        check_reductions(*CALLS[name], mesh, "mean")
    check_shapes(mesh)
    check_skipped_tokens(mesh)
    check_sizes(mesh)


def check_reductions(function, arguments, mesh, reduction):
    """Those of the whole batch, whose tokens weigh differently on each device."""
    smooth = {k: v for k, v in arguments.items() if v.dtype == np.float32}

    def total(smooth, function):
        out = function(**{**arguments, **smooth}, reduction=reduction)
        assert out.shape == ()
        return out

    split = shard_vocab(function, mesh, "v", tokens="t")
    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(total, function=f)))(smooth)
        for f in (split, function)
    )
    # The derivative in label_smoothing is 0.03, of eight terms of about 1.
    assert_same(ours, theirs, f"{reduction} of {function}", term=1)


def check_shapes(mesh):
    """Other axes, broadcast arguments, numbers in place of arrays, the other layout."""
    rng = np.random.default_rng(3)
    x = np.float32(rng.standard_normal((2, 32, 4)))
    calls = [
        (jaxsoft.softmax, (x,), {"axis": 1, "where": np.arange(32)[:, None] < 30}),
        (jaxsoft.logsumexp, (x,), {"axis": 1, "keepdims": True, "b": x[:1, :, :1]}),
        (jaxsoft.logsumexp, (x[:, :1],), {"axis": 1, "b": x, "return_sign": True}),
        (jaxsoft.logmeanexp, (x,), {"axis": [1, 2], "temperature": 0.5}),
        (jaxsoft.entropy, (x[..., 0],), {"where": np.arange(2)[:, None] < 1}),
        (
            jaxsoft.cross_entropy,
            (x, rng.integers(0, 128, 2).astype(np.int8)),
            {"axis": (2, 1), "class_weight": np.float32(rng.random(128))},
        ),
        (
            functools.partial(LINEAR, vocab_axis=1, reduction="mean"),
            (x, np.float32(rng.standard_normal((4, 64))), np.zeros((2, 32), np.int32)),
            {"where": np.arange(64) < 60, "sample_weight": 2.0},
        ),
    ]
    for function, args, options in calls:
        split = shard_vocab(function, mesh, "v", tokens="t")
        assert_same(split(*args, **options), function(*args, **options))
    split = shard_vocab(calls[-1][0], mesh, "v", tokens=P(None, "t"))
    assert_same(split(*calls[-1][1]), calls[-1][0](*calls[-1][1]))


def check_skipped_tokens(mesh):
    """From 512 tokens on a device, blocks of ignored ones are skipped."""
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 16, 1024).astype(np.int32)
    labels[rng.random(1024) < 0.8] = -100
    arguments = {
        "hidden": np.float32(rng.standard_normal((1024, 3))),
        "vocab_weight": np.float32(rng.standard_normal((16, 3))),
        "labels": labels,
    }
    split = shard_vocab(LINEAR, mesh, "v", tokens="t")
    ours, whole = (
        jax.jit(functools.partial(derivatives, f, with_tangent=False))(arguments)
        for f in (split, LINEAR)
    )
    assert_same(ours, whole)


def check_sizes(mesh):
    arguments = of(["hidden", "vocab_weight", "labels"])
    split = shard_vocab(LINEAR, mesh, "v", tokens="t")
    with pytest.raises(ValueError, match=r"number of classes .*; got 31 for 4"):
        split(**{**arguments, "vocab_weight": arguments["vocab_weight"][:31]})
    short = {name: arguments[name][:7] for name in ("hidden", "labels")}
    with pytest.raises(ValueError, match=r"number of tokens .*; got 7 for 2"):
        split(**{**arguments, **short})


COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(program):
    """(kind, numbers) of all that a compiled program sends."""
    found = []
    for line in program.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"[a-z]+\d*\[([0-9,]*)\]", match[1])
            sizes = [[int(n) for n in shape.split(",") if n] for shape in shapes]
            found += [(match[2], int(np.prod(size))) for size in sizes]
    return found


def large_data(mesh, tokens, vocab):
    arguments = data(MANY_TOKENS, MANY_CLASSES, MANY_FEATURES)
    specs = {k: spec_of(k, v, tokens, vocab, sliced=True) for k, v in arguments.items()}
    return placed(arguments, specs, mesh)


def placed(arguments, specs, mesh):
    return {
        k: jax.device_put(v, NamedSharding(mesh, specs[k]))
        for k, v in arguments.items()
    }


def check_collectives():
    """At most three all-reduces of O(N) numbers, and for a linear head one of N x D and
    one of the gradient of vocab_weight, if the tokens are split; and nothing else."""
    for mesh, tokens in ((mesh_of(v=8), None), (mesh_of(t=2, v=4), "t")):
        here = MANY_TOKENS // mesh.shape.get("t", 1)
        given = large_data(mesh, tokens, "v")

        def sent(function, *names, mesh=mesh, tokens=tokens, given=given):
            """The sizes of the messages for the value and the gradients in all but the
            last, without that of the total."""
            split = shard_vocab(function, mesh, "v", tokens=tokens)
            arguments = [given[name] for name in names]
            positions = tuple(range(len(names) - 1))

            def total(*arguments):
                return jnp.sum(jnp.sin(split(*arguments)))

            program = jax.jit(jax.value_and_grad(total, positions))
            found = collectives(program.lower(*arguments).compile())
            assert {kind for kind, _ in found} == {"all-reduce"}, found
            return sorted(size for _, size in found if size > 1)

        rows = sent(jaxsoft.cross_entropy, "x", "labels")
        assert 2 <= len(rows) <= 3, rows
        assert max(rows) <= 3 * here, rows
        rows = sent(jaxsoft.kl_divergence, "x", "other")
        assert len(rows) == 3, rows  # two maxima, two tails, two sums about them
        assert max(rows) <= 4 * here, rows
        linear = functools.partial(LINEAR, chunk_bytes=4 * here * 64)
        *rows, largest = sent(linear, "hidden", "vocab_weight", "labels")
        if tokens:
            assert largest == MANY_CLASSES // 4 * MANY_FEATURES
            largest = rows.pop()
        assert largest == here * MANY_FEATURES
        assert len(rows) <= 3, rows
        assert max(rows) <= 3 * here, rows
        check_two_heads(sent, here, tokens)


def check_two_heads(sent, here, tokens):
    """Maxima, tails and terms of both in a message each, and the gradients of both
    hidden states, the teacher's of 3 features."""
    names = "hidden", "vocab_weight", "small_hidden", "small_vocab_weight"
    divergence = functools.partial(
        jaxsoft.linear_kl_divergence, chunk_bytes=8 * here * 64
    )
    rows = sent(divergence, *names)
    if tokens:
        assert rows.pop() == MANY_CLASSES // 4 * MANY_FEATURES
    assert rows.pop() == here * MANY_FEATURES
    rows.remove(3 * here)
    assert rows == [2 * here, 2 * here, 4 * here], rows


DENSE = [name for name in CALLS if "linear" not in name]


def check_split_by_jit():
    """Dense functions under plain jit, on meshes with and without explicit axes:
    nothing near the size of a device's logits is sent, and the values are those of one
    device."""
    kinds = AxisType.Auto, AxisType.Explicit
    both = [(mesh_of(kind, t=2, v=4), "t", "v") for kind in kinds]
    classes = [(mesh_of(kind, v=8), None, "v") for kind in kinds]
    tokens = [(mesh_of(kind, v=8), "v", None) for kind in kinds]
    whole = data(MANY_TOKENS, MANY_CLASSES, MANY_FEATURES)
    for name in DENSE:
        function, small = CALLS[name]
        plain = {
            "x": "other" if name == "kl_divergence" else "x",
            "a": "x",
            "b": "q",
            "logits": "x",
            "target_logits": "other",
            "labels": "q" if name == "cross_entropy, q" else "labels",
        }
        keys = {key: plain.get(key, key) for key in small}
        program = jax.jit(
            functools.partial(derivatives, function, with_tangent=name == "logsumexp")
        )
        theirs = program({key: whole[source] for key, source in keys.items()})
        meshes = [*both, *classes, *tokens] if name == "cross_entropy" else both
        for mesh, of_tokens, of_vocab in meshes:
            with jax.set_mesh(mesh):
                given = large_data(mesh, of_tokens, of_vocab)
                given = {key: given[source] for key, source in keys.items()}
                compiled = program.lower(given).compile()
                ours = compiled(given)
            assert_same(ours, theirs, f"{name} on {mesh}")
            largest = max((size for _, size in collectives(compiled)), default=0)
            # A device has 32768 logits; a number for each of 64 rows on each of 8
            # devices, or for each of 4096 classes, may be sent.
            assert largest <= 4096, (name, mesh, collectives(compiled))
    check_rows_of_many_classes()


def check_rows_of_many_classes():
    """Where a CPU writes the label's entry of the gradient, rows need nothing of each
    other."""
    x = np.sin(np.arange(16 * 8192, dtype=np.float32)).reshape(16, 8192)
    labels = np.arange(16) * 500
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jaxsoft.cross_entropy(x, labels))))
    theirs = gradient(x)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(kind, t=8)
        with jax.set_mesh(mesh):
            split = jax.device_put(x, NamedSharding(mesh, P("t", None)))
            compiled = gradient.lower(split).compile()
            assert_same(compiled(split), theirs, f"gradient on {mesh}")
        largest = max((size for _, size in collectives(compiled)), default=0)
        assert largest <= 1, collectives(compiled)


def check_a_mean_and_types():
    """Of the checks of shard_vocab and of types, one of each."""
    check_reductions(*CALLS["kl_divergence"], mesh_of(t=2, v=4), "mean")
    mesh = mesh_of(AxisType.Explicit, t=2, v=4)
    few = of(["hidden", "vocab_weight", "labels"])
    check_types_of_a_head(mesh, functools.partial(LINEAR, reduction="mean"), few, P())
    check_split_alone(
        mesh, "logits", jaxsoft.cross_entropy, of([], logits="x", labels="q")
    )


def check_types():
    """On explicit axes: the linear head, whose passes no type could follow, and two
    arguments of which one is split and one is not."""
    mesh = mesh_of(AxisType.Explicit, t=2, v=4)
    for name in ("linear_cross_entropy", "linear_log_probs", "linear_kl_divergence"):
        check_types_of_a_head(mesh, *CALLS[name], P("t"))
    softargmax = jaxsoft.softargmax, of([], x="x", positions="other")
    for (function, given), alone in [
        (CALLS["logsumexp"], ("a", "b")),
        (CALLS["kl_divergence"], ("logits", "target_logits")),
        (CALLS["cross_entropy, q"], ("logits", "labels")),
        (softargmax, ("x",)),
    ]:
        for split in alone:
            check_split_alone(mesh, split, function, given)


def check_types_of_a_head(mesh, function, given, rows):
    program = jax.jit(functools.partial(derivatives, function))
    theirs = program(given)
    for labels in (P("t"), P()):
        split = {k: spec_of(k, v, "t", "v", sliced=True) for k, v in given.items()}
        split["labels"] = labels
        ours = program(placed(given, split, mesh))
        assert_same(ours, theirs, f"{function}, labels {labels}", term=1)
        assert {v.sharding.spec for v in jax.tree.leaves(ours[0])} == {rows}


def check_split_alone(mesh, split, function, given):
    program = jax.jit(functools.partial(derivatives, function, with_tangent=False))
    specs = {k: P("t", "v") if k == split else P() for k in given}
    ours = program(placed(given, specs, mesh))
    assert_same(ours, program(given), f"{function}, {split} alone is split")


def assert_shards(ours, reference):
    """What this process holds of an array is what it should be."""
    scale = np.abs(reference).max()
    for shard in ours.addressable_shards:
        part = reference[shard.index]
        np.testing.assert_allclose(shard.data, part, rtol=1e-5, atol=2e-6 * scale)


def check_processes(port, index):
    """A 2 x 2 mesh over two processes: first the vocabulary split over them, then the
    tokens."""
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    assert jax.process_count() == 2
    devices = np.array(sorted(jax.devices(), key=lambda d: d.id)).reshape(2, 2)
    function, arguments = CALLS["linear_cross_entropy"]
    with jax.default_device(jax.local_devices()[0]):
        theirs = jax.jit(functools.partial(derivatives, function, with_tangent=False))
        theirs = jax.tree.map(np.asarray, theirs(arguments))
    for grid in (devices, devices.T):
        mesh = jax.sharding.Mesh(grid, ("t", "v"), axis_types=(AxisType.Auto,) * 2)
        given = {
            key: jax.make_array_from_callback(
                value.shape,
                NamedSharding(mesh, spec_of(key, value, "t", "v", sliced=True)),
                value.__getitem__,
            )
            for key, value in arguments.items()
        }
        split = shard_vocab(function, mesh, "v", tokens="t")
        ours = jax.jit(functools.partial(derivatives, split, with_tangent=False))
        jax.tree.map(assert_shards, ours(given), theirs)
    jax.distributed.shutdown()


def main(check, *arguments):
    warnings.simplefilter("error")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    globals()[f"check_{check}"](*arguments)
    print("all is well")


if __name__ == "__main__":
    main(*sys.argv[1:])
