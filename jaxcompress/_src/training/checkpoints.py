"""Whole train states by step: written while the run goes on, restored to the bit."""

import dataclasses
import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress._src.checkpoint.describe import describe, same_in_all_processes, to_json
from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.leaves import decode_leaf
from jaxcompress._src.checkpoint.manifest import Manifest
from jaxcompress._src.checkpoint.manifest_json import manifest_to_json
from jaxcompress._src.checkpoint.processes import together
from jaxcompress._src.checkpoint.steps import Mode, Steps
from jaxcompress._src.checkpoint.structure import order_like
from jaxcompress._src.training.agreement import check_config, check_state
from jaxcompress._src.types import is_compressed

_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """What a checkpoint of a run says beside its state.

    Attributes:
        step: number of steps that were done.
        figures: of this step, as given to `save`.
        progress: what else the run needs to go on, as given to `save`.
        config: of the run that wrote it.
        versions: of `jaxcompress`, `jax` and `orbax` that wrote it.
    """

    step: int
    figures: Mapping[str, float]
    progress: Mapping[str, Any]
    config: Mapping[str, Any]
    versions: Mapping[str, str]


class Checkpoints:
    """The checkpoints of one run: the last ones and the best ones, in one directory.

    A checkpoint is whole or not there, whatever is killed when. It is written while the run goes on: `save` returns as
    soon as the state may be donated. It holds arrays to the bit, compressed leaves and typed keys included, and names
    the run's config and the leaves of its state; another config or another state is an error.

    With several JAX processes, all of them make the same calls, after `jax.distributed.initialize`, on a file system
    that they share. A state of another mesh, or of another number of processes, is restored all the same.

    Args:
        path: the directory, made if there is none; on a file system (no URL).
        config: all that makes the run what it is, such as recipe, optimizer and data: JSON values with str keys. A
            checkpoint of another config is not restored.
        keep_last: how many of the last checkpoints to keep.
        keep_best: how many of the best to keep besides; checkpoints without the metric are the worst.
        metric: which of the figures given to `save` tells the best.
        mode: whether the best is the smallest, "min", or the largest, "max".

    Raises:
        ValueError: a number below 1 (`keep_best`: 0), an unknown mode, or a path that is a URL.
        TypeError: `config` has something that JSON does not have.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp
        >>> from jaxcompress.training import Checkpoints
        >>> state = {"kernel": jnp.arange(3.0), "key": jax.random.key(0)}
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with Checkpoints(directory, config={"rate": 0.1}) as checkpoints:
        ...         for step in (10, 20, 30):
        ...             checkpoints.save(step, state)
        ...         steps = checkpoints.steps()
        ...         restored, info = checkpoints.restore(state)
        >>> steps, info.step, restored["kernel"]
        ([20, 30], 30, Array([0., 1., 2.], dtype=float32))

    References:
        Orbax `CheckpointManager`: https://orbax.readthedocs.io/en/latest/guides/checkpoint/api_refactor.html
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        keep_last: int = 2,
        keep_best: int = 0,
        metric: str = "loss",
        mode: Mode = "min",
    ) -> None:
        if "://" in os.fspath(path):
            raise ValueError(f"`path` must be on a file system, got {os.fspath(path)!r}.")
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"`keep_last` must be at least 1 and `keep_best` 0, got {keep_last} and {keep_best}.")
        if mode not in ("min", "max"):
            raise ValueError(f"`mode` must be 'min' or 'max', got {mode!r}.")
        self.path = os.path.realpath(path)
        self.config: Mapping[str, Any] = to_json(config or {}, "config")
        self.keep_best, self.metric = keep_best, metric
        self._steps = Steps(self.path, last=keep_last, best=keep_best, metric=metric, mode=mode)

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, in order; the last may still be being written."""
        return self._steps.steps()

    def best_step(self) -> int | None:
        """The step with the best metric among those that are kept; None if no step has it."""
        best = self._steps.best_step()
        return best if best is not None and self.metric in self._steps.figures(best) else None

    def save(
        self,
        step: int,
        state: Any,
        *,
        figures: Mapping[str, float] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Copies a state, and writes it while the run goes on; waits for the checkpoint before it.

        Args:
            step: number of steps that were done.
            state: any tree that `checkpoint.save` accepts, such as a `TrainState`.
            figures: of this step, `metric` among them if best ones are kept.
            progress: what else the run needs to go on, JSON values; those of the first process count.

        Raises:
            TypeError: a leaf of a type that cannot be stored; names it.
            ValueError: there is a checkpoint of this step, a donated array, or leaves that differ between processes.
            OSError: this checkpoint or the one before cannot be written.
        """
        if step in self.steps():
            raise ValueError(f"There is a checkpoint of step {step} in {self.path!r}.")
        manifest, arrays = self._describe(state)
        arrays = same_in_all_processes(manifest, arrays)
        content = {
            "format_version": _FORMAT_VERSION,
            "state": manifest_to_json(manifest),
            "progress": to_json(progress or {}, "progress"),
        }
        self._steps.write(step, arrays, content, {name: float(value) for name, value in (figures or {}).items()})

    def restore(self, state: Any, *, step: int | None = None, donate: bool = False) -> tuple[Any, StepInfo]:
        """The state of a step.

        Args:
            state: one like it, such as that at the beginning of the run: its structure, shapes and dtypes are checked,
                and its leaves tell where those of the result lie. It may be on another mesh.
            step: of which; by default the last.
            donate: delete the arrays of `state` before those of the checkpoint are read, so that there is memory for
                one state only.

        Returns:
            `(state, info)`.

        Raises:
            FileNotFoundError: there is no checkpoint, or none of this step.
            CheckpointError: it is of another config, of a state with other leaves, or damaged; says what differs.
        """
        self.wait()
        steps = self.steps()
        if not steps or step not in (None, *steps):
            raise FileNotFoundError(f"There is no checkpoint of step {step} in {self.path!r}, only of steps {steps}.")
        step = steps[-1] if step is None else step
        manifest, live = self._describe(state)
        content = together(lambda: self._read_checked(step, manifest))
        targets = {name: _target(array) for name, array in live.items()}
        if donate:
            for leaf in jax.tree.leaves(state):
                if isinstance(leaf, jax.Array):
                    leaf.delete()
        arrays = self._steps.read_arrays(step, targets)
        arrays = {name: _placed(array, live[name]) for name, array in arrays.items()}
        arrays |= _empty(manifest, arrays)
        treedef, order = order_like(manifest, state)
        leaves = [decode_leaf(manifest.leaves[at].value, arrays) for at in order]
        return treedef.unflatten(leaves), StepInfo(
            step=step,
            figures=self._steps.figures(step),
            progress=content["progress"],
            config=content["state"]["config"],
            versions=content["state"]["versions"],
        )

    def wait(self) -> None:
        """Returns when all checkpoints are written.

        Raises:
            OSError: one cannot be; says why in one line.
        """
        self._steps.wait()

    def close(self) -> None:
        """Waits, and lets go of threads; nothing can be done after it."""
        self._steps.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _describe(self, state: Any) -> tuple[Manifest, dict[str, Any]]:
        # JAX sorts the keys of dicts, and so do the states that a step returns; the state at the beginning may have
        # them in another order.
        state = jax.tree.map(lambda leaf: leaf, state, is_leaf=is_compressed)
        return together(lambda: describe(state, self.config, {}, "orbax"))

    def _read_checked(self, step: int, manifest: Manifest) -> dict[str, Any]:
        content = self._steps.read_manifest(step)
        where = f"the checkpoint of step {step} in {self.path!r}"
        if content.get("format_version") != _FORMAT_VERSION:
            raise CheckpointError(
                f"Cannot restore {where}: it has format version {content.get('format_version')!r}, and this version "
                f"of jaxcompress reads {_FORMAT_VERSION}."
            )
        check_config(where, content["state"]["config"], self.config)
        check_state(where, content["state"], manifest_to_json(manifest))
        return content


def _target(array: Any) -> Any:
    if isinstance(array, jax.Array) and _has_place(array):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
    # One element, broadcast: it takes no memory.
    return np.broadcast_to(np.zeros((), jnp.dtype(array.dtype)), array.shape)


def _placed(array: Any, live: Any) -> Any:
    if isinstance(live, jax.Array) and not _has_place(live):
        # Without a place of its own, as it was: arrays that are bound to one device do not go with those of a mesh.
        moved = jnp.array(array, copy=True)
        return jax.device_put(moved, live.sharding) if live.committed else moved
    return array


def _has_place(array: jax.Array) -> bool:
    """Whether Orbax may put it in place: what every process has for itself is read by all."""
    return array.committed and (jax.process_count() == 1 or not array.is_fully_addressable)


def _empty(manifest: Manifest, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays without elements, which Orbax does not store."""
    values = [value for record in manifest.leaves for value in record.value.arrays() if value.array not in arrays]
    return {
        value.array or "": (np if value.kind.startswith("numpy") else jnp).zeros(value.shape or (), value.dtype)
        for value in values
    }
