"""jaxsoft: the softmax family for JAX training code.

Pure, jittable functions that are right at the edges (at ±1000 and at infinity, under a
mask, in half precision, when a model is sure of its answer) and that can be
differentiated in both modes, to any order.
"""

from jaxsoft._autodiff import with_jvp as with_jvp
from jaxsoft._gumbel import gumbel_softmax as gumbel_softmax
from jaxsoft._linear.api import LogProbs as LogProbs
from jaxsoft._linear.api import linear_cross_entropy as linear_cross_entropy
from jaxsoft._linear.api import linear_log_probs as linear_log_probs
from jaxsoft._linear.distillation import linear_jensen_shannon as linear_jensen_shannon
from jaxsoft._linear.distillation import linear_kl_divergence as linear_kl_divergence
from jaxsoft._linear.sample import LinearSample as LinearSample
from jaxsoft._linear.sample import linear_sample as linear_sample
from jaxsoft._logsumexp import logmeanexp as logmeanexp
from jaxsoft._logsumexp import logsumexp as logsumexp
from jaxsoft._losses.binary import binary_cross_entropy as binary_cross_entropy
from jaxsoft._losses.binary import circle_loss as circle_loss
from jaxsoft._losses.binary import multilabel_cross_entropy as multilabel_cross_entropy
from jaxsoft._losses.cross_entropy import cross_entropy as cross_entropy
from jaxsoft._losses.kl_divergence import jensen_shannon as jensen_shannon
from jaxsoft._losses.kl_divergence import kl_divergence as kl_divergence
from jaxsoft._losses.loss_weight import loss_weight as loss_weight
from jaxsoft._losses.per_row import LossMetrics as LossMetrics
from jaxsoft._passes.switch import cpu_kernels as cpu_kernels
from jaxsoft._passes.switch import use_cpu_kernels as use_cpu_kernels
from jaxsoft._prefix import logcumsumexp as logcumsumexp
from jaxsoft._segments import segment_log_softmax as segment_log_softmax
from jaxsoft._segments import segment_logsumexp as segment_logsumexp
from jaxsoft._segments import segment_softmax as segment_softmax
from jaxsoft._sharding import shard_vocab as shard_vocab
from jaxsoft._smooth.clip import smooth_clip as smooth_clip
from jaxsoft._smooth.elementwise import smooth_abs as smooth_abs
from jaxsoft._smooth.elementwise import smooth_maximum as smooth_maximum
from jaxsoft._smooth.elementwise import smooth_minimum as smooth_minimum
from jaxsoft._smooth.elementwise import smooth_sign as smooth_sign
from jaxsoft._smooth.elementwise import smooth_step as smooth_step
from jaxsoft._smooth.elementwise import softplus as softplus
from jaxsoft._smooth.max import boltzmann_max as boltzmann_max
from jaxsoft._smooth.max import smooth_max as smooth_max
from jaxsoft._smooth.max import smooth_min as smooth_min
from jaxsoft._smooth.softargmax import softargmax as softargmax
from jaxsoft._smooth.straight_through import straight_through as straight_through
from jaxsoft._softmax import entropy as entropy
from jaxsoft._softmax import log_softmax as log_softmax
from jaxsoft._softmax import softmax as softmax

__version__ = "0.2.0"

__all__ = [
    "LinearSample",
    "LogProbs",
    "LossMetrics",
    "binary_cross_entropy",
    "boltzmann_max",
    "circle_loss",
    "cpu_kernels",
    "cross_entropy",
    "entropy",
    "gumbel_softmax",
    "jensen_shannon",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_jensen_shannon",
    "linear_kl_divergence",
    "linear_log_probs",
    "linear_sample",
    "log_softmax",
    "logcumsumexp",
    "logmeanexp",
    "logsumexp",
    "loss_weight",
    "multilabel_cross_entropy",
    "segment_log_softmax",
    "segment_logsumexp",
    "segment_softmax",
    "shard_vocab",
    "smooth_abs",
    "smooth_clip",
    "smooth_max",
    "smooth_maximum",
    "smooth_min",
    "smooth_minimum",
    "smooth_sign",
    "smooth_step",
    "softargmax",
    "softmax",
    "softplus",
    "straight_through",
    "use_cpu_kernels",
    "with_jvp",
]
