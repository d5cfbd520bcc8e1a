"""Makes `formats.npz`: codes, scales, gradients and clips of named public implementations.

    pip install torch==2.13.0 torchao==0.18.0 bitsandbytes==0.50.2 nni==3.0 nvidia-modelopt==0.47.0
    python tests/quantization/golden/make_formats.py

NF4: bitsandbytes `quantize_4bit`. MXFP4 and MXFP8: torchao `to_mx`, scales rounded down. LSQ: the gradients of nni's
`lsq_clamp_round`, one step for the tensor. Entropy: modelopt's `_compute_amax_entropy`, the clip in bins.
"""

import types
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from modelopt.torch.quantization.calib.histogram import _compute_amax_entropy
from nni.compression.base.apply_method import lsq_clamp_round
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx

MX = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}
LSQ = {"2": (-2, 1), "3": (-4, 3), "8": (-128, 127), "2u": (0, 3), "4u": (0, 15)}
ENTROPY = {"8": (8, False), "8u": (8, True), "4": (4, False)}


def main() -> None:
    rng = np.random.default_rng(0)
    values = {}
    # (out, in), as torch has it: blocks run along the last axis.
    w = (rng.normal(size=(5, 128)) * np.exp(rng.normal(size=(5, 128)))).astype(np.float32)
    values["w"] = w
    packed, state = bnb.quantize_4bit(torch.tensor(w), blocksize=64, quant_type="nf4")
    packed = packed.numpy().ravel()
    values["nf4/codes"] = np.stack([packed >> 4, packed & 15], axis=1).reshape(w.shape)
    values["nf4/scale"] = state.absmax.numpy().reshape(5, 2)
    values["nf4/values"] = bnb.dequantize_4bit(torch.tensor(packed).reshape(-1, 1), state).numpy()
    for name, dtype in MX.items():
        scale, data = to_mx(torch.tensor(w), dtype, 32, ScaleCalculationMode.FLOOR)
        data = data.view(torch.uint8).numpy()
        if name == "mxfp4":
            data = np.stack([data & 15, data >> 4], axis=-1)
        values[f"{name}/codes"] = data.reshape(w.shape)
        values[f"{name}/scale"] = scale.view(torch.uint8).numpy().reshape(5, 4)
    for name, (low, high) in LSQ.items():
        target = torch.tensor(w, requires_grad=True)
        step = torch.tensor([2.5 * np.abs(w).mean() / np.sqrt(high)], dtype=torch.float32, requires_grad=True)
        space = types.SimpleNamespace(qmin=low, qmax=high, scale=step, _scaler=None)
        rounded = lsq_clamp_round(target, space)
        cotangent = torch.tensor(np.sin(np.arange(w.size)).reshape(w.shape), dtype=torch.float32)
        rounded.backward(cotangent)
        values[f"lsq/{name}/scale"] = step.detach().numpy()
        values[f"lsq/{name}/values"] = rounded.detach().numpy()
        values[f"lsq/{name}/by_w"] = target.grad.numpy()
        values[f"lsq/{name}/by_scale"] = step.grad.numpy()
    shapes = {
        "normal": rng.normal(size=40000),
        "heavy": rng.standard_t(3, size=40000),
        "relu": rng.exponential(size=9000),
    }
    for name, x in shapes.items():
        counts, edges = np.histogram(np.abs(x), bins=2048, range=(0, np.abs(x).max()))
        values[f"entropy/{name}/counts"] = counts.astype(np.int32)
        for kind, (bits, unsigned) in ENTROPY.items():
            clip = _compute_amax_entropy(counts.astype(np.float64), torch.tensor(edges).numpy(), bits, unsigned)
            values[f"entropy/{name}/{kind}"] = np.int64(np.argmin(np.abs(edges - float(clip))))
    made_by = [f"{name} {version(name)}" for name in ("torch", "torchao", "bitsandbytes", "nni", "nvidia-modelopt")]
    np.savez_compressed(Path(__file__).with_name("formats.npz"), made_by=made_by, **values)


if __name__ == "__main__":
    main()
