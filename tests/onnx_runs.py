"""ONNX files written by `save_onnx` and run by ONNX Runtime, next to what JAX gives."""

import jax
import numpy as np
import onnxruntime

from jaxcompress.export import save_onnx


def session(path, **entries):
    """A session of one thread that waits without spinning, and multiplies in float32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    settings = {"session.intra_op.allow_spinning": "0", "session.qdq_matmulnbits_accuracy_level": "0", **entries}
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(runner, names, inputs):
    """The outputs for inputs in the order of `names`; a name that nothing reads is still one."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]
    bfloat16 = [leaf.dtype == jax.numpy.bfloat16 for leaf in leaves]
    if any(bfloat16):
        return _run_with_bfloat16(runner, names, leaves)
    return runner.run(None, dict(zip(names, leaves, strict=True)))


def exported(tmp_path, apply, params, *inputs, specs=None, **options):
    """(outputs of ONNX Runtime, info); `specs` are traced in place of the inputs, symbols and all."""
    path = tmp_path / "model.onnx"
    info = save_onnx(path, apply, params, *(inputs if specs is None else specs), overwrite=True, **options)
    return run_session(session(path), info.inputs, inputs), info


def assert_same(actual, expected, **tolerances):
    """Leaf by leaf: shapes, dtypes and values."""
    expected = [np.asarray(leaf) for leaf in jax.tree.leaves(expected)]
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        if not isinstance(ours, np.ndarray):
            ours = np.asarray(ours)
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if theirs.dtype.kind in "iub":
            np.testing.assert_array_equal(ours, theirs)
        else:
            options = {"rtol": 1e-5, "atol": 1e-5} | tolerances
            np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), **options)


def _run_with_bfloat16(runner, names, leaves):
    """NumPy has no bfloat16 that the bindings know: arrays go in and come out as their bits."""
    binding = runner.io_binding()
    kept = []
    for name, leaf in zip(names, leaves, strict=True):
        if leaf.dtype == jax.numpy.bfloat16:
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(leaf.view(np.uint16), 16)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(leaf)
        kept.append(value)
        binding.bind_ortvalue_input(name, value)
    for output in runner.get_outputs():
        binding.bind_output(output.name)
    runner.run_with_iobinding(binding)
    results = []
    for value, output in zip(binding.get_outputs(), runner.get_outputs(), strict=True):
        results.append(_bits(value) if "bfloat16" in output.type else value.numpy())
    return results


def _bits(value):
    import ctypes

    count = int(np.prod(value.shape()))
    words = (ctypes.c_uint16 * count).from_address(value.data_ptr())
    return np.array(words, np.uint16).view(jax.numpy.bfloat16).reshape(value.shape())
