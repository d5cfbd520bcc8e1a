"""The place of a run in its data."""

import base64
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxcompress._src.checkpoint.processes import gather_bytes


class Batches:
    """Batches in order, and how to come back to a place among them.

    The place is a count: a new run skips as many. Iterators that can tell and take a state, as those of Grain
    (`get_state`, `set_state`), are set to it instead.

    Args:
        batches: an iterable, at its beginning.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._iterator: Any = iter(batches)
        self._count = 0

    def next(self) -> Any:
        """The next batch.

        Raises:
            StopIteration: there is none.
        """
        batch = next(self._iterator)
        self._count += 1
        return batch

    def position(self) -> dict[str, Any]:
        """The place after the last batch, as JSON values; where iterators have states, with that of each process.

        Raises:
            TypeError: the state is neither JSON nor bytes.
        """
        position: dict[str, Any] = {"batches": self._count}
        if hasattr(self._iterator, "get_state"):
            states = gather_bytes(json.dumps(_encode(self._iterator.get_state())).encode())
            position["states"] = [json.loads(state) for state in states]
        return position

    def go_to(self, position: Mapping[str, Any]) -> None:
        """Moves on to a place that `position` told, from the beginning.

        Raises:
            ValueError: there are fewer batches, or the states are those of another number of processes.
        """
        self._count = position["batches"]
        states = position.get("states")
        if states is not None and hasattr(self._iterator, "set_state"):
            if len(states) != jax.process_count():
                raise ValueError(
                    f"The checkpoint has the places in the data of {len(states)} processes, and there are "
                    f"{jax.process_count()}; go on with as many, or with batches that have no `set_state`."
                )
            self._iterator.set_state(_decode(states[jax.process_index()]))
            return
        skipped = sum(1 for _ in itertools.islice(self._iterator, self._count))
        if skipped < self._count:
            raise ValueError(f"The checkpoint was written after {self._count} batches, and there are only {skipped}.")


def _encode(state: Any) -> dict[str, Any]:
    if isinstance(state, bytes):
        return {"bytes": base64.b64encode(state).decode()}
    try:
        if json.loads(json.dumps(state, allow_nan=False)) == state:
            return {"json": state}
    except (TypeError, ValueError):
        pass
    raise TypeError(
        f"`get_state()` of the batches returned {state!r:.80}, which JSON does not give back; it must be JSON or bytes."
    )


def _decode(content: Mapping[str, Any]) -> Any:
    return base64.b64decode(content["bytes"]) if "bytes" in content else content["json"]
