"""What the functions of jaxsoft mean: their formulas at 80 digits.

The formulas are taken at their word. At this precision and with exponents without limit
nothing overflows and no cancellation matters, so there is no maximum to subtract and no
guard to copy from the code under test. Logits are of shape (rows, classes), and the
classes lie along the last axis.

Derivatives of any formula are central differences at the same precision, good to 40
digits: they know nothing of softmax.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mpmath
import numpy as np

MP = mpmath.MPContext()
MP.dps = 80
# The error of a central difference is STEP^2 = 1e-48 by the formula and 1e-80 / STEP by
# rounding; that of a second one 1e-80 / STEP^2.
STEP = MP.mpf(10) ** -24
# Infinite logits stand for the limit in which they go there together.
FAR = MP.mpf(10) ** 12

Numbers = np.ndarray


def exact(value: Any) -> Numbers:
    """Floats as mpmath numbers; integers and booleans as they are."""
    value = np.asarray(value)
    if value.dtype == object or value.dtype.kind in "biu":
        return value
    return _elementwise(lambda v: MP.mpf(float(v)), value)


def rounded(value: Any) -> Numbers:
    """The nearest float64 numbers; what is out of sight is infinite."""
    return _elementwise(float, _elementwise(_seen, exact(value))).astype(np.float64)


def _elementwise(f: Callable[..., Any], *values: Numbers) -> Numbers:
    result = np.empty(values[0].shape, object)
    result[...] = np.frompyfunc(f, len(values), 1)(*values)
    return result


def _seen(v: Any) -> Any:
    return v if abs(v) < FAR / 1000 else MP.sign(v) * MP.inf


def at_limit(value: Any, far: Any = FAR) -> Numbers:
    """Infinite numbers replaced by numbers far away."""
    return _elementwise(lambda v: MP.sign(v) * far if MP.isinf(v) else v, exact(value))


# Values.


def _included_rows(
    x: Any, where: Any, temperature: Any
) -> Iterator[tuple[int, np.ndarray, Numbers, Any]]:
    """(row, indices of its included classes, its x / t there, t)."""
    x = exact(x)
    where = np.broadcast_to(True if where is None else where, x.shape)
    temperature = np.broadcast_to(exact(temperature), (len(x), 1))
    for row, (t,) in enumerate(temperature):
        included = np.flatnonzero(where[row])
        yield row, included, x[row, included] / t, t


def exp(v: Numbers) -> Numbers:
    return _elementwise(MP.exp, v)


def _log(v: Numbers) -> Numbers:
    return _elementwise(MP.log, v)


def logsumexp(
    a: Any,
    axis: int = -1,
    b: Any = None,
    where: Any = None,
    *,
    temperature: Any = 1,
) -> Numbers:
    """t log sum_i b_i exp(x_i / t)."""
    assert axis == -1
    b = np.broadcast_to(exact(1 if b is None else b), np.shape(a))
    rows = np.empty(len(a), object)
    for row, included, u, t in _included_rows(a, where, temperature):
        rows[row] = t * MP.log(np.sum(b[row, included] * exp(u)))
    return rows


def logmeanexp(
    x: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """t log mean_i exp(x_i / t)."""
    assert axis == -1
    rows = np.empty(len(x), object)
    for row, included, u, t in _included_rows(x, where, temperature):
        rows[row] = t * MP.log(np.sum(exp(u)) / len(included))
    return rows


def logcumsumexp(
    x: Any,
    axis: int = -1,
    *,
    reverse: bool = False,
    where: Any = None,
    temperature: Any = 1,
) -> Numbers:
    """t log sum_{j <= i} exp(x_j / t), or that of the j >= i."""
    assert axis == -1
    columns = np.arange(np.shape(x)[-1])
    values = np.empty(np.shape(x), object)
    for i in columns:
        prefix = columns >= i if reverse else columns <= i
        included = prefix & np.broadcast_to(
            True if where is None else where, np.shape(x)
        )
        values[:, i] = logsumexp(x, where=included, temperature=temperature)
    return values


def softmax(
    x: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """exp(x_i / t) / sum_j exp(x_j / t), and 0 outside of where."""
    assert axis == -1
    p = np.full(np.shape(x), MP.zero, object)
    for row, included, u, _ in _included_rows(x, where, temperature):
        e = exp(u)
        p[row, included] = e / np.sum(e)
    return p


def log_softmax(
    x: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """(x_i - L) / t, and -inf outside of where."""
    assert axis == -1
    log_p = np.full(np.shape(x), -MP.inf, object)
    for row, included, u, _ in _included_rows(x, where, temperature):
        log_p[row, included] = u - MP.log(np.sum(exp(u)))
    return log_p


def entropy(
    logits: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """-sum_i p_i log p_i."""
    assert axis == -1
    p = softmax(logits, where=where, temperature=temperature)
    log_p = log_softmax(logits, where=where, temperature=temperature)
    return -_sum_of_products(p, log_p)


def _sum_of_products(q: Numbers, values: Numbers) -> Numbers:
    """sum_c q_c values_c with 0 times infinity = 0."""
    return np.sum(q * np.where(q == 0, MP.zero, values), axis=-1)


def cross_entropy(
    logits: Any,
    labels: Any,
    *,
    where: Any = None,
    class_weight: Any = None,
    sample_weight: Any = None,
    ignore_index: int | None = -100,
    label_smoothing: Any = 0,
    temperature: Any = 1,
    softcap: Any = None,
    z_loss: Any = 0,
    reduction: str = "none",
) -> Numbers:
    """v ((1 - eps) sum_c q_c w_c nll_c + eps / C sum_c w_c nll_c + z lse^2)."""
    x, labels = exact(logits), exact(labels)
    rows, classes = x.shape
    if softcap is not None:
        x = _capped(x, softcap)
    included = np.broadcast_to(True if where is None else where, x.shape)
    w = np.broadcast_to(exact(1 if class_weight is None else class_weight), x.shape)
    v = np.broadcast_to(exact(1 if sample_weight is None else sample_weight), (rows,))
    eps, z = exact(label_smoothing).item(), exact(z_loss).item()

    counted = np.ones(rows, bool)
    weight_in_mean = v
    q = labels
    if labels.dtype.kind in "iu":
        if ignore_index is not None:
            counted = labels != ignore_index
        q = np.where(labels[:, None] == np.arange(classes), MP.one, MP.zero)
        weight_in_mean = v * np.sum(q * w, axis=-1)
    nll = -log_softmax(x, where=where, temperature=temperature)
    spread = _sum_of_products(np.where(included, w, MP.zero), nll)
    smooth = eps * spread / np.sum(included, axis=-1)
    row_loss = (1 - eps) * _sum_of_products(q * w, nll) + smooth
    row_loss = np.where(counted, v * row_loss, MP.zero)
    loss = _reduced(row_loss, weight_in_mean[counted], reduction)
    if not z:
        return loss
    # In a mean, class weights do not rescale this part.
    lse = [
        MP.log(np.sum(exp(u))) for _, _, u, _ in _included_rows(x, where, temperature)
    ]
    square = np.where(counted, v * z * np.array(lse) ** 2, MP.zero)
    return loss + _reduced(square, v[counted], reduction)


def _capped(x: Numbers, softcap: Any) -> Numbers:
    cap = exact(softcap).item()
    return _elementwise(lambda v: cap * MP.tanh(v / cap), x)


def _reduced(loss: Numbers, weight: Numbers, reduction: str) -> Numbers:
    if reduction == "none":
        return loss
    total = np.sum(loss)
    return np.asarray(total / np.sum(weight) if reduction == "mean" else total)


def kl_divergence(
    logits: Any,
    target_logits: Any,
    *,
    where: Any = None,
    temperature: Any = 1,
    sample_weight: Any = 1,
    reduction: str = "none",
) -> Numbers:
    """sum_i p_i (log p_i - log q_i)."""
    p = softmax(target_logits, where=where, temperature=temperature)
    log_p = log_softmax(target_logits, where=where, temperature=temperature)
    log_q = log_softmax(logits, where=where, temperature=temperature)
    # Classes outside of where are at -inf in both.
    ratio = _elementwise(lambda a, b: MP.zero if a == b else a - b, log_p, log_q)
    v = np.broadcast_to(exact(sample_weight), len(p))
    return _reduced(v * _sum_of_products(p, ratio), v, reduction)


def jensen_shannon(
    logits: Any,
    target_logits: Any,
    *,
    beta: float = 0.5,
    where: Any = None,
    temperature: Any = 1,
    sample_weight: Any = 1,
    reduction: str = "none",
) -> Numbers:
    """beta sum_i p_i log(p_i / m_i) + (1 - beta) sum_i q_i log(q_i / m_i)."""
    options = {"where": where, "temperature": temperature}
    p, q = softmax(target_logits, **options), softmax(logits, **options)
    share = MP.mpf(beta)
    m = share * p + (1 - share) * q

    def kl(a: Numbers, b: Numbers) -> Numbers:
        # Classes outside of where are 0 in all three.
        ratio = _elementwise(lambda a, b: MP.log(a / b) if a else MP.zero, a, b)
        return np.sum(a * ratio, axis=-1)

    js = share * kl(p, m) + (1 - share) * kl(q, m)
    v = np.broadcast_to(exact(sample_weight), len(p))
    return _reduced(v * js, v, reduction)


def _softplus(v: Numbers) -> Numbers:
    return _log(1 + exp(v))


def binary_cross_entropy(
    logits: Any,
    labels: Any,
    *,
    pos_weight: Any = 1,
    sample_weight: Any = 1,
    label_smoothing: Any = 0,
    reduction: str = "none",
) -> Numbers:
    """v (w y softplus(-x) + (1 - y) softplus(x)), y smoothed to (1 - eps) y + eps/2."""
    x, eps = exact(logits), exact(label_smoothing).item()
    y = (1 - eps) * exact(labels) + eps / 2
    loss = exact(pos_weight) * y * _softplus(-x) + (1 - y) * _softplus(x)
    v = np.broadcast_to(exact(sample_weight), x.shape)
    return _reduced(v * loss, v, reduction)


def multilabel_cross_entropy(
    logits: Any, labels: Any, *, where: Any = None, reduction: str = "none"
) -> Numbers:
    """log(1 + sum_no exp(s)) + log(1 + sum_yes exp(-s))."""
    s, yes = exact(logits), exact(labels) > 0.5
    counts = np.broadcast_to(True if where is None else where, s.shape)
    no_sum = np.sum(np.where(counts & ~yes, exp(s), MP.zero), axis=-1)
    yes_sum = np.sum(np.where(counts & yes, exp(-s), MP.zero), axis=-1)
    loss = _log(1 + no_sum) + _log(1 + yes_sum)
    return _reduced(loss, np.ones(len(loss)), reduction)


def circle_loss(
    positives: Any,
    negatives: Any,
    *,
    margin: Any = 0.25,
    scale: Any = 256.0,
    where_positive: Any = None,
    where_negative: Any = None,
    detach_weights: bool = True,
    weights: tuple[Numbers, Numbers] | None = None,
    reduction: str = "none",
) -> Numbers:
    """log(1 + sum exp(scale a_n (s_n - m)) sum exp(-scale a_p (s_p - 1 + m))).

    Detached weights are constants of every derivative: pass them as `weights`.
    """
    assert weights is not None or not detach_weights
    s_p, s_n = exact(positives), exact(negatives)
    m, gamma = exact(margin).item(), exact(scale).item()
    a_p, a_n = weights or circle_weights(s_p, s_n, m)
    sums = [
        np.sum(np.where(True if mask is None else mask, exp(u), MP.zero), axis=-1)
        for u, mask in (
            (gamma * a_n * (s_n - m), where_negative),
            (-gamma * a_p * (s_p - 1 + m), where_positive),
        )
    ]
    loss = _log(1 + sums[0] * sums[1])
    return _reduced(loss, np.ones(len(loss)), reduction)


def circle_weights(
    positives: Any, negatives: Any, margin: Any
) -> tuple[Numbers, Numbers]:
    """max(1 + m - s_p, 0) and max(s_n + m, 0)."""
    m = exact(margin).item()
    positive = _elementwise(lambda v: max(v, MP.zero), 1 + m - exact(positives))
    negative = _elementwise(lambda v: max(v, MP.zero), exact(negatives) + m)
    return positive, negative


def boltzmann_max(
    x: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """sum_i p_i x_i."""
    p = softmax(x, axis, where, temperature=temperature)
    return _sum_of_products(p, exact(x))


def softargmax(
    x: Any,
    axis: int = -1,
    where: Any = None,
    *,
    temperature: Any = 1,
    positions: Any = None,
) -> Numbers:
    """sum_i p_i i, or sum_i p_i positions_i."""
    p = softmax(x, axis, where, temperature=temperature)
    if positions is None:
        positions = np.arange(np.shape(x)[-1])
    return _sum_of_products(p, np.broadcast_to(exact(positions), p.shape))


def smooth_max(
    x: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """t log sum_i exp(x_i / t)."""
    return logsumexp(x, axis, where=where, temperature=temperature)


def smooth_min(
    x: Any, axis: int = -1, where: Any = None, *, temperature: Any = 1
) -> Numbers:
    """-t log sum_i exp(-x_i / t)."""
    return logsumexp(x, axis, where=where, temperature=-exact(temperature))


def softplus(x: Any, *, temperature: Any = 1) -> Numbers:
    """t log(1 + exp(x / t))."""
    t = exact(temperature)
    return t * _softplus(exact(x) / t)


def smooth_abs(x: Any, *, temperature: Any = 1) -> Numbers:
    """t log(exp(x / t) + exp(-x / t))."""
    return smooth_maximum(x, -exact(x), temperature=temperature)


def smooth_sign(x: Any, *, temperature: Any = 1) -> Numbers:
    """tanh(x / t)."""
    return _elementwise(MP.tanh, exact(x) / exact(temperature))


def smooth_step(x: Any, *, temperature: Any = 1) -> Numbers:
    """1 / (1 + exp(-x / t))."""
    return 1 / (1 + exp(-exact(x) / exact(temperature)))


def smooth_maximum(x: Any, y: Any, *, temperature: Any = 1) -> Numbers:
    """t log(exp(x / t) + exp(y / t))."""
    t = exact(temperature)
    return t * _log(exp(exact(x) / t) + exp(exact(y) / t))


def smooth_minimum(x: Any, y: Any, *, temperature: Any = 1) -> Numbers:
    """-t log(exp(-x / t) + exp(-y / t))."""
    return -smooth_maximum(-exact(x), -exact(y), temperature=temperature)


def smooth_clip(x: Any, lower: Any, upper: Any, *, temperature: Any = 1) -> Numbers:
    """lower + softplus(x - lower) - softplus(x - upper), at |t|."""
    x, lower, upper = exact(x), exact(lower), exact(upper)
    t = np.abs(exact(temperature))
    rise, fall = (softplus(x - v, temperature=t) for v in (lower, upper))
    return lower + rise - fall


def _linear_logits(hidden: Any, vocab_weight: Any, vocab_bias: Any) -> Numbers:
    return exact(hidden) @ exact(vocab_weight).T + exact(vocab_bias)


def linear_cross_entropy(
    hidden: Any, vocab_weight: Any, labels: Any, *, vocab_bias: Any = 0, **options: Any
) -> Numbers:
    """cross_entropy of hidden vocab_weight^T + vocab_bias."""
    logits = _linear_logits(hidden, vocab_weight, vocab_bias)
    return cross_entropy(logits, labels, **options)


def linear_jensen_shannon(
    hidden: Any,
    vocab_weight: Any,
    target_hidden: Any,
    target_vocab_weight: Any,
    *,
    vocab_bias: Any = 0,
    **options: Any,
) -> Numbers:
    """jensen_shannon of the two heads' logits."""
    logits = _linear_logits(hidden, vocab_weight, vocab_bias)
    target_logits = _linear_logits(target_hidden, target_vocab_weight, 0)
    return jensen_shannon(logits, target_logits, **options)


