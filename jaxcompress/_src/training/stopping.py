"""Signals that ask a run to stop, and how all processes stop at the same step."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequests:
    """While it is entered, the first SIGTERM or SIGINT is noted, not obeyed; the second one does what it always did.

    Python hands signals to the main thread only: elsewhere, and where a signal is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self._received = 0
        self._obeyed = False
        self._handlers: dict[int, Any] = {}
        self._agreement = _Agreement() if jax.process_count() > 1 else None

    def agreed(self) -> int:
        """The number of a signal that some process received, or 0: the same in all processes.

        With several processes, all of them call it equally often; what one has received, all know one call later.
        """
        agreed = self._received if self._agreement is None else self._agreement.exchange(self._received)
        self._obeyed = self._obeyed or agreed != 0
        return agreed

    def obey(self, number: int) -> None:
        """Ends the program as the signal asks: SIGINT by `KeyboardInterrupt`, SIGTERM with exit status 143."""
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: a handler that was not installed from Python.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._received and not self._obeyed and kind is None:
            # It came after the last step.
            signal.raise_signal(self._received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = number
        self._restore()

    def _restore(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


class _Agreement:
    """The largest of a number of each process, without waiting for the step under way."""

    def __init__(self) -> None:
        first = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.array([first[process] for process in sorted(first)]), "processes")
        self._sharding = NamedSharding(mesh, P("processes"))
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))
        self._pending: jax.Array | None = None

    def exchange(self, number: int) -> int:
        """The largest of the numbers of the call before."""
        pending = self._pending
        numbers = jax.make_array_from_process_local_data(self._sharding, np.array([number], np.int32))
        self._pending = self._largest(numbers)
        return 0 if pending is None else int(np.asarray(pending))
