"""Losses as plain functions of tensors, for any training loop, in the manner of `torch.nn.functional`.

Every function takes the student's tensor first, then the teacher's (or the labels), and returns a scalar. No gradient
reaches the teacher, except in `kl_divergence`, `mutual` and `neighbour_congruence`. `mmd` takes features of one network
on two sets of images. A loss with parameters of its own is a module, built with the shapes of one sample of each
network.
float16 and bfloat16 inputs are computed in float32; float32 and float64 keep their type. So a loss's own module stays
float32, whatever its networks compute in; the networks' modules that some functions are given get features as they are.
Labels are class indices from 0; only `cross_entropy` takes shares of classes too.
Shapes that do not match raise a ValueError that names both.
"""

from kdbench.losses.ab import ConstantAgreement, activation_agreement, activation_boundary, centred_mse
from kdbench.losses.afd import AttendedChannels, attended_channels
from kdbench.losses.at import attention_transfer
from kdbench.losses.bss import angle_similarity, magnitude_similarity, soft_cross_entropy
from kdbench.losses.byot import BeYourOwnTeacher
from kdbench.losses.cat_kd import cat_kd, class_attention
from kdbench.losses.cc import NeighbourCongruence, kernel_congruence, neighbour_congruence
from kdbench.losses.ce import cross_entropy
from kdbench.losses.cmi import BatchNormMeans, agreed_divergence, view_contrast
from kdbench.losses.crd import ContrastiveDistillation, ContrastiveRepresentation, draw_negatives, noise_contrastive
from kdbench.losses.ctkd import CurriculumTemperature
from kdbench.losses.cwd import channel_wise
from kdbench.losses.dafl import activation_strength, class_balance, one_hot
from kdbench.losses.deep_inversion import (
    BatchNormInputs,
    batch_norm_distance,
    competition,
    jensen_shannon,
    kd_over_classes,
    l2_norm,
    total_variation,
)
from kdbench.losses.deit import hard_distillation
from kdbench.losses.dfad import mean_absolute
from kdbench.losses.dist import dist
from kdbench.losses.dist_plus import channel_relation, spatial_relation
from kdbench.losses.dkd import dkd
from kdbench.losses.dml import mutual
from kdbench.losses.factor_transfer import Paraphraser, Translator, factor_transfer, paraphrased, reconstruction
from kdbench.losses.fitnets import fitnets
from kdbench.losses.fsp import fsp, fsp_matrix
from kdbench.losses.hnd import Bottleneck, BottleneckHead, ghnd, hnd
from kdbench.losses.ickd import inter_channel_correlation
from kdbench.losses.irg import instance_edges, instance_transformation
from kdbench.losses.itrd import InformationTheoretic, itrd_correlation, itrd_mutual
from kdbench.losses.jacobian import jacobian_matching
from kdbench.losses.kd import kd
from kdbench.losses.kdsvd import singular_vectors
from kdbench.losses.kl import kl_divergence
from kdbench.losses.lskd import standardized, standardized_dkd, standardized_kd
from kdbench.losses.lwm import attention_distillation
from kdbench.losses.mgd import MaskedGeneration
from kdbench.losses.mlkd import kd_at_temperatures, multi_level
from kdbench.losses.mmd import mmd
from kdbench.losses.nkd import nkd
from kdbench.losses.norm import FeatureTransform, TransformedHead, n_to_one, norm, normalized_logits
from kdbench.losses.nst import neuron_selectivity
from kdbench.losses.ofd import batch_norm_margin, ofd, overhaul
from kdbench.losses.pad import PrimeAware, adaptive_mse
from kdbench.losses.pkd import map_correlation
from kdbench.losses.pkt import pkt
from kdbench.losses.reviewkd import AttentionFusion, KnowledgeReview, hierarchical_context
from kdbench.losses.rkd import rkd_angle, rkd_distance
from kdbench.losses.rld import rld
from kdbench.losses.sdd import scale_decoupled, sdd
from kdbench.losses.semckd import SemanticCalibration
from kdbench.losses.show_attend_distill import AttentionMatching, matched_attention
from kdbench.losses.simkd import Projector, reused_head, simkd
from kdbench.losses.skd import gram_direction, skd
from kdbench.losses.sp import similarity_preserving
from kdbench.losses.srd import SimpleRecipe, log_power_sum
from kdbench.losses.srrl import SoftmaxRegression
from kdbench.losses.sskd import recognize_turned, similarity_kd, turned_kd, upright_cross_entropy, upright_kd
from kdbench.losses.tfkd import kd_over_elements, virtual_teacher
from kdbench.losses.ttm import transformed_teacher
from kdbench.losses.uskd import CustomizedSoftLabels, customized_others, customized_target
from kdbench.losses.vid import VariationalInformation, gaussian_nll
from kdbench.losses.vitkd import PatchGeneration, PatchMimicking
from kdbench.losses.wkd import class_distances, sinkhorn_cost, wasserstein_gaussian, wasserstein_logits
from kdbench.losses.wsld import weighted_soft_labels

