"""Makes `torch.npz`: what PyTorch implementations give on fixed weights.

- RigL: `rigl-torch` 0.5.2 (`RigLScheduler`), one update of the connections of two convolutions with momentum;
- Erdős–Rényi, with and without kernel axes: `erdos_renyi_sparsity` of `fastsparse` 0.0.5 (the function alone: its
  package imports fastai), itself after google-research/rigl;
- `torch.nn.utils.prune.l1_unstructured`, and 2:4 by `torch.ao.pruning.WeightNormSparsifier`, of PyTorch 2.13.0;
- SNIP: the gradient by a mask of ones, as its paper defines it and namhoonlee/snip-public computes it, with autograd.

    pip install torch==2.13.0 numpy rigl-torch==0.5.2
    pip download --no-deps fastsparse==0.0.5 && unzip fastsparse-0.0.5-py3-none-any.whl -d fastsparse
    python tests/pruning/golden/make_torch.py fastsparse/fastsparse/core.py
"""

import ast
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune

# rigl-torch asks whether a layer is one of torchvision's blocks, and for nothing else.
_RESNET = types.SimpleNamespace(Bottleneck=type("Bottleneck", (), {}), BasicBlock=type("BasicBlock", (), {}))
sys.modules["torchvision"] = types.SimpleNamespace(models=types.SimpleNamespace(resnet=_RESNET))

from rigl_torch.RigL import RigLScheduler  # noqa: E402

ERDOS_RENYI_SHAPES = [(64, 3, 3, 3), (128, 64, 3, 3), (100, 300), (10, 100), (256, 128, 1, 1)]  # (out, in, ...)
FRACTIONS = {"sparsity": 0.7, "alpha": 0.3, "T_end": 40, "delta": 4}


def main() -> None:
    values = {**rigl(), **erdos_renyi(Path(sys.argv[1])), **magnitude(), **two_of_four(), **snip()}
    versions = f"torch {torch.__version__}, rigl-torch 0.5.2, fastsparse 0.0.5"
    np.savez_compressed(Path(__file__).parent / "torch.npz", versions=versions, **values)


def rigl() -> dict[str, np.ndarray]:
    """Weights, gradients, masks before and after every update of the connections of 20 steps of SGD with momentum."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, bias=False), torch.nn.Conv2d(6, 5, 3, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = RigLScheduler(
        model,
        optimizer,
        dense_allocation=1 - FRACTIONS["sparsity"],
        T_end=FRACTIONS["T_end"],
        delta=FRACTIONS["delta"],
        alpha=FRACTIONS["alpha"],
        grad_accumulation_n=1,
    )
    weight, found, change = model[1].weight, {}, 0
    for step in range(1, 21):
        x = torch.randn(8, 3, 8, 8)
        optimizer.zero_grad()
        (model(x) - torch.sin(3 * x[:, :1, 2:-2, 2:-2])).square().mean().backward()
        hook = scheduler.backward_hook_objects[1]
        before = [weight.detach().clone(), scheduler.backward_masks[1].clone()]
        gradient = None if hook.dense_grad is None else hook.dense_grad.clone()
        if scheduler():
            optimizer.step()
            continue
        moment = optimizer.state[weight]["momentum_buffer"]
        arrays = {
            "weight": before[0],
            "mask": before[1],
            "gradient": gradient,
            "new_weight": weight,
            "new_mask": scheduler.backward_masks[1],
            "new_moment": moment,
            "step": torch.tensor(step),
        }
        found |= {f"rigl/{change}/{name}": array.detach().numpy().copy() for name, array in arrays.items()}
        change += 1
    return {**found, "rigl/changes": np.array(change), **{f"rigl/{k}": np.array(v) for k, v in FRACTIONS.items()}}


def erdos_renyi(source: Path) -> dict[str, np.ndarray]:
    tree = ast.parse(source.read_text("utf-8"))
    function = next(node for node in tree.body if getattr(node, "name", "") == "erdos_renyi_sparsity")
    names = {"np": np}
    exec(compile(ast.Module([function], []), str(source), "exec"), names)
    params = [torch.zeros(shape) for shape in ERDOS_RENYI_SHAPES]
    found = {"erdos_renyi/shapes": np.array([(*shape, *[0] * (4 - len(shape))) for shape in ERDOS_RENYI_SHAPES])}
    for sparsity in (0.5, 0.8, 0.95):
        for kernel in (True, False):
            name = f"erdos_renyi/{'kernel' if kernel else 'plain'}/{sparsity}"
            found[name] = np.array(names["erdos_renyi_sparsity"](params, sparsity, include_kernel=kernel))
    return found


def magnitude() -> dict[str, np.ndarray]:
    weights = np.random.default_rng(1).normal(size=(11, 9)).astype(np.float32)
    found = {"l1/weights": weights}
    for amount in (0.0, 0.25, 0.5, 0.777, 1.0):
        layer = torch.nn.Linear(9, 11, bias=False)
        layer.weight.data = torch.tensor(weights)
        prune.l1_unstructured(layer, "weight", amount=amount)
        found[f"l1/mask/{amount}"] = layer.weight_mask.numpy() != 0
    return found


def two_of_four() -> dict[str, np.ndarray]:
    weights = np.random.default_rng(2).normal(size=(6, 16)).astype(np.float32)
    layer = torch.nn.Sequential(torch.nn.Linear(16, 6, bias=False))
    layer[0].weight.data = torch.tensor(weights)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(layer, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    mask = layer[0].parametrizations.weight[0].mask.numpy() != 0
    return {"two_of_four/weights": weights, "two_of_four/mask": mask}


def snip() -> dict[str, np.ndarray]:
    torch.manual_seed(3)
    sizes = [(7, 5), (4, 7)]
    weights = [torch.randn(size) / 2 for size in sizes]
    masks = [torch.ones(size, requires_grad=True) for size in sizes]
    x, labels = torch.randn(12, 5), torch.randint(0, 4, (12,))
    logits = torch.relu(x @ (weights[0] * masks[0]).T) @ (weights[1] * masks[1]).T
    gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, labels), masks)
    total = sum(gradient.abs().sum() for gradient in gradients)
    found = {"snip/x": x.numpy(), "snip/labels": labels.numpy()}
    for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        found |= {f"snip/weight/{place}": weight.numpy(), f"snip/score/{place}": (gradient.abs() / total).numpy()}
    return found


if __name__ == "__main__":
    main()
