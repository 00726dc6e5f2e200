"""Every raise of the library: its class, its text, and that none is without a case.

A message reads `function: what must hold; got what was passed`. That every function
names itself in it, and every argument: test_bad_input.py.
"""

import ast
import functools
import pathlib
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxsoft

PACKAGE = pathlib.Path(jaxsoft.__file__).parent
# It has the cases of its raises in the test that bears its name.
TESTED_BESIDE = "_sharding"

X = jnp.zeros((2, 3))
Y = jnp.zeros(2, jnp.int32)
COMPLEX = jnp.zeros((2, 3), jnp.complex64)
MESH = jax.make_mesh((1, 1), ("t", "v"))
AUTO = jax.make_mesh((1, 1), ("t", "v"), axis_types=(AxisType.Auto, AxisType.Auto))
NAMES = {name: getattr(jaxsoft, name) for name in jaxsoft.__all__}
NAMES |= {"X": X, "Y": Y, "COMPLEX": COMPLEX, "MESH": MESH, "AUTO": AUTO}
NAMES |= {"jax": jax, "jnp": jnp, "np": np, "partial": functools.partial}
NAMES |= {"AxisType": AxisType, "PartitionSpec": PartitionSpec, "P": PartitionSpec}

# A call, and indented what it raises; the next line of a call stands in a bracket.
CASES = """\
softmax("logits")
    TypeError: softmax: x must be an array of numbers; got str
logsumexp([[1.0], [1.0, 2.0]])
    TypeError: logsumexp: a must be an array of numbers; got list
log_softmax(X > 0)
    TypeError: log_softmax: x must be numbers; got a boolean array
cross_entropy(COMPLEX, Y)
    TypeError: cross_entropy: logits must be real; got dtype complex64
softmax(X, temperature=1j)
    TypeError: softmax: temperature must be real; got dtype complex64
softmax(X, axis=1.0)
    TypeError: softmax: axis must be an int, a tuple of ints or None; got 1.0
entropy(X, axis=(0, 2))
    ValueError: entropy: axis must lie in [-2, 2) for 2 dimensions; got (0, 2)
log_softmax(X, axis=(1, -1))
    ValueError: log_softmax: axis must not repeat a dimension; got (1, -1)
logsumexp(X, keepdims=1)
    TypeError: logsumexp: keepdims must be True or False; got 1
softmax(X, where=jnp.ones(3))
    TypeError: softmax: where must be boolean; got dtype float32. For numbers 0 and 1
    write where != 0
softmax(X, where=jnp.ones(2, bool))
    ValueError: softmax: where must broadcast to the logits' shape (2, 3); got (2,). For
    one entry per row write where[..., None]
cross_entropy(X, Y, where=Y == 0)
    ValueError: cross_entropy: where must broadcast to the logits' shape (2, 3); got
    (2,). To leave out a row set its label to ignore_index
cross_entropy(X, Y, where=jnp.ones((4, 2, 3), bool))
    ValueError: cross_entropy: where must broadcast to the logits' shape (2, 3); got (4,
    2, 3)
softmax(X, temperature=jnp.ones(3))
    ValueError: softmax: temperature must broadcast to the reduced result with the
    reduced axes kept, shape (2, 1); got (3,)
logsumexp(COMPLEX, temperature=2.0)
    TypeError: logsumexp: temperature needs real input; got complex64 with temperature
    2.0
softmax(X, axis_name="vocab")
    ValueError: softmax: axis_name must name mesh axes of an enclosing jax.shard_map;
    got 'vocab'
jax.shard_map(lambda x: softmax(x, axis_name="vocab"), mesh=jax.make_mesh((1,),
    ("vocab",), (AxisType.Auto,)), in_specs=PartitionSpec(None, "vocab"),
    out_specs=PartitionSpec(None, "vocab"))(COMPLEX)
    TypeError: softmax: axis_name needs real input; got complex64
logsumexp(X, b=jnp.ones(2))
    ValueError: logsumexp: a and b must broadcast together; got shapes (2, 3) and (2,)
cross_entropy(X, Y, reduction="batchmean")
    ValueError: cross_entropy: reduction must be one of ('none', 'sum', 'mean'); got
    'batchmean'
cross_entropy(X, jnp.zeros(1, jnp.int32))
    ValueError: cross_entropy: integer labels must have the logits' shape without the
    class axis, (2,); got labels (1,) for logits (2, 3)
cross_entropy(X, jnp.zeros((2, 3), jnp.int32))
    ValueError: cross_entropy: integer labels must have the logits' shape without the
    class axis, (2,); got labels (2, 3) for logits (2, 3). For one-hot labels or
    probabilities use a floating dtype
cross_entropy(X, X > 0)
    TypeError: cross_entropy: labels must be integers (class indices) or floats
    (probabilities); got dtype bool. For one-hot labels write labels.astype(jnp.float32)
cross_entropy(X, Y[:, None])
    ValueError: cross_entropy: integer labels must have the logits' shape without the
    class axis, (2,); got labels (2, 1) for logits (2, 3). Write jnp.squeeze(labels,
    (1,))
cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), int))
    ValueError: cross_entropy: integer labels must have the logits' shape without the
    class axis, (2, 3); got labels (2, 4) for logits (2, 3, 4). For classes along axis 1
    write axis=1
cross_entropy(Y, X)
    ValueError: cross_entropy: floating labels are probabilities and must have the
    logits' shape (2,); got (2, 3). The order is cross_entropy(logits, labels)
cross_entropy(X, jnp.zeros(2))
    ValueError: cross_entropy: floating labels are probabilities and must have the
    logits' shape (2, 3); got (2,). For class indices use an integer dtype
cross_entropy(X, Y, ignore_index=-1.0)
    TypeError: cross_entropy: ignore_index must be an int or None; got -1.0
cross_entropy(X, Y, z_loss=jnp.ones(2))
    ValueError: cross_entropy: z_loss must be a scalar; got (2,)
cross_entropy(X, Y, softcap=0)
    ValueError: cross_entropy: softcap must be positive; got 0
cross_entropy(X, Y, temperature=jnp.ones(2))
    ValueError: cross_entropy: temperature must broadcast to the reduced result with the
    reduced axes kept, shape (2, 1); got (2,). Write jnp.expand_dims(temperature, (1,))
cross_entropy(X, Y, label_smoothing=1.1)
    ValueError: cross_entropy: label_smoothing must lie in [0, 1]; got 1.1
cross_entropy(X, Y, class_weight=jnp.ones(2))
    ValueError: cross_entropy: class_weight must have one entry per class, shape (3,);
    got (2,)
cross_entropy(X, Y, sample_weight=jnp.ones(3))
    ValueError: cross_entropy: sample_weight must broadcast to the shape of the losses
    (2,); got (3,)
kl_divergence(X, X[:1])
    ValueError: kl_divergence: logits and target_logits must have the same shape; got
    (2, 3) and (1, 3)
jensen_shannon(X, X, beta=1.5)
    ValueError: jensen_shannon: beta must lie in [0, 1]; got 1.5
jensen_shannon(X, X, beta=jnp.float32(0.5))
    TypeError: jensen_shannon: beta must be a Python number, not an array; got
    ArrayImpl
jensen_shannon(X, X, alpha=0.5)
    TypeError: jensen_shannon: there is no argument 'alpha'; here it is beta
binary_cross_entropy(X, COMPLEX)
    TypeError: binary_cross_entropy: labels must be real; got dtype complex64
multilabel_cross_entropy(X, X[0])
    ValueError: multilabel_cross_entropy: labels must have the logits' shape (2, 3); got
    (3,)
smooth_abs(X, temperature=jnp.ones((4, 2, 3)))
    ValueError: smooth_abs: temperature must broadcast to the shape of x, (2, 3); got
    (4, 2, 3)
smooth_sign(X > 0)
    TypeError: smooth_sign: x must be numbers; got a boolean array
smooth_maximum(X, jnp.ones(2))
    ValueError: smooth_maximum: x and y must broadcast together; got shapes (2, 3) and
    (2,)
smooth_clip(X, 2, 1.0)
    ValueError: smooth_clip: lower must not exceed upper; got 2 and 1.0
smooth_clip(X, 0.0, jnp.ones(2))
    ValueError: smooth_clip: upper must broadcast to the shape of x, (2, 3); got (2,)
softargmax(X, 0, positions=jnp.ones(3))
    ValueError: softargmax: positions of one dimension must have the length of axis 0 of
    x, (2, 3); got (3,)
softargmax(X, 0, positions=jnp.ones((3, 2)))
    ValueError: softargmax: positions must broadcast to the shape of x, (2, 3); got (3,
    2)
circle_loss(X, 0.0)
    ValueError: circle_loss: positives and negatives must have a last axis; got shapes
    (2, 3) and ()
circle_loss(X, X[:1])
    ValueError: circle_loss: positives and negatives must have the same leading shape;
    got (2, 3) and (1, 3)
linear_cross_entropy(X, X, Y, vocab_axis=-1)
    ValueError: linear_cross_entropy: vocab_axis must be 0 or 1; got -1
linear_cross_entropy(X, X[0], Y)
    ValueError: linear_cross_entropy: hidden must be (*batch, features) and vocab_weight
    a matrix; got shapes (2, 3) and (3,)
linear_cross_entropy(X, jnp.zeros((3, 5)), Y)
    ValueError: linear_cross_entropy: hidden must be (*batch, features) and vocab_weight
    (classes, features) with the same features and at least one class; got shapes (2, 3)
    and (3, 5) with vocab_axis=0. Write vocab_axis=1
linear_cross_entropy(X, jnp.zeros((5, 3)), Y, vocab_axis=1)
    ValueError: linear_cross_entropy: hidden must be (*batch, features) and vocab_weight
    (features, classes) with the same features and at least one class; got shapes (2, 3)
    and (5, 3) with vocab_axis=1. Write vocab_axis=0
linear_log_probs(X, jnp.zeros((0, 3)), Y)
    ValueError: linear_log_probs: hidden must be (*batch, features) and vocab_weight
    (classes, features) with the same features and at least one class; got shapes (2, 3)
    and (0, 3) with vocab_axis=0
linear_cross_entropy(X, X, Y, vocab_bias=jnp.zeros(3))
    ValueError: linear_cross_entropy: vocab_bias must have one entry per class, shape
    (2,); got (3,)
linear_cross_entropy(X, X, Y, chunk_bytes=1e6)
    TypeError: linear_cross_entropy: chunk_bytes must be an int; got 1000000.0
linear_log_probs(X, X, Y, chunk_bytes=0)
    ValueError: linear_log_probs: chunk_bytes must be positive; got 0
linear_kl_divergence(X, X, X[:1], X)
    ValueError: linear_kl_divergence: hidden and target_hidden must have the same batch
    shape; got (2, 3) and (1, 3)
linear_jensen_shannon(X, X, X, X[:1])
    ValueError: linear_jensen_shannon: vocab_weight and target_vocab_weight must have
    the same number of classes; got 2 and 1
linear_kl_divergence(X, X, X, X.T)
    ValueError: linear_kl_divergence: target_hidden must be (*batch, features) and
    target_vocab_weight (classes, features) with the same features and at least one
    class; got shapes (2, 3) and (3, 2) with target_vocab_axis=0. Write
    target_vocab_axis=1
linear_kl_divergence(X, X, X, X, labels=Y)
    TypeError: linear_kl_divergence: there is no argument 'labels'; here it is
    target_hidden or sample_weight
linear_kl_divergence(X, X, X, X, teacher_weight=X)
    TypeError: linear_kl_divergence: there is no argument 'teacher_weight'; here it is
    target_vocab_weight
linear_cross_entropy(X, X, X[:, 0])
    TypeError: linear_cross_entropy: labels must be integers (class indices); got dtype
    float32
linear_cross_entropy(X, X, jnp.zeros(3, int))
    ValueError: linear_cross_entropy: labels must have the shape of hidden without
    features (2,); got (3,)
logcumsumexp(X, (0,))
    TypeError: logcumsumexp: axis must be an int; got (0,)
gumbel_softmax(jax.random.split(jax.random.key(0)), X)
    TypeError: gumbel_softmax: key must be one key of jax.random; got PRNGKeyArray(2,)
linear_sample(jax.random.split(jax.random.key(0), 3), X, X)
    TypeError: linear_sample: key must be one key of jax.random, or one per token, of
    shape (2,); got PRNGKeyArray(3,)
segment_softmax(X, X[:, 0])
    TypeError: segment_softmax: segment_ids must be integers; got dtype float32
segment_softmax(X, Y[:1])
    ValueError: segment_softmax: segment_ids must have one entry for each along the
    first axis of x; got segment_ids (1,) for x (2, 3)
jax.jit(segment_logsumexp)(X, Y)
    ValueError: segment_logsumexp: num_segments must be given where the ids are traced,
    as under jax.jit; got None
segment_log_softmax(X, Y, 1.0)
    TypeError: segment_log_softmax: num_segments must be an int or None; got 1.0
segment_log_softmax(X, Y, -1)
    ValueError: segment_log_softmax: num_segments must not be negative; got -1
segment_softmax(X, Y, 2, temperature=jnp.ones(2))
    ValueError: segment_softmax: temperature must broadcast to the shape of the result,
    (2, 3); got (2,)
use_cpu_kernels(1).__enter__()
    TypeError: use_cpu_kernels: use must be a bool; got int
straight_through(jnp.sign, 1.0)
    TypeError: straight_through: soft must be a function; got float
straight_through(None, jnp.sign)
    TypeError: straight_through: hard must be a function; got NoneType
straight_through(jnp.sign, jnp.sum)(X)
    ValueError: straight_through: hard and soft must return the same shapes; got (2, 3)
    and ()
straight_through(jnp.argmax, jnp.sum)(X)
    TypeError: straight_through: hard and soft must return the same dtypes; got int32
    and float32
straight_through(jnp.sign, lambda x: (x,))(X)
    TypeError: straight_through: hard and soft must return the same tree; got
    PyTreeDef(*) and PyTreeDef((*,))
with_jvp(sorted)
    TypeError: with_jvp: f must be a jax.custom_vjp function; got
    builtin_function_or_method 'sorted'. Plain functions have both modes already.
shard_vocab(softmax, MESH, "x")
    ValueError: shard_vocab: axis must name different axes of the mesh, ('t', 'v'); got
    'x'
shard_vocab(softmax, MESH, {})
    ValueError: shard_vocab: axis must name different axes of the mesh, ('t', 'v'); got
    {}
shard_vocab(softmax, MESH, "v", tokens={})
    ValueError: shard_vocab: tokens must name different axes of the mesh, ('t', 'v');
    got {}
shard_vocab(softmax, MESH, "v", tokens=("t", "x"))
    ValueError: shard_vocab: tokens must name different axes of the mesh, ('t', 'v');
    got ('t', 'x')
shard_vocab(softmax, MESH, "v", tokens="v")
    ValueError: shard_vocab: axis and tokens must name different mesh axes; got 'v' and
    'v'
shard_vocab(softmax, MESH, "v", tokens=PartitionSpec("t", None))(X)
    ValueError: shard_vocab: tokens must have at most one entry per batch axis; got 2
    for 1 batch axes
shard_vocab(softmax, MESH, "v")(X, ())
    ValueError: shard_vocab: axis must name at least one class axis; got ()
shard_vocab(softmax, MESH, "v")(X, axis_name="v")
    ValueError: shard_vocab: axis_name must be left to shard_vocab; got 'v'
shard_vocab(cross_entropy, MESH, "v")(X, jnp.zeros(3, jnp.int32))
    ValueError: cross_entropy: integer labels must have the logits' shape without the
    class axis, (2,); got labels (3,) for logits (2, 3). For classes along axis 0 write
    axis=0
shard_vocab(len, MESH, "v")
    TypeError: shard_vocab: f must be one of cross_entropy, entropy, jensen_shannon,
    kl_divergence, linear_cross_entropy, linear_jensen_shannon, linear_kl_divergence,
    linear_log_probs, linear_sample, log_softmax, logmeanexp, logsumexp, softmax; got
    <built-in function len>
shard_vocab(softmax, jax.devices(), "v")
    TypeError: shard_vocab: mesh must be a jax.sharding.Mesh; got list
cross_entropy(X, Y, weight=jnp.ones(3))
    TypeError: cross_entropy: there is no argument 'weight'; here it is class_weight or
    sample_weight
softmax(X, dim=-1)
    TypeError: softmax: there is no argument 'dim'; here it is axis
kl_divergence(X, X, mask=X > 0)
    TypeError: kl_divergence: there is no argument 'mask'; here it is where or
    sample_weight
binary_cross_entropy(X, X, from_logits=True)
    TypeError: binary_cross_entropy: there is no argument 'from_logits': the losses take
    logits, never probabilities
cross_entropy(X, Y, smoothing=0.1)
    TypeError: cross_entropy: there is no argument 'smoothing'; here it is
    label_smoothing
softplus(X, threshold=20)
    TypeError: softplus: there is no argument 'threshold'; the arguments are x,
    temperature
cross_entropy(X, np.full((2, 3), -1.0, np.float32))
    ValueError: cross_entropy: floating labels are probabilities and must not be
    negative; got -1.0. The order is cross_entropy(logits, labels)
cross_entropy(np.array(["yes", "no"]), Y)
    TypeError: cross_entropy: logits must be an array of numbers; got dtype <U3
cross_entropy(np.array([object()]), Y)
    TypeError: cross_entropy: logits must be an array of numbers; got dtype object
cross_entropy(X, Y, focal_gamma=-1)
    ValueError: cross_entropy: focal_gamma must not be negative; got -1
cross_entropy(X, X, focal_gamma=2)
    ValueError: cross_entropy: focal_gamma needs integer labels (class indices); got
    labels of dtype float32
cross_entropy(X, Y, check_labels=1)
    TypeError: cross_entropy: check_labels must be True or False; got 1
jax.vmap(partial(entropy, axis_name="v"), axis_name="v")(X)
    ValueError: entropy: axis_name must name mesh axes of an enclosing jax.shard_map;
    got 'v'
jax.shard_map(partial(entropy, axis_name="v"), mesh=MESH, in_specs=P(),
    out_specs=P())(X)
    ValueError: entropy: axis_name 'v' must be the mesh axis over which the classes of
    logits are split; got logits that are the same on all of its devices
jax.shard_map(partial(cross_entropy, axis_name="v"), mesh=AUTO, in_specs=P("v"),
    out_specs=P("v"))(X, Y)
    ValueError: cross_entropy: axis_name 'v' must be the mesh axis over which the
    classes are split; got labels that differ over it, as over an axis of the batch. For
    a mean over such an axis see loss_weight
loss_weight(Y > 0)
    TypeError: loss_weight: labels must be integers (class indices) or floats
    (probabilities); got dtype bool
loss_weight(Y, class_weight=X)
    ValueError: loss_weight: class_weight must have one entry per class; got shape (2,
    3)
loss_weight(Y, where=jnp.ones((4, 3), bool))
    ValueError: loss_weight: where must have the logits' rank, and without the class
    axis broadcast to the shape of the rows (2,); got (4, 3)
"""


