"""What DAFL asks of generated images, by a trained network alone: that it be sure of them, respond to them, and find
all classes among them.

Chen et al.: Data-Free Learning of Student Networks. ICCV 2019, arXiv 1904.01186.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from kdbench.losses.checks import full, positive, shape


def one_hot(logits: Tensor) -> Tensor:
    r"""Cross-entropy of outputs with the classes that they themselves rank first, averaged over the batch, in nats.

    $$
    L_{oh} = -\frac{1}{N} \sum_n \max_k \log p_{nk}, \qquad p = \operatorname{softmax}(z)
    $$

    Args:
        logits: [N, K].

    Returns:
        Scalar in [0, log K]. It is 0 if the network is sure of every image.

    Raises:
        ValueError: The logits are not a batch [N, K].
    """
    return -F.log_softmax(_batch(logits, "one_hot"), dim=1).amax(dim=1).mean()


def activation_strength(features: Tensor) -> Tensor:
    r"""How strongly a layer responds, negated: the mean of the absolute values over all elements.

    $$
    L_a = -\frac{1}{N D} \sum_{n,d} |f_{nd}|
    $$

    The authors' code averages over elements. The feature is what enters the last layer.

    Args:
        features: [N, ...].

    Returns:
        Scalar, at most 0.

    Raises:
        ValueError: The features are not a batch [N, ...].
    """
    if features.ndim < 2 or len(features) == 0:
        raise ValueError(f"activation_strength needs a batch [N, ...]: {shape(features)}")
    return -full(features).abs().mean()


def class_balance(logits: Tensor, base: float = 10.0) -> Tensor:
    r"""Negative entropy of the classes of a whole batch: it is lowest where all are equally frequent.

    $$
    L_{ie} = \sum_k \bar p_k \log_b \bar p_k, \qquad \bar p_k = \frac{1}{N} \sum_n \operatorname{softmax}(z_n)_k
    $$

    A class whose mean probability is 0 in its precision adds 0, as in the limit; in the authors' code it makes the loss
    NaN.

    Args:
        logits: [N, K].
        base: b, of the logarithm, above 1. The authors' code has 10, DataFree e.

    Returns:
        Scalar in [-log_b K, 0].

    Raises:
        ValueError: The logits are not a batch [N, K], or there is no such logarithm.
    """
    positive(base - 1, "base - 1")
    log_p = F.log_softmax(_batch(logits, "class_balance"), dim=1)
    # The logarithm of the mean from logarithms: a rare class keeps its gradient.
    log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))
    return (log_mean.exp() * log_mean).sum() / math.log(base)


def _batch(logits: Tensor, loss: str) -> Tensor:
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"{loss} needs logits [N, K]: {shape(logits)}")
    return full(logits)
