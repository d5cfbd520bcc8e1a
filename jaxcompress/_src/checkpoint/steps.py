"""Checkpoints of a run by step, with Orbax's `CheckpointManager`: asynchronous, the last and the best are kept.

Orbax writes a step under a temporary name and renames it when it is whole. What is removed is renamed first, too: a
kill in the middle of removing must not leave a part of a step under the name of one.
"""

import concurrent.futures
import contextlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from jaxcompress._src.checkpoint.errors import CheckpointError
from jaxcompress._src.checkpoint.manifest_file import checksum
from jaxcompress._src.checkpoint.processes import is_first
from jaxcompress._src.checkpoint.store import as_os_error, checked_arrays, without_tracebacks

_ARRAYS, _MANIFEST, _REMOVED = "arrays", "manifest", ".removed"

Mode = Literal["min", "max"]
"""Whether small or large values of a metric are good."""


class Steps:
    """Arrays and a manifest for each of some steps of a run, in one directory.

    All JAX processes make the same calls, on a file system that they share.

    Args:
        directory: absolute; made if there is none.
        last: how many of the last steps to keep.
        best: how many of the best steps to keep besides.
        metric: which figure tells the best.
        mode: whether it should be small or large.
    """

    def __init__(self, directory: str, *, last: int, best: int, metric: str, mode: Mode) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy

        def score(figures: Mapping[str, float]) -> float:
            value = figures.get(metric, math.nan) * (1 if mode == "max" else -1)
            return -math.inf if math.isnan(value) else value

        self._directory, self._args = directory, ocp.args
        self._remover = concurrent.futures.ThreadPoolExecutor(1, "checkpoint-remover")
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(
                    [preservation_policy.LatestN(last), preservation_policy.BestN(get_metric_fn=score, n=best)]
                ),
                best_fn=score,
                cleanup_tmp_directories=True,
                todelete_subdir=_REMOVED,
                save_root_metadata=False,
            ),
            item_names=(_ARRAYS, _MANIFEST),
        )
        self._remove()

    def steps(self) -> list[int]:
        """All steps that are there or being written, in order."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The best of them; None if there is none."""
        return self._manager.best_step()

    def figures(self, step: int) -> dict[str, float]:
        """Those that were given with a step."""
        return dict(self._manager.metrics(step) or {})

    def write(
        self, step: int, arrays: Mapping[str, Any], manifest: Mapping[str, Any], figures: Mapping[str, float]
    ) -> None:
        """Begins to write a step, when the one before is written; the arrays may be donated when this returns.

        Args:
            step: not there yet.
            arrays: by name, none without elements.
            manifest: JSON values; those of the first process count.
            figures: of this step, finite or not.

        Raises:
            OSError: this step or the one before cannot be written; says why in one line.
        """
        manifest = dict(manifest) | {"checksum": checksum(manifest)}
        items = self._args.Composite(
            **{_ARRAYS: self._args.StandardSave(dict(arrays)), _MANIFEST: self._args.JsonSave(manifest)}
        )
        self._as_os_errors(lambda: self._manager.save(step, args=items, metrics=dict(figures), force=True))
        self._remove()

    def read_manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        items = self._args.Composite(**{_MANIFEST: self._args.JsonRestore()})
        manifest = self._as_checkpoint_errors(step, lambda: self._manager.restore(step, args=items)[_MANIFEST])
        if not isinstance(manifest, dict) or manifest.get("checksum") != checksum(manifest):
            raise CheckpointError(
                f"The manifest of step {step} in {self._directory!r} is damaged: {self._advice(step)}"
            )
        return {name: value for name, value in manifest.items() if name != "checksum"}

    def read_arrays(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The arrays of a step; `targets` as in `store.read_arrays`.

        Raises:
            CheckpointError: they cannot be read, or are not those that were asked for.
        """
        items = self._args.Composite(**{_ARRAYS: self._args.StandardRestore(dict(targets))})
        arrays = self._as_checkpoint_errors(step, lambda: self._manager.restore(step, args=items)[_ARRAYS])
        return checked_arrays(os.path.join(self._directory, str(step)), arrays, targets)

    def wait(self) -> None:
        """Returns when everything is written.

        Raises:
            OSError: it cannot be; says why in one line.
        """
        self._as_os_errors(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, and lets go of threads; nothing can be done after it."""
        try:
            self._as_os_errors(self._manager.close)
        finally:
            self._remove()
            self._remover.shutdown()

    def _remove(self) -> None:
        if is_first():
            self._remover.submit(_empty, os.path.join(self._directory, _REMOVED))

    def _as_os_errors(self, function: Callable[[], Any]) -> None:
        try:
            with without_tracebacks():
                function()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as err:
            raise as_os_error(self._directory, err) from None

    def _as_checkpoint_errors(self, step: int, function: Callable[[], Any]) -> Any:
        try:
            with without_tracebacks():
                return function()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as err:
            raise CheckpointError(
                f"Orbax cannot read step {step} in {self._directory!r}: {type(err).__name__}: {err}. "
                f"{self._advice(step)}"
            ) from err

    def _advice(self, step: int) -> str:
        return f"Remove {os.path.join(self._directory, str(step))!r} to go on from the step before it."


def _empty(directory: str) -> None:
    # Not the directory itself, into which Orbax may be moving the next step.
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)
