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

    def agreed(self, step: Any) -> int:
        """The number of a signal that some process received, or 0: the same in all processes.

        With several processes, all of them call it after every step; what one has received, all know one call later.

        Args:
            step: arrays that the step under way returned.
        """
        agreed = self._received if self._agreement is None else self._agreement.exchange(self._received, step)
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
        mesh = Mesh(np.array(jax.devices()), "devices")
        self._sharding = NamedSharding(mesh, P("devices"))
        self._largest = jax.jit(lambda numbers: numbers.max(), out_shardings=NamedSharding(mesh, P()))
        self._pending: jax.Array | None = None

    def exchange(self, number: int, step: Any) -> int:
        """The largest of the numbers of the call before."""
        # A CPU runs programs side by side, and their messages to other processes get mixed up; accelerators run them
        # one after the other.
        in_order = jax.default_backend() != "cpu"
        if not in_order:
            jax.block_until_ready(step)
        pending = self._pending
        local = np.full(len(self._sharding.addressable_devices), number, np.int32)
        self._pending = self._largest(jax.make_array_from_process_local_data(self._sharding, local))
        if not in_order:
            jax.block_until_ready(self._pending)
        return 0 if pending is None else int(np.asarray(pending))