def linear_log_probs(
    hidden: Any,
    vocab_weight: Any,
    labels: Any,
    *,
    vocab_bias: Any = 0,
    temperature: Any = 1,
    softcap: Any = None,
) -> Numbers:
    """log p of the label, log sum exp and entropy of the logits; one column each."""
    x = _linear_logits(hidden, vocab_weight, vocab_bias)
    x = x if softcap is None else _capped(x, softcap)
    u = x / np.broadcast_to(exact(temperature), (len(x), 1))
    of_label = log_softmax(u)[np.arange(len(u)), labels]
    return np.stack([of_label, logsumexp(u), entropy(u)], axis=-1)


# Derivatives.


def is_float(value: Any) -> bool:
    return np.asarray(value).dtype.kind not in "biu"


def jacobian(f: Callable[..., Numbers], arguments: Sequence[Any]) -> list[Any]:
    """d f_o / d a_i for every floating argument a, of shape f.shape + a.shape."""
    arguments = [exact(a) for a in arguments]
    jacobians: list[Any] = [None] * len(arguments)
    for position, a in enumerate(arguments):
        if is_float(a):
            columns = []
            for index in np.ndindex(a.shape):
                direction = np.full(a.shape, MP.zero, object)
                direction[index] = MP.one
                columns.append(_derivative_along(f, arguments, {position: direction}))
            stacked = np.stack(columns, axis=-1)
            jacobians[position] = stacked.reshape(stacked.shape[:-1] + a.shape)
    return jacobians