__all__ = [
    "AttendedChannels", "AttentionFusion", "AttentionMatching", "BatchNormInputs", "BatchNormMeans", "BeYourOwnTeacher",
    "Bottleneck", "BottleneckHead", "ConstantAgreement", "ContrastiveDistillation", "ContrastiveRepresentation",
    "CurriculumTemperature", "CustomizedSoftLabels", "FeatureTransform", "InformationTheoretic", "KnowledgeReview",
    "MaskedGeneration", "NeighbourCongruence", "Paraphraser", "PatchGeneration", "PatchMimicking", "PrimeAware",
    "Projector", "SemanticCalibration", "SimpleRecipe", "SoftmaxRegression", "TransformedHead", "Translator",
    "VariationalInformation", "activation_agreement", "activation_boundary", "activation_strength", "adaptive_mse",
    "agreed_divergence", "angle_similarity", "attended_channels", "attention_distillation", "attention_transfer",
    "batch_norm_distance", "batch_norm_margin", "cat_kd", "centred_mse", "channel_relation", "channel_wise",
    "class_attention", "class_balance", "class_distances", "competition", "cross_entropy", "customized_others",
    "customized_target", "dist", "dkd", "draw_negatives", "factor_transfer", "fitnets", "fsp", "fsp_matrix",
    "gaussian_nll", "ghnd", "gram_direction", "hard_distillation", "hierarchical_context", "hnd", "instance_edges",
    "instance_transformation", "inter_channel_correlation", "itrd_correlation", "itrd_mutual", "jacobian_matching",
    "jensen_shannon", "kd", "kd_at_temperatures", "kd_over_classes", "kd_over_elements", "kernel_congruence",
    "kl_divergence", "l2_norm", "log_power_sum", "magnitude_similarity", "map_correlation", "matched_attention",
    "mean_absolute", "mmd", "multi_level", "mutual", "n_to_one", "neighbour_congruence", "neuron_selectivity", "nkd",
    "noise_contrastive", "norm", "normalized_logits", "ofd", "one_hot", "overhaul", "paraphrased", "pkt",
    "recognize_turned", "reconstruction", "reused_head", "rkd_angle", "rkd_distance", "rld", "scale_decoupled", "sdd",
    "similarity_kd", "similarity_preserving", "simkd", "singular_vectors", "sinkhorn_cost", "skd", "soft_cross_entropy",
    "spatial_relation", "standardized", "standardized_dkd", "standardized_kd", "total_variation", "transformed_teacher",
    "turned_kd", "upright_cross_entropy", "upright_kd", "view_contrast", "virtual_teacher", "wasserstein_gaussian",
    "wasserstein_logits", "weighted_soft_labels",
]  # fmt: skip
