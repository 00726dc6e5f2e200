"""jaxsoft: the softmax family for JAX training code.

Pure, jittable functions that are right at the edges (at ±1000 and at infinity, under a
mask, in half precision, when a model is sure of its answer) and that can be
differentiated in both modes, to any order.
"""

from jaxsoft._autodiff import with_jvp as with_jvp
from jaxsoft._cross_entropy import cross_entropy as cross_entropy
from jaxsoft._logsumexp import logmeanexp as logmeanexp
from jaxsoft._logsumexp import logsumexp as logsumexp
from jaxsoft._softmax import entropy as entropy
from jaxsoft._softmax import log_softmax as log_softmax
from jaxsoft._softmax import softmax as softmax

__version__ = "0.1.0"

__all__ = [
    "cross_entropy",
    "entropy",
    "log_softmax",
    "logmeanexp",
    "logsumexp",
    "softmax",
    "with_jvp",
]
