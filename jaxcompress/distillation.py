"""Training a small model on the outputs of a large one, compressing it on the way.

A student may begin as a part of its teacher, for which `make_train_step` is the same:

- fewer layers: `select_layers`, and `models.resized` for its module;
- narrower layers: the heads, FFN columns or hidden features that matter most, as in the example of `models.resized`;
- factors of low rank in the place of kernels, which are trained as they are: `lowrank.activation_svd` and its like.
"""

from jaxcompress._src.distillation.attention_losses import attention_probabilities as attention_probabilities
from jaxcompress._src.distillation.attention_losses import attention_scores as attention_scores
from jaxcompress._src.distillation.attention_losses import relations as relations
from jaxcompress._src.distillation.averages import averaged as averaged
from jaxcompress._src.distillation.deferred_logits import deferred_logits as deferred_logits
from jaxcompress._src.distillation.divergences import forward_kl as forward_kl
from jaxcompress._src.distillation.divergences import jensen_shannon as jensen_shannon
from jaxcompress._src.distillation.divergences import reverse_kl as reverse_kl
from jaxcompress._src.distillation.loss_scale import DynamicLossScale as DynamicLossScale
from jaxcompress._src.distillation.losses import argmax_agreement as argmax_agreement
from jaxcompress._src.distillation.losses import binary_targets as binary_targets
from jaxcompress._src.distillation.losses import hard_labels as hard_labels
from jaxcompress._src.distillation.losses import next_token_labels as next_token_labels
from jaxcompress._src.distillation.losses import soft_targets as soft_targets
from jaxcompress._src.distillation.pairs import ClosestLayers as ClosestLayers
from jaxcompress._src.distillation.projections import least_squares as least_squares
from jaxcompress._src.distillation.sharding_rules import shard_by_rules as shard_by_rules
from jaxcompress._src.distillation.state_losses import batch_similarities as batch_similarities
from jaxcompress._src.distillation.state_losses import cosine_states as cosine_states
from jaxcompress._src.distillation.state_losses import hidden_states as hidden_states
from jaxcompress._src.distillation.student import layer_map as layer_map
from jaxcompress._src.distillation.student import select_layers as select_layers
from jaxcompress._src.distillation.taps import tap as tap
from jaxcompress._src.distillation.teacher_cache import read_teacher_outputs as read_teacher_outputs
from jaxcompress._src.distillation.teacher_cache import write_teacher_outputs as write_teacher_outputs
from jaxcompress._src.distillation.top_logits import top_k_targets as top_k_targets
from jaxcompress._src.distillation.train_state import TrainState as TrainState
from jaxcompress._src.distillation.train_step import make_train_step as make_train_step
