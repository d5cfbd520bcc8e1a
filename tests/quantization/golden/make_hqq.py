"""Makes `hqq.npz`: codes, scales and zero points as the package `hqq` finds them, on small random layers.

Run with hqq 0.2.8.post1 (`pip install --no-deps`), beside torch 2.13.0:

    python tests/quantization/golden/make_hqq.py

The default solver (`optimize_weights_proximal_legacy`) is used, groups run along the inputs (axis 1), all in float32.
Weights are stored in torch orientation, (out, in).
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
SHAPES = {"wide": (14, 48), "tall": (40, 24)}


def main() -> None:
    torch.set_num_threads(1)
    torch.cuda.empty_cache = lambda: None
    file = importlib.metadata.distribution("hqq").locate_file("hqq/core/optimize.py")
    spec = importlib.util.spec_from_file_location("hqq_optimize", str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = np.random.default_rng(0)
    arrays, cases = {}, []
    for name, shape in SHAPES.items():
        # Heavy tails, and a mean that is not 0.
        weight = (0.02 * rng.standard_t(3, size=shape) + 0.005).astype(np.float32)
        arrays[f"{name}/weight"] = weight
        for bits, group in ((4, 8), (3, shape[1]), (2, 8)):
            codes, scale, zero = _quantize(module, torch.from_numpy(weight), bits, group)
            case = f"{name}/{bits}/{group}"
            arrays |= {f"{case}/codes": codes, f"{case}/scale": scale, f"{case}/zero": zero}
            cases.append([name, bits, group])
    versions = {package: importlib.metadata.version(package) for package in ("hqq", "torch")}
    np.savez_compressed(HERE / "hqq.npz", **arrays, cases=json.dumps(cases), versions=json.dumps(versions))


def _quantize(module, weight: torch.Tensor, bits: int, group: int) -> tuple[np.ndarray, ...]:
    """What `Quantizer.quantize` does around the solver, without its packing."""
    blocks = weight.reshape(-1, group)
    low, high = blocks.min(1, keepdim=True)[0], blocks.max(1, keepdim=True)[0]
    top = 2**bits - 1
    scale = torch.where((high - low).abs() <= 1e-4, 1.0, top / (high - low)).clamp(max=2e4)
    codes, scale, zero = module.optimize_weights_proximal_legacy(blocks, scale, -low * scale, [0, top], axis=1)
    rows = len(weight)
    return codes.reshape(rows, -1).to(torch.uint8).numpy(), *((x.reshape(rows, -1)).numpy() for x in (1 / scale, zero))


if __name__ == "__main__":
    main()