def cases() -> dict[str, str]:
    """{call: class and text}"""
    found: dict[str, str] = {}
    call = ""
    for line in CASES.splitlines():
        if not line.startswith(" "):
            found[call := line] = ""
        elif found[call] or re.match(r" +(Type|Value)Error: ", line):
            found[call] = f"{found[call]} {line.strip()}".strip()
        else:
            del found[call]
            found[call := f"{call} {line.strip()}"] = ""
    return found


def evaluated(call: str) -> object:
    return eval(call, dict(NAMES))


@pytest.mark.parametrize("call", cases())
def test_class_and_text(call):
    with pytest.raises((TypeError, ValueError)) as caught:
        evaluated(call)
    assert f"{type(caught.value).__name__}: {caught.value}" == cases()[call]


def _raise_statements() -> list[tuple[pathlib.Path, range]]:
    """(module, lines) of every raise, outside of the modules tested beside it."""
    return [
        (path, range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for path in PACKAGE.rglob("*.py")
        if not path.relative_to(PACKAGE).parts[0].startswith(TESTED_BESIDE)
        and path.stem != "library"  # whose errors end in a warning: test_native.py
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    ]


def _raised_at(call: str) -> tuple[pathlib.Path, int] | None:
    try:
        evaluated(call)
    except Exception as error:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = pathlib.Path(frame.filename)
            if path.is_relative_to(PACKAGE):
                return path, frame.lineno or 0
    return None


def test_every_raise_has_a_case():
    """Add a case above for every new raise."""
    statements = _raise_statements()
    assert len(statements) > 20
    reached = [at for at in map(_raised_at, cases()) if at]
    without_case = [
        f"{path.relative_to(PACKAGE)}:{lines.start}"
        for path, lines in statements
        if not any(module == path and line in lines for module, line in reached)
    ]
    assert without_case == []


OF_NO_ARRAYS = {"LinearSample", "LogProbs", "LossMetrics"}
OF_NO_ARRAYS |= {"cpu_kernels", "use_cpu_kernels"}
OF_FUNCTIONS = {"shard_vocab", "straight_through", "with_jvp"}


@pytest.mark.parametrize(
    "name", sorted({*jaxsoft.__all__} - OF_NO_ARRAYS - OF_FUNCTIONS)
)
def test_every_function_says_what_is_no_argument_of_it(name):
    with pytest.raises(TypeError, match=f"^{name}: there is no argument 'dims'; "):
        getattr(jaxsoft, name)(dims=0)


def test_array_values_never_raise():
    """What is wrong in a value has a documented result, under jit and outside of it."""
    for call in (
        lambda: jaxsoft.softmax(X, temperature=jnp.float32(np.nan)),
        lambda: jaxsoft.cross_entropy(X, Y - 7),
        lambda: jaxsoft.cross_entropy(X, Y, label_smoothing=jnp.float32(3)),
        lambda: jaxsoft.cross_entropy(X, Y, softcap=jnp.float32(-1)),
        lambda: jaxsoft.cross_entropy(X, Y, class_weight=-jnp.ones(3)),
    ):
        assert call().shape in ((2,), (2, 3))
        assert jax.jit(call)().shape in ((2,), (2, 3))