def _moved(arguments: Any, tangents: dict[int, Numbers], step: Any) -> list[Numbers]:
    return [
        np.asarray(a + step * tangents[i]) if i in tangents else a
        for i, a in enumerate(arguments)
    ]


def _slope(ahead: Any, behind: Any) -> Numbers:
    """Of a central difference; an infinite value that stays is constant."""
    change = _elementwise(
        lambda a, b: MP.zero if a == b else a - b, *map(np.asarray, (ahead, behind))
    )
    return change / (2 * STEP)


def _derivative_along(
    f: Callable[..., Any], arguments: Sequence[Numbers], tangents: dict[int, Numbers]
) -> Any:
    return _slope(*(f(*_moved(arguments, tangents, step)) for step in (STEP, -STEP)))


def pullback(
    f: Callable[..., Numbers],
    arguments: Sequence[Any],
    cotangent: Any,
    have_rows: Sequence[bool] = (),
) -> list[Any]:
    """sum_o cotangent_o d f_o / d a, for every floating argument a.

    On a row of an argument that has rows only that row of f depends: all move at once.
    """
    arguments, cotangent = [exact(a) for a in arguments], exact(cotangent)
    gradients: list[Any] = []
    for position, a in enumerate(arguments):
        every_row = (slice(None),) if have_rows and have_rows[position] else ()
        gradient = np.empty(a.shape, object)
        for index in np.ndindex(a.shape[len(every_row) :] if is_float(a) else (0,)):
            direction = np.full(a.shape, MP.zero, object)
            direction[every_row + index] = MP.one
            change = _derivative_along(f, arguments, {position: direction})
            within_row = tuple(range(len(every_row), np.ndim(cotangent)))
            gradient[every_row + index] = np.sum(cotangent * change, within_row)
        gradients.append(gradient if is_float(a) else None)
    return gradients


