"""Writes `plain_zero_points`: a checkpoint whose zero points take a byte each, as all did before they were packed.

Made once, by the commit before that change; the current code would write packed ones.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.quantization import QuantSpec, quantize
from jaxcompress.trace import LeafLayout

rng = np.random.default_rng(0)
dense = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("a", (16, 6)), ("b", (2, 8, 5)))}
layouts = {
    "a": LeafLayout(kind="matmul", input_axes=(0,), output_axes=(1,)),
    "b": LeafLayout(kind="matmul", stack_axes=(0,), input_axes=(1,), output_axes=(2,)),
}
spec = QuantSpec(bits=2, group_size=4, symmetric=False, scale_dtype="bfloat16")
small, _ = quantize(dense, spec, layouts=layouts, select=jc.tree.by_path("a"))
small, _ = quantize(small, QuantSpec(bits=3, symmetric=False), layouts=layouts, select=jc.tree.by_path("b"))
folder = Path(__file__).parent
jc.checkpoint.save(folder / "plain_zero_points", small)
np.savez(folder / "plain_zero_points.npz", **{name: leaf.materialize() for name, leaf in small.items()})
