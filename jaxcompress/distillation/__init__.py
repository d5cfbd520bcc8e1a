"""Training a small model on the outputs of a large one, compressing it on the way."""

from jaxcompress.distillation._losses import agreement as agreement
from jaxcompress.distillation._losses import binary_labels as binary_labels
from jaxcompress.distillation._losses import binary_targets as binary_targets
from jaxcompress.distillation._losses import hard_labels as hard_labels
from jaxcompress.distillation._losses import soft_targets as soft_targets
from jaxcompress.distillation._outputs import LossFn as LossFn
from jaxcompress.distillation._outputs import Outputs as Outputs
from jaxcompress.distillation._state_losses import cosine_states as cosine_states
from jaxcompress.distillation._state_losses import hidden_states as hidden_states
from jaxcompress.distillation._student import layer_map as layer_map
from jaxcompress.distillation._student import select_layers as select_layers
from jaxcompress.distillation._train_state import TrainState as TrainState
from jaxcompress.distillation._train_step import make_train_step as make_train_step
