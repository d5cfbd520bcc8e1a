"""Makes `cubic.npz`: the cubic schedule of TensorFlow Model Optimization.

    pip install tensorflow-cpu==2.21.0 tf-keras==2.21.0 tensorflow-model-optimization==0.8.1
    TF_USE_LEGACY_KERAS=1 python tests/pruning/golden/make_cubic.py

Also the masks of its low-magnitude rule on fixed weights, with and without ties.
"""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_model_optimization.python.core.sparsity.keras import pruning_impl, pruning_schedule

CASES = [(0.0, 0.8, 10, 60), (0.2, 0.95, 0, 37), (0.5, 0.5, 5, 9)]
STEPS = np.arange(0, 80)


def main() -> None:
    values = {}
    for place, (initial, final, begin, end) in enumerate(CASES):
        schedule = pruning_schedule.PolynomialDecay(initial, final, begin, end, power=3, frequency=1)
        # Before `begin` the callback does not prune, whatever the second value says.
        values[f"sparsity/{place}"] = np.array(
            [schedule(tf.constant(int(step)))[1].numpy() for step in STEPS], np.float32
        )
        values[f"prunes/{place}"] = np.array([bool(schedule(tf.constant(int(step)))[0]) for step in STEPS])
    rng = np.random.default_rng(0)
    weights = {"normal": rng.normal(size=(13, 7)), "ties": rng.integers(-3, 4, size=(13, 7))}
    for name, array in weights.items():
        array = array.astype(np.float32)
        values[f"weights/{name}"] = array
        for share in (0.0, 0.3, 0.5, 0.9, 0.999):
            pruning = pruning_impl.Pruning(
                training_step_fn=lambda: 1,
                pruning_vars=[],
                pruning_schedule=pruning_schedule.ConstantSparsity(share, 0),
                block_size=(1, 1),
                block_pooling_type="AVG",
            )
            _, mask = pruning._update_mask(tf.constant(array))
            values[f"mask/{name}/{share}"] = mask.numpy() != 0
    versions = f"tensorflow-model-optimization {version('tensorflow-model-optimization')}, tensorflow {tf.__version__}"
    np.savez_compressed(
        Path(__file__).parent / "cubic.npz", cases=np.array(CASES), steps=STEPS, versions=versions, **values
    )


if __name__ == "__main__":
    main()
