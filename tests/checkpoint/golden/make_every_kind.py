"""Writes `every_kind.zip`, checkpoints with all kinds of leaves in both storages, and `every_kind.npz`, what they hold.

Made once, by commit 51c5f7b, when each kind still was spread over several packages. What was written then must restore
with any later code: don't make it anew.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress._src.arrays.packed import PackedArray, pack
from jaxcompress._src.quantization.inputs import InputRounding
from jaxcompress._src.types import TransformState
from jaxcompress.arrays import (
    AdditiveCodebookArray,
    CodebookArray,
    InputQuantizedArray,
    LowRankArray,
    QuantizedArray,
    sparsify,
)
from jaxcompress.clustering import Coder, encode_codes
from jaxcompress.quantization import QuantSpec
from jaxcompress.tree import Unselected

FLOAT32, FOLDER = jnp.dtype("float32"), Path(__file__).parent
COMMIT = "51c5f7b"

rng = np.random.default_rng(0)
weights = jnp.asarray(rng.integers(-40, 41, (16, 8)) / 16, jnp.float32)
stack = jnp.asarray(rng.integers(-40, 41, (2, 16, 8)) / 16, jnp.float32)
inputs = jnp.asarray(rng.integers(-16, 17, (3, 16)) / 8, jnp.float32)
codes = jnp.clip(jnp.round(weights * 3), -8, 7).astype(jnp.int8)
unsigned = (codes + 8).astype(jnp.uint8)
mask = jnp.abs(weights) > 1
regular = jnp.argsort(jnp.argsort(-jnp.abs(weights).reshape(4, 4, 8), axis=1), axis=1).reshape(16, 8) < 2
channel = jnp.asarray(2.0 ** rng.integers(-4, 1, (1, 8)), jnp.float32)
groups = jnp.asarray(2.0 ** rng.integers(-4, 1, (4, 8)), jnp.bfloat16)


def quantized(data, scale, **fields):
    return QuantizedArray(data=data, scale=scale, dtype=FLOAT32, **fields)


def sparse_codes(values, bits, along, **how):
    sparse = sparsify(values, **how)
    return dataclasses.replace(sparse, values=pack(sparse.values, bits=bits, axis=along))


def codebook(data, entries, **fields):
    table = jnp.asarray(rng.integers(-32, 33, (1, 8, entries)) / 16, jnp.float32)
    return CodebookArray(data=data, table=table, dtype=FLOAT32, **fields)


int4 = quantized(pack(codes, bits=4, axis=0), groups)
int4_24 = quantized(sparse_codes(codes, 4, 0, mask=regular, pattern=(2, 4), axis=0), groups)
thin = LowRankArray(
    left=jnp.asarray(rng.integers(-4, 5, (16, 1, 3)) / 4, jnp.float32),
    right=jnp.asarray(rng.integers(-4, 5, (1, 8, 3)) / 4, jnp.float32),
    dtype=FLOAT32,
)
half_code = quantized(pack(codes[:, None, :3], bits=4, axis=0), jnp.full((1, 1, 1), 0.125, jnp.float32))
dynamic = InputRounding(spec=QuantSpec(bits=8))
static = InputRounding(spec=QuantSpec(bits=8, symmetric=False, scale_dtype="bfloat16"), gradient="pact")
mixed = rng.permutation(np.repeat([0, 1, 2, 3], [3000, 2000, 1000, 500]))
sparse = rng.permutation(np.repeat([0, 1, 2, 3], [5400, 600, 300, 200]))

leaves = {
    **{f"packed {bits}": pack(unsigned % 2**bits, bits=bits, axis=0) for bits in range(1, 8)},
    "packed signed": PackedArray(data=pack(unsigned, bits=4, axis=1).data, bits=4, signed=True, axis=-1, width=8),
    "int8": quantized(codes, channel),
    "int4 groups": int4,
    "bfloat16 int4": dataclasses.replace(int4, dtype=jnp.dtype("bfloat16")),
    "powers of two": quantized(codes, channel.astype(jnp.float8_e8m0fnu)),
    "byte zero points": quantized(unsigned, channel, zero_point=jnp.full((1, 8), 7, jnp.uint8)),
    "packed zero points": quantized(
        pack(unsigned, bits=4, axis=0), groups, zero_point=pack(jnp.full((4, 8), 7, jnp.uint8), bits=4, axis=1)
    ),
    "float zero points": quantized(pack(unsigned, bits=4, axis=0), channel, zero_point=channel + 6),
    "levels": quantized(pack(unsigned, bits=4, axis=1), channel, levels=tuple(float(x) / 8 for x in range(-8, 8))),
    "partial": quantized(pack(codes, bits=4, axis=0), groups[:3], partial=(-2, 6)),
    "partial zero points": quantized(
        unsigned, channel[:, :2] * jnp.ones((16, 1)), zero_point=jnp.full((1, 2), 5, jnp.uint8), partial=(-1, 5)
    ),
    "codes under a mask": quantized(sparsify(codes, mask), channel),
    "packed codes under a mask": quantized(sparse_codes(unsigned, 4, -1, mask=mask), channel, zero_point=channel + 1),
    "codes 2:4": quantized(sparsify(codes, regular, pattern=(2, 4), axis=0), groups),
    "packed codes 2:4": int4_24,
    "stacked": quantized(pack(jnp.round(stack).astype(jnp.int8), bits=3, axis=1), jnp.full((2, 1, 8), 0.5)),
    "2:4": sparsify(weights, regular, pattern=(2, 4), axis=0),
    "3:8 bfloat16": sparsify(
        weights.astype(jnp.bfloat16), jnp.arange(16)[:, None] % 8 < jnp.full((1, 8), 3), pattern=(3, 8), axis=-2
    ),
    "bit mask": sparsify(weights, mask),
    "bit mask in shards": sparsify(weights.astype(jnp.bfloat16), mask, shards=4),
    "stacked bit masks": sparsify(stack, jnp.abs(stack) > 1.5, stack_ndim=1),
    "codebook": codebook(pack(unsigned % 8, bits=3, axis=0), 8),
    "codebook with zero": codebook(pack(unsigned % 8, bits=3, axis=0), 7, zero=True),
    "codebook under a mask": codebook(sparse_codes(unsigned % 8, 3, -1, mask=unsigned % 8 != 0), 7, zero=True),
    "additive codebooks": AdditiveCodebookArray(
        data=pack(unsigned.reshape(4, 8, 4)[..., :2] % 3, bits=2, axis=1),
        table=jnp.asarray(rng.integers(-16, 17, (1, 1, 2, 3, 4)) / 16, jnp.bfloat16),
        scale=channel,
        dtype=FLOAT32,
        axis=-2,
        width=15,
    ),
    "additive codebooks of bytes": AdditiveCodebookArray(
        data=unsigned.reshape(4, 8, 4)[..., :1],
        table=jnp.asarray(rng.integers(-16, 17, (1, 1, 1, 16, 4)) / 16, jnp.float32),
        dtype=FLOAT32,
        axis=-2,
        width=16,
    ),
    "low rank": thin,
    "low rank of codes": dataclasses.replace(thin, left=half_code),
    "low rank and codes": dataclasses.replace(thin, residual=int4),
    "low rank and sparse codes": dataclasses.replace(thin, left=half_code, residual=int4_24),
    "dynamic inputs": InputQuantizedArray(weight=quantized(codes, channel), inputs=dynamic),
    "dynamic inputs, plain": InputQuantizedArray(weight=weights, inputs=dynamic),
    "static inputs": InputQuantizedArray(
        weight=int4, inputs=static, scale=jnp.float32(0.015625), zero_point=jnp.uint8(128)
    ),
    "dynamic inputs, low rank": InputQuantizedArray(
        weight=dataclasses.replace(thin, left=half_code, residual=int4_24), inputs=dynamic
    ),
    # Together with the small arrays, one for each coder that `storage="entropy"` chooses.
    "dense codes": quantized(pack(jnp.asarray(rng.integers(0, 4, (65, 100)), jnp.uint8), bits=2), jnp.ones((1, 1))),
    "frequent codes": quantized(pack(jnp.asarray(mixed.reshape(65, 100), jnp.uint8), bits=2), jnp.ones((1, 1))),
    "rare codes": quantized(pack(jnp.asarray(sparse.reshape(65, 100), jnp.uint8), bits=2), jnp.ones((1, 1))),
}
state = TransformState(
    trainable={"a": jnp.linspace(-1, 1, 5), "b": Unselected},
    fixed={"mask": mask, "step": jnp.int32(7), "key": jax.random.key(3), "leaf": int4},
)
tree = {"leaves": leaves, "state": state}
metadata = {"commit": COMMIT, "kinds": {name: jc.report.describe_leaf(leaf) for name, leaf in leaves.items()}}
values = {name: np.asarray(leaf.materialize(), np.float32) for name, leaf in leaves.items()}
run = jc.execute(lambda weight, x: x @ weight)
products = {f"{name} @": run(leaf, inputs) for name, leaf in leaves.items() if "inputs" in name}
with tempfile.TemporaryDirectory() as directory:
    for storage in ("orbax", "entropy"):
        jc.checkpoint.save(f"{directory}/{storage}", tree, config={"width": 8}, metadata=metadata, storage=storage)
    shutil.make_archive(str(FOLDER / "every_kind"), "zip", directory)
rare = rng.permutation(np.repeat([0, 1, 2, 3], [800, 60, 30, 10])).astype(np.uint8).reshape(30, 30)
written = {
    f"coder {coder.name}": np.frombuffer(encode_codes(rare, bits=2, coder=coder), np.uint8)
    for coder in (Coder.PLAIN, Coder.RANS, Coder.GAPS, Coder.ADAPTIVE)
}
np.savez_compressed(FOLDER / "every_kind.npz", inputs=inputs, codes=rare, **values, **products, **written)
