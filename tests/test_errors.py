"""Every raise of the library: its class, its text, and that none is without a case.

A message reads `function: what must hold; got what was passed`.
"""

import ast
import pathlib
import traceback
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import jaxsoft
from jaxsoft import _checks

PACKAGE = pathlib.Path(jaxsoft.__file__).parent
# These modules have the cases of their raises in the tests that bear their name.
TESTED_BESIDE = ("_linear", "_smooth", "_softargmax", "_straight_through", "_sharding")

X = jnp.zeros((2, 3))
Y = jnp.zeros(2, jnp.int32)
COMPLEX = jnp.zeros((2, 3), jnp.complex64)

CASES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "not an array": (
        lambda: jaxsoft.softmax("logits"),
        TypeError,
        "softmax: x must be an array of numbers; got str",
    ),
    "a ragged list": (
        lambda: jaxsoft.logsumexp([[1.0], [1.0, 2.0]]),
        TypeError,
        "logsumexp: a must be an array of numbers; got list",
    ),
    "a key is no array of numbers": (
        lambda: jaxsoft.entropy(jax.random.key(0)),
        TypeError,
        "entropy: logits must be an array of numbers; got PRNGKeyArray",
    ),
    "boolean logits": (
        lambda: jaxsoft.log_softmax(X > 0),
        TypeError,
        "log_softmax: x must be numbers; got a boolean array",
    ),
    "complex logits of a real function": (
        lambda: jaxsoft.cross_entropy(COMPLEX, Y),
        TypeError,
        "cross_entropy: logits must be real; got dtype complex64",
    ),
    "complex temperature": (
        lambda: jaxsoft.softmax(X, temperature=1j),
        TypeError,
        "softmax: temperature must be real; got dtype complex64",
    ),
    "axis of floats": (
        lambda: jaxsoft.softmax(X, axis=1.0),
        TypeError,
        "softmax: axis must be an int, a tuple of ints or None; got 1.0",
    ),
    "boolean axis": (
        lambda: jaxsoft.logmeanexp(X, axis=(0, True)),
        TypeError,
        "logmeanexp: axis must be an int, a tuple of ints or None; got (0, True)",
    ),
    "axis out of range": (
        lambda: jaxsoft.entropy(X, axis=(0, 2)),
        ValueError,
        "entropy: axis must lie in [-2, 2) for 2 dimensions; got (0, 2)",
    ),
    "axis of a scalar": (
        lambda: jaxsoft.softmax(1.0),
        ValueError,
        "softmax: axis must lie in [0, 0) for 0 dimensions; got -1",
    ),
    "axis repeated": (
        lambda: jaxsoft.log_softmax(X, axis=(1, -1)),
        ValueError,
        "log_softmax: axis must not repeat a dimension; got (1, -1)",
    ),
    "keepdims not a flag": (
        lambda: jaxsoft.logsumexp(X, keepdims=1),
        TypeError,
        "logsumexp: keepdims must be True or False; got 1",
    ),
    "return_sign not a flag": (
        lambda: jaxsoft.logsumexp(X, return_sign=None),
        TypeError,
        "logsumexp: return_sign must be True or False; got None",
    ),
    "mask of numbers": (
        lambda: jaxsoft.softmax(X, where=jnp.ones(3)),
        TypeError,
        "softmax: where must be boolean; got dtype float32. For numbers 0 and 1 write "
        "where != 0",
    ),
    "mask of another shape": (
        lambda: jaxsoft.softmax(X, where=jnp.ones(2, bool)),
        ValueError,
        "softmax: where must broadcast to the logits' shape (2, 3); got (2,). For one "
        "entry per row write where[..., None]",
    ),
    "mask of rows": (
        lambda: jaxsoft.cross_entropy(X, Y, where=Y == 0),
        ValueError,
        "cross_entropy: where must broadcast to the logits' shape (2, 3); got (2,). To "
        "leave out a row set its label to ignore_index",
    ),
    "mask that enlarges": (
        lambda: jaxsoft.cross_entropy(X, Y, where=jnp.ones((4, 2, 3), bool)),
        ValueError,
        "cross_entropy: where must broadcast to the logits' shape (2, 3); "
        "got (4, 2, 3)",
    ),
    "temperature per class": (
        lambda: jaxsoft.softmax(X, temperature=jnp.ones(3)),
        ValueError,
        "softmax: temperature must broadcast to the reduced result with the reduced "
        "axes kept, shape (2, 1); got (3,)",
    ),
    "temperature that enlarges": (
        lambda: jaxsoft.logsumexp(X, temperature=jnp.ones((2, 1))),
        ValueError,
        "logsumexp: temperature must broadcast to the reduced result with the reduced "
        "axes kept, shape (1, 1); got (2, 1)",
    ),
    "temperature of complex logits": (
        lambda: jaxsoft.logsumexp(COMPLEX, temperature=2.0),
        TypeError,
        "logsumexp: temperature needs real input; got complex64 with temperature 2.0",
    ),
    "axis_name outside of shard_map": (
        lambda: jaxsoft.softmax(X, axis_name="vocab"),
        ValueError,
        "softmax: axis_name must name mesh axes of an enclosing jax.shard_map; "
        "got 'vocab'",
    ),
    "axis_name of complex logits": (
        lambda: jax.shard_map(
            lambda x: jaxsoft.softmax(x, axis_name="vocab"),
            mesh=jax.make_mesh((1,), ("vocab",), (AxisType.Auto,)),
            in_specs=PartitionSpec(None, "vocab"),
            out_specs=PartitionSpec(None, "vocab"),
        )(COMPLEX),
        TypeError,
        "softmax: axis_name needs real input; got complex64",
    ),
    "weights of another shape": (
        lambda: jaxsoft.logsumexp(X, b=jnp.ones(2)),
        ValueError,
        "logsumexp: a and b must broadcast together; got shapes (2, 3) and (2,)",
    ),
    "unknown reduction": (
        lambda: jaxsoft.cross_entropy(X, Y, reduction="batchmean"),
        ValueError,
        "cross_entropy: reduction must be one of ('none', 'sum', 'mean'); "
        "got 'batchmean'",
    ),
    "index labels of another shape": (
        lambda: jaxsoft.cross_entropy(X, jnp.zeros(1, jnp.int32)),
        ValueError,
        "cross_entropy: integer labels must have the logits' shape without the class "
        "axis, (2,); got labels (1,) for logits (2, 3)",
    ),
    "one-hot labels of integers": (
        lambda: jaxsoft.cross_entropy(X, jnp.zeros((2, 3), jnp.int32)),
        ValueError,
        "cross_entropy: integer labels must have the logits' shape without the class "
        "axis, (2,); got labels (2, 3) for logits (2, 3). For one-hot labels or "
        "probabilities use a floating dtype",
    ),
    "boolean labels": (
        lambda: jaxsoft.cross_entropy(X, X > 0),
        TypeError,
        "cross_entropy: labels must be integers (class indices) or floats "
        "(probabilities); got dtype bool. For one-hot labels write "
        "labels.astype(jnp.float32)",
    ),
    "labels with the class axis kept": (
        lambda: jaxsoft.cross_entropy(X, Y[:, None]),
        ValueError,
        "cross_entropy: integer labels must have the logits' shape without the class "
        "axis, (2,); got labels (2, 1) for logits (2, 3). Write "
        "jnp.squeeze(labels, (1,))",
    ),
    "classes along another axis": (
        lambda: jaxsoft.cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4), int)),
        ValueError,
        "cross_entropy: integer labels must have the logits' shape without the class "
        "axis, (2, 3); got labels (2, 4) for logits (2, 3, 4). For classes along axis "
        "1 write axis=1",
    ),
    "labels before logits": (
        lambda: jaxsoft.cross_entropy(Y, X),
        ValueError,
        "cross_entropy: floating labels are probabilities and must have the logits' "
        "shape (2,); got (2, 3). The order is cross_entropy(logits, labels)",
    ),
    "label probabilities of another shape": (
        lambda: jaxsoft.cross_entropy(X, jnp.zeros((1, 3))),
        ValueError,
        "cross_entropy: floating labels are probabilities and must have the logits' "
        "shape (2, 3); got (1, 3)",
    ),
    "class indices as floats": (
        lambda: jaxsoft.cross_entropy(X, jnp.zeros(2)),
        ValueError,
        "cross_entropy: floating labels are probabilities and must have the logits' "
        "shape (2, 3); got (2,). For class indices use an integer dtype",
    ),
    "ignore_index of another kind": (
        lambda: jaxsoft.cross_entropy(X, Y, ignore_index=-1.0),
        TypeError,
        "cross_entropy: ignore_index must be an int or None; got -1.0",
    ),
    "boolean ignore_index": (
        lambda: jaxsoft.cross_entropy(X, Y, ignore_index=False),
        TypeError,
        "cross_entropy: ignore_index must be an int or None; got False",
    ),
    "z_loss per row": (
        lambda: jaxsoft.cross_entropy(X, Y, z_loss=jnp.ones(2)),
        ValueError,
        "cross_entropy: z_loss must be a scalar; got (2,)",
    ),
    "softcap of 0": (
        lambda: jaxsoft.cross_entropy(X, Y, softcap=0),
        ValueError,
        "cross_entropy: softcap must be positive; got 0",
    ),
    "softcap NaN": (
        lambda: jaxsoft.cross_entropy(X, Y, softcap=np.nan),
        ValueError,
        "cross_entropy: softcap must be positive; got nan",
    ),
    "negative softcap of numpy": (
        lambda: jaxsoft.cross_entropy(X, Y, softcap=np.float32(-1)),
        ValueError,
        "cross_entropy: softcap must be positive; got -1.0",
    ),
    "label_smoothing of numpy below 0": (
        lambda: jaxsoft.cross_entropy(X, Y, label_smoothing=np.array(-0.5)),
        ValueError,
        "cross_entropy: label_smoothing must lie in [0, 1]; got -0.5",
    ),
    "temperature per row without the axis": (
        lambda: jaxsoft.cross_entropy(X, Y, temperature=jnp.ones(2)),
        ValueError,
        "cross_entropy: temperature must broadcast to the reduced result with the "
        "reduced axes kept, shape (2, 1); got (2,). Write "
        "jnp.expand_dims(temperature, (1,))",
    ),
    "label_smoothing above 1": (
        lambda: jaxsoft.cross_entropy(X, Y, label_smoothing=1.1),
        ValueError,
        "cross_entropy: label_smoothing must lie in [0, 1]; got 1.1",
    ),
    "class_weight of another shape": (
        lambda: jaxsoft.cross_entropy(X, Y, class_weight=jnp.ones(2)),
        ValueError,
        "cross_entropy: class_weight must have one entry per class, shape (3,); "
        "got (2,)",
    ),
    "sample_weight of another shape": (
        lambda: jaxsoft.cross_entropy(X, Y, sample_weight=jnp.ones(3)),
        ValueError,
        "cross_entropy: sample_weight must broadcast to the shape of the losses (2,); "
        "got (3,)",
    ),
    "index labels that are no integers": (
        lambda: _checks.as_index_labels("f", X[:, 0], (2,), "the tokens' shape"),
        TypeError,
        "f: labels must be integers (class indices); got dtype float32",
    ),
    "index labels of another shape than the rows": (
        lambda: _checks.as_index_labels("f", Y, (3,), "the tokens' shape"),
        ValueError,
        "f: labels must have the tokens' shape (3,); got (2,)",
    ),
    "kl_divergence of two shapes": (
        lambda: jaxsoft.kl_divergence(X, X[:1]),
        ValueError,
        "kl_divergence: target_logits and logits must have the same shape; got (2, 3) "
        "and (1, 3)",
    ),
    "complex binary labels": (
        lambda: jaxsoft.binary_cross_entropy(X, COMPLEX),
        TypeError,
        "binary_cross_entropy: labels must be real; got dtype complex64",
    ),
    "binary labels of another shape": (
        lambda: jaxsoft.multilabel_cross_entropy(X, X[0]),
        ValueError,
        "multilabel_cross_entropy: labels must have the logits' shape (2, 3); got (3,)",
    ),
    "similarities without an axis": (
        lambda: jaxsoft.circle_loss(X, 0.0),
        ValueError,
        "circle_loss: positives and negatives must have a last axis; got shapes "
        "(2, 3) and ()",
    ),
    "similarities of other anchors": (
        lambda: jaxsoft.circle_loss(X, X[:1]),
        ValueError,
        "circle_loss: positives and negatives must have the same leading shape; got "
        "(2, 3) and (1, 3)",
    ),
    "with_jvp of a plain function": (
        lambda: jaxsoft.with_jvp(sorted),
        TypeError,
        "with_jvp: f must be a jax.custom_vjp function; got "
        "builtin_function_or_method 'sorted'. Plain functions have both modes already.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_class_and_text(case):
    call, error, text = CASES[case]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == text


def _raise_statements() -> list[tuple[str, range]]:
    """(module, lines) of every raise, outside of the modules tested beside it."""
    return [
        (path.name, range(node.lineno, (node.end_lineno or node.lineno) + 1))
        for path in PACKAGE.glob("*.py")
        if not path.stem.startswith(TESTED_BESIDE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise)
    ]


def _raised_at(call: Callable[[], object]) -> tuple[str, int] | None:
    try:
        call()
    except Exception as error:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            path = pathlib.Path(frame.filename)
            if path.parent == PACKAGE:
                return path.name, frame.lineno
    return None


def test_every_raise_has_a_case():
    """Add a case above for every new raise."""
    statements = _raise_statements()
    assert len(statements) > 20
    reached = [_raised_at(call) for call, _, _ in CASES.values()]
    without_case = [
        f"{module}:{lines.start}"
        for module, lines in statements
        if not any(at and at[0] == module and at[1] in lines for at in reached)
    ]
    assert without_case == []


FUNCTIONS = {
    "logsumexp": lambda x, **options: jaxsoft.logsumexp(x, **options),
    "logmeanexp": lambda x, **options: jaxsoft.logmeanexp(x, **options),
    "softmax": lambda x, **options: jaxsoft.softmax(x, **options),
    "log_softmax": lambda x, **options: jaxsoft.log_softmax(x, **options),
    "entropy": lambda x, **options: jaxsoft.entropy(x, **options),
    "cross_entropy": lambda x, **options: jaxsoft.cross_entropy(x, Y, **options),
    "kl_divergence": lambda x, **options: jaxsoft.kl_divergence(x, x, **options),
    "multilabel_cross_entropy": lambda x, **options: jaxsoft.multilabel_cross_entropy(
        x, Y, **options
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_names_itself(name):
    """The checks are shared; each caller passes its own name and all its options."""
    function = FUNCTIONS[name]
    takes_temperature = name != "multilabel_cross_entropy"
    bad = {
        "where": jnp.ones(3),
        "axis": 7,
        **({"temperature": jnp.ones((5, 5))} if takes_temperature else {}),
    }
    for option, value in bad.items():
        shape = Y.shape if name == "multilabel_cross_entropy" else X.shape
        with pytest.raises((TypeError, ValueError), match=rf"^{name}: {option} must "):
            function(jnp.zeros(shape), **{option: value})
    with pytest.raises(TypeError, match=rf"^{name}: .* must be "):
        function("logits")


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
