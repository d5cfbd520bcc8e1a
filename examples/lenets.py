"""The two networks of the examples on images: LeNet-300-100 and LeNet-5."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Params = dict[str, dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A pure function of (params, images), and the shapes of its kernels in the order of execution."""

    apply: Callable[[Params, jax.Array], jax.Array]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def takes_features(self) -> bool:
        """Whether its first layer multiplies single features, which can be left out; the other one convolves."""
        return len(next(iter(self.shapes.values()))) == 2

    @property
    def units(self) -> list[str]:
        """What the numbers of an architecture count."""
        return (["inputs"] if self.takes_features else []) + list(self.shapes)[:-1]

    @property
    def kernels(self) -> list[str]:
        """Paths of the kernels, in the order of execution."""
        return [f"{name}/kernel" for name in self.shapes]

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        keys = jax.random.split(key, len(self.shapes))
        make = jax.nn.initializers.he_normal()
        return {
            name: {"kernel": make(own, shape, jnp.float32), "bias": jnp.zeros(shape[-1])}
            for own, (name, shape) in zip(keys, self.shapes.items(), strict=True)
        }


def mlp(params: Params, images: jax.Array) -> jax.Array:
    """LeNet-300-100 on (batch, features)."""
    x = images.reshape(len(images), -1)
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params["last"]["kernel"] + params["last"]["bias"][None]


def convolutional(params: Params, images: jax.Array) -> jax.Array:
    """LeNet-5 on (batch, 28, 28)."""
    x = images[..., None]
    for name in ("first", "second"):
        x = jax.nn.relu(convolve(x, params[name]["kernel"]) + params[name]["bias"][None, None, None])
        n, height, width, channels = x.shape
        x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["third"]["kernel"] + params["third"]["bias"][None])
    return x @ params["last"]["kernel"] + params["last"]["bias"][None]


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution as one matmul over patches: inside a scan on a CPU many times faster than XLA's own."""
    rows, columns = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    shifted = [x[:, i : i + rows, j : j + columns] for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return jnp.concatenate(shifted, axis=3) @ kernel.reshape(-1, kernel.shape[3])


NETWORKS = {
    "lenet-300-100": Network(apply=mlp, shapes={"first": (784, 300), "second": (300, 100), "last": (100, 10)}),
    "lenet-5": Network(
        apply=convolutional,
        shapes={"first": (5, 5, 1, 20), "second": (5, 5, 20, 50), "third": (800, 500), "last": (500, 10)},
    ),
}
