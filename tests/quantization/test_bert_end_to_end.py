"""A small BERT, unmodified: weights and inputs trained with their quantization, then served as codes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_bert import small_classifier

import jaxcompress as jc
from jaxcompress._src.quantization.input_transforms import quantized_inputs
from jaxcompress.distillation import make_train_step, soft_targets
from jaxcompress.quantization import QuantSpec, input_ranges, lsq, lsq_inputs
from jaxcompress.tree import leaves_with_paths

KERNELS = jc.tree.by_path("bert/encoder/.*kernel")
STATIC = QuantSpec(bits=8, symmetric=False, per_tensor=True, range_rule="mse")
WAYS = {
    "int8 weights, dynamic int8 inputs": (
        QuantSpec(bits=8),
        lambda: quantized_inputs(QuantSpec(bits=8), select=KERNELS),
    ),
    "int4 weights, learned uint8 inputs": (QuantSpec(bits=4), lambda: lsq_inputs(STATIC, select=KERNELS)),
    "int2 groups, MXFP8 inputs": (
        QuantSpec(bits=2, group_size=16, symmetric=False, scale_dtype="bfloat16"),
        lambda: quantized_inputs(QuantSpec(format="mxfp8_e4m3", group_size=16), select=KERNELS),
    ),
}


@pytest.mark.parametrize("name", WAYS)
def test_what_is_trained_is_what_is_served(name):
    weights, inputs = WAYS[name][0], WAYS[name][1]()
    module = small_classifier(hidden_size=32, num_attention_heads=2, intermediate_size=48)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 6)))
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim == 2 else leaf, params)

    def apply(params, batch, *, key=None, train=False):
        del key, train
        return module.apply({"params": params}, batch["ids"])

    ranges = None
    if "learned" in name:
        ranges = input_ranges(lambda p, ids: apply(p, {"ids": ids}), params, [(ids,)], STATIC, select=KERNELS)
    transform = jc.chain(lsq(weights, select=KERNELS), inputs)
    init_state, step = make_train_step(
        apply,
        apply,
        optax.sgd(1e-2),
        losses={"soft": soft_targets()},
        transform=transform,
        transform_optimizer=optax.adam(1e-5),
    )
    state = init_state(params, key=jax.random.key(1), statistics=ranges)
    before = jax.tree.map(jnp.copy, state.transform_state.trainable)
    for _ in range(2):
        state, metrics = step(state, params, {"ids": ids})
    assert np.isfinite(float(metrics["loss"][0]))
    for old, new in zip(*map(jax.tree.leaves, (before, state.transform_state.trainable)), strict=True):
        assert old.ndim == 0 or (old != new).any()
    final = transform.finalize(state.params, state.transform_state)
    effective = jax.jit(transform.apply)(state.params, state.transform_state)
    for x, y in zip(*(jax.tree.leaves(jax.jit(jc.materialize)(tree)) for tree in (final, effective)), strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))
    run = jax.jit(jc.execute(apply))
    served, trained = (run(tree, {"ids": ids})["logits"] for tree in (final, effective))
    np.testing.assert_allclose(served, trained, rtol=1e-6, atol=1e-6)
    dense = jax.jit(apply)(params, {"ids": ids})["logits"]
    assert float(jnp.abs(served - dense).max()) > 1e-5
    stored = [leaf for _, leaf in leaves_with_paths(final) if type(leaf).__name__ == "InputQuantizedArray"]
    assert len(stored) == 12
    assert all(leaf.weight.bits == weights.bits for leaf in stored)
    if "int8 weights" in name:
        assert run.lower(final, {"ids": ids}).as_text().count("xi32>") >= 12
