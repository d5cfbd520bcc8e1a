"""Makes `hard_concrete.npz`: what the stochastic gates of Captum say for fixed locations and noise, in float64.

Run with captum 0.9.0 and torch 2.13.0:

    python tests/units/golden/make_hard_concrete.py

The noise is drawn twice from the same seed: once to keep it, once inside Captum.
"""

from pathlib import Path

import numpy as np

EPSILON = 1e-6
CONSTANTS = {
    "standard": {"temperature": 2 / 3, "lower_bound": -0.1, "upper_bound": 1.1},
    "others": {"temperature": 0.33, "lower_bound": -0.3, "upper_bound": 1.05},
}


def main() -> None:
    # Here, because the tests' collector imports every file.
    import torch
    from captum.module import BinaryConcreteStochasticGates

    torch.set_default_dtype(torch.float64)
    log_alpha = torch.linspace(-6.0, 6.0, 49)
    arrays = {"log_alpha": log_alpha.numpy()}
    for name, constants in CONSTANTS.items():
        gates = BinaryConcreteStochasticGates(len(log_alpha), eps=EPSILON, **constants)
        gates.load_state_dict({"log_alpha_param": log_alpha}, strict=False)
        torch.manual_seed(0)
        noise = torch.empty(20, len(log_alpha)).uniform_(EPSILON, 1 - EPSILON)
        torch.manual_seed(0)
        gates.train()
        # Of ones, the gated input is the gates.
        sampled, penalty = gates(torch.ones(20, len(log_alpha)))
        arrays |= {
            f"{name}/noise": noise.numpy(),
            f"{name}/sampled": sampled.detach().numpy(),
            f"{name}/expected_l0": penalty.detach().numpy(),
            f"{name}/nonzero_probability": gates.get_gate_active_probs().detach().numpy(),
            f"{name}/deterministic": gates.get_gate_values().detach().numpy(),
        }
    np.savez_compressed(Path(__file__).parent / "hard_concrete.npz", **arrays)


if __name__ == "__main__":
    main()
