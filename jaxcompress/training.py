"""Training runs: one loop with checkpoints, exact resumption and figures, for examples, recipes and users."""

from jaxcompress._src.training.checkpoints import Checkpoints as Checkpoints
from jaxcompress._src.training.fit import fit as fit
from jaxcompress._src.training.sinks import console as console
from jaxcompress._src.training.sinks import jsonl as jsonl
from jaxcompress._src.training.tensorboard import tensorboard as tensorboard
