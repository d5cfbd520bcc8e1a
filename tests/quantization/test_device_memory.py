"""What a compiled model holds: codes and scales as arguments, and no float copy of a weight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from small_bert import small_classifier

import jaxcompress as jc
from jaxcompress._src.types import is_compressed
from jaxcompress.arrays import QuantizedArray
from jaxcompress.quantization import QuantSpec, quantize, quantize_inputs
from jaxcompress.tree import leaves_with_paths

SPEC = QuantSpec(bits=4, group_size=32, scale_dtype="bfloat16")


@pytest.fixture(scope="module")
def bert():
    """A small classifier: (apply, params, inputs)."""
    module, ids = (
        small_classifier(hidden_size=64, num_attention_heads=4, intermediate_size=96),
        jnp.ones((2, 6), jnp.int32),
    )
    params = jax.jit(module.init)(jax.random.key(0), ids)["params"]
    return lambda p, ids: module.apply({"params": p}, ids)["logits"], params, (ids,)


def compiled(apply, params, *inputs):
    """The program with parameters as arguments, and its constants."""
    run = jax.jit(jc.execute(apply))
    return run.lower(params, *inputs).compile(), jax.make_jaxpr(jc.execute(apply))(params, *inputs).consts


def quantized_sizes(params):
    return [math.prod(leaf.shape) for _, leaf in leaves_with_paths(params) if isinstance(leaf, QuantizedArray)]


def test_four_bits_cost_four_and_a_half(bert):
    apply, params, inputs = bert
    select = jc.tree.by_path(".*/(kernel|embedding)")
    layouts = jc.trace.layouts(apply, params, *inputs)
    small, _ = quantize(params, SPEC, select=select, layouts=layouts)
    rest = sum(leaf.nbytes for _, leaf in leaves_with_paths(small) if not is_compressed(leaf))
    program, _ = compiled(apply, small, *inputs)
    held = program.memory_analysis().argument_size_in_bytes - rest - sum(x.nbytes for x in inputs)
    weights = sum(quantized_sizes(small))
    assert weights > 20_000
    assert 4.4 < 8 * held / weights <= 4.6


@pytest.mark.parametrize("marked", [False, True])
def test_no_float_copy_is_an_argument_or_a_constant(bert, marked):
    apply, params, inputs = bert
    select = jc.tree.by_path("bert/.*/kernel")
    small, _ = quantize(params, SPEC, select=select, layouts=jc.trace.layouts(apply, params, *inputs))
    shapes = {leaf.shape for _, leaf in leaves_with_paths(small) if isinstance(leaf, QuantizedArray)}
    small = quantize_inputs(small, QuantSpec(bits=8), select=select)[0] if marked else small
    program, constants = compiled(apply, small, *inputs)
    floats = [leaf.shape for leaf in jax.tree.leaves(small) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert not shapes & set(floats)
    assert all(np.size(constant) < min(map(math.prod, shapes)) for constant in constants)
    smallest = min(math.prod(shape) for shape in shapes)
    # Before its entry a program lists inner computations, whose parameters are values on their way.
    inner, entry = program.as_text().split("ENTRY ")
    held = [line for line in entry.splitlines() if " parameter(" in line]
    held += [line for line in (inner + entry).splitlines() if " constant(" in line]
    assert len(held) > len(shapes)
    for line in held:
        assert _floats(line) < smallest, line


def test_the_check_sees_a_constant():
    """A model that closes over float weights has them in its program."""
    model = zoo.dense()
    text = jax.jit(lambda x: model.apply(model.params, x)).lower(*model.inputs).compile().as_text()
    assert any(_floats(line) >= model.params["kernel"].size for line in text.splitlines() if " constant(" in line)


def _floats(line):
    """Number of floats that an instruction's result holds."""
    kind = line.split("=", 1)[1].strip() if "=" in line else ""
    if not kind.startswith(("f32[", "bf16[", "f16[")):
        return 0
    sizes = kind[kind.index("[") + 1 : kind.index("]")]
    return math.prod(int(size) for size in sizes.split(",") if size)
