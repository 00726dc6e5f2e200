"""jaxsoft: the softmax family for JAX training code.

Pure, jittable functions that are right at the edges (at ±1000 and at infinity, under a
mask, in half precision, when a model is sure of its answer) and that can be
differentiated in both modes, to any order.
"""

from jaxsoft._autodiff import with_jvp as with_jvp
from jaxsoft._binary import binary_cross_entropy as binary_cross_entropy
from jaxsoft._binary import circle_loss as circle_loss
from jaxsoft._binary import multilabel_cross_entropy as multilabel_cross_entropy
from jaxsoft._cross_entropy import cross_entropy as cross_entropy
from jaxsoft._kl_divergence import kl_divergence as kl_divergence
from jaxsoft._linear import LogProbs as LogProbs
from jaxsoft._linear import linear_cross_entropy as linear_cross_entropy
from jaxsoft._linear import linear_log_probs as linear_log_probs
from jaxsoft._logsumexp import logmeanexp as logmeanexp
from jaxsoft._logsumexp import logsumexp as logsumexp
from jaxsoft._softmax import entropy as entropy
from jaxsoft._softmax import log_softmax as log_softmax
from jaxsoft._softmax import softmax as softmax

__version__ = "0.1.0"

__all__ = [
    "LogProbs",
    "binary_cross_entropy",
    "circle_loss",
    "cross_entropy",
    "entropy",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_log_probs",
    "log_softmax",
    "logmeanexp",
    "logsumexp",
    "multilabel_cross_entropy",
    "softmax",
    "with_jvp",
]