def curvature_along(
    f: Callable[..., Numbers],
    arguments: Sequence[Any],
    cotangent: Any,
    tangents: Sequence[Any],
) -> list[Any]:
    """The derivative of `pullback` along the tangents: hessian times tangent."""
    arguments = [exact(a) for a in arguments]
    moves = {i: exact(t) for i, t in enumerate(tangents) if t is not None}
    both = (
        pullback(f, _moved(arguments, moves, step), cotangent) for step in (STEP, -STEP)
    )
    return [None if a is None else _slope(a, b) for a, b in zip(*both, strict=True)]


# At the edges: infinities, and temperatures down to 0.

COLD = MP.mpf(10) ** -45  # stands for temperature 0


def value_and_slopes(
    f: Callable[..., Numbers], arguments: Sequence[Any], temperature: Any
) -> list[np.ndarray]:
    """Of f(*arguments, temperature=temperature), whose rows depend on the same rows of
    the arguments alone: its value, and its derivatives in every column of every
    argument and in the temperature, in float64.

    A derivative that diverges as the temperature goes to 0 is 0 by convention.
    """
    with MP.workdps(150):
        cold = np.abs(temperature) < np.finfo(np.float32).tiny
        moving = [*map(exact, arguments), np.where(cold, COLD, exact(temperature))]
        step = MP.mpf(10) ** -30 * np.minimum(1, np.abs(moving[-1]))

        def at(position: int = 0, column: int = 0, move: Any = 0) -> Numbers:
            moved = list(moving)
            moved[position] = moving[position].copy()
            moved[position][:, column] += (move * step)[:, 0]
            *numbers, t = moved
            return f(*numbers, temperature=t).reshape(step.shape)

        slopes = [
            np.concatenate(
                [(at(i, c, 1) - at(i, c, -1)) / (2 * step) for c in range(a.shape[1])],
                axis=1,
            )
            for i, a in enumerate(moving)
        ]
        value, *slopes = map(rounded, [at(), *slopes])
    return [value, *(np.where(cold & np.isinf(s), 0, s) for s in slopes)]


# Closed forms, for rows too long to difference.


def cross_entropy_gradient(p: Numbers, labels: Any) -> Numbers:
    """p - one_hot(y), for p = softmax(x)."""
    gradient = p.copy()
    gradient[np.arange(len(p)), labels] -= 1
    return gradient


def softmax_pullback(p: Numbers, cotangent: Any) -> Numbers:
    """p_i (g_i - sum_j p_j g_j)."""
    g = exact(cotangent)
    return p * (g - np.sum(p * g, axis=-1, keepdims=True))


def log_softmax_pullback(p: Numbers, cotangent: Any) -> Numbers:
    """g_i - p_i sum_j g_j."""
    g = exact(cotangent)
    return g - p * np.sum(g, axis=-1, keepdims=True)
