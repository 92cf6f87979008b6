r"""Contrastive model inversion (CMI): images that a network can tell from each other.

Fang et al.: Contrastive Model Inversion for Data-Free Knowledge Distillation. IJCAI 2021, arXiv 2105.08584.

A generator's parameters and its inputs are fitted so that these are small for its images x:

$$
\alpha_{bn} R_{feature}(x) + \alpha_{oh} \mathrm{CE}(f(x), y) + \alpha_{adv} L_{adv}(x) + \alpha_{cr} L_{cr}(x)
$$

R_feature is DeepInversion's, `BatchNormInputs`. These terms have gradients with respect to images, unlike the losses of
students. `kdbench.methods.cmi` minimizes them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from kdbench.losses.checks import full, logits_shape, positive, shape
from kdbench.losses.deep_inversion import WatchedBatchNorms
from kdbench.losses.features import inner_products
from kdbench.losses.kl import divergences


def view_contrast(local: Tensor, whole: Tensor, present: int | None = None, temperature: float = 0.1) -> Tensor:
    r"""Cross-entropy of finding an image's global view by a local one, among the global views of all images.

    $$
    L_{cr} = \frac{1}{N} \sum_{n < N} \ell_n + \frac{1}{M - N} \sum_{n \ge N} \ell_n, \qquad
    \ell_n = -\log \frac{\exp(\langle l_n, g_n \rangle / \tau)}{\sum_m \exp(\langle l_n, g_m \rangle / \tau)}
    $$

    l and g are brought to unit length. The first N images are those of the present batch, the others were remembered:
    each part has its own mean, as in the authors' code, so that a large memory does not make the batch's gradients
    small. Without a memory (N = M) the second part is absent. No gradient reaches the global views.

    Args:
        local: l, features of local views, [M, D].
        whole: g, features of global views of the same images, [M, D].
        present: N, in 1 … M. None means M.
        temperature: τ, above 0.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [M, D], N is not in 1 … M, or the temperature is not positive.
    """
    if local.ndim != 2 or local.shape != whole.shape or len(local) == 0:
        raise ValueError(f"view_contrast needs the same [M, D] twice: {shape(local)}, {shape(whole)}")
    present = len(local) if present is None else present
    if not 1 <= present <= len(local):
        raise ValueError(f"view_contrast needs 1 to {len(local)} present images, not {present}")
    positive(temperature)
    local, whole = F.normalize(full(local), dim=1), F.normalize(full(whole.detach()), dim=1)
    log_p = F.log_softmax(inner_products(local, whole) / temperature, dim=1).diagonal()
    loss = -log_p[:present].mean()
    return loss - log_p[present:].mean() if present < len(log_p) else loss


def agreed_divergence(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""KL divergence where both networks choose the same class, 0 elsewhere, averaged over all images of the batch.

    $$
    D = \frac{1}{N} \sum_n \left[ \arg\max z^S_n = \arg\max z^T_n \right] \mathrm{KL}(p^T_n \,\|\, p^S_n),
    \qquad p = \operatorname{softmax}(z)
    $$

    CMI's adversarial term is L_adv = -D. Gradients go to both networks' logits.

    Args:
        student_logits: [N, K].
        teacher_logits: [N, K].

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: The shapes are not the same [N, K].
    """
    logits_shape(student_logits, teacher_logits, "agreed_divergence")
    student, teacher = full(student_logits), full(teacher_logits)
    agreed = student.argmax(dim=1) == teacher.argmax(dim=1)
    return (divergences(F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1)) * agreed).mean()


class BatchNormMeans(WatchedBatchNorms):
    """CMI's features of images: what enters each batch norm, averaged over positions, as a context manager.

    Hooks are at the batch norms' inputs inside the `with` block only; they are removed however it ends.

    Args:
        network: A network with batch norms.

    Raises:
        ValueError: The network has no batch norm that keeps running statistics.
    """

    def features(self) -> Tensor:
        """Means of the batch norms that ran since the last call, side by side, in the order in which they ran.

        Returns:
            [N, sum of their channels].

        Raises:
            ValueError: The network did not run since the last call.
        """
        return torch.cat(self.taken(), dim=1)

    def find(self, norm: _BatchNorm, inputs: Tensor) -> Tensor:
        """Means over positions, [N, C]."""
        return full(inputs).flatten(2).mean(dim=2) if inputs.ndim > 2 else full(inputs)
