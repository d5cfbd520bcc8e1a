"""Makes `svd_llm.npz`: ranks, weights and truncation losses by the formula of SVD-LLM, on small random layers.

The formula is that of `whitening` in SVDLLM.py of github.com/AIoT-MLSys-Lab/SVD-LLM (commit
0e3166628f9a8a16c47daa9dfe2e099c787ecea5), which is no package: S = cholesky(XᵀX), U Σ Vᵀ = svd(W S), rank
int(rows columns ratio / (rows + columns)), W' = U_k Σ_k V_kᵀ S⁻¹; all of it in float64 by torch 2.13.0 (the released
code takes the SVD in float32). The loss is measured on the inputs, ||X W' - X W||², not read off Σ.

    python tests/lowrank/golden/make_svd_llm.py

Weights are in torch orientation, (out, in).
"""

from pathlib import Path

import numpy as np
import torch

SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}
RATIOS = (0.3, 0.5, 0.8)


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (rows, columns) in SHAPES.items():
        weight = rng.normal(size=(rows, columns)).astype(np.float32)
        mixing = rng.normal(size=(columns, columns)) * np.geomspace(1, 0.05, columns)[:, None]
        inputs = (rng.normal(size=(80, columns)) @ mixing).astype(np.float32)
        arrays |= {f"{name}/weight": weight, f"{name}/inputs": inputs}
        for ratio in RATIOS:
            found, rank, values = truncated(torch.from_numpy(weight).double(), torch.from_numpy(inputs).double(), ratio)
            change = torch.from_numpy(inputs).double() @ (found - torch.from_numpy(weight).double()).T
            key = f"{name}/{ratio}"
            arrays |= {f"{key}/weight": found.numpy().astype(np.float32), f"{key}/rank": np.int32(rank)}
            arrays |= {f"{key}/loss": float(change.square().sum()), f"{key}/values": values.numpy()}
    np.savez_compressed(Path(__file__).parent / "svd_llm.npz", **arrays)


def truncated(weight: torch.Tensor, inputs: torch.Tensor, ratio: float) -> tuple[torch.Tensor, int, torch.Tensor]:
    scaling = torch.linalg.cholesky(inputs.T @ inputs)
    u, sigma, vt = torch.linalg.svd(weight @ scaling, full_matrices=False)
    rows, columns = weight.shape
    rank = int(rows * columns * ratio / (rows + columns))
    root = torch.diag(sigma[:rank].sqrt())
    return (u[:, :rank] @ root) @ (root @ vt[:rank] @ torch.linalg.inv(scaling)), rank, sigma


if __name__ == "__main__":
    main()
