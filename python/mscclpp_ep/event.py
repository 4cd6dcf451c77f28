"""Events, as DeepEP's callers use them. On the CPU a call returns with its work done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mscclpp_ep import _core
from mscclpp_ep._core import InvalidArgument
from mscclpp_ep._devices import current_stream, current_stream_on, stream_handle

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class EventHandle:
    """A point in the current stream, recorded when this is made.

    The stream is Torch's, or else CuPy's, if one of them is imported and uses a GPU. Without, there
    are no streams, and the event has passed already.
    """

    def __init__(self) -> None:
        """Records the event.

        Raises:
            CudaError: It cannot be recorded.
        """
        current = current_stream() if _core.is_cuda_built() else None
        self._record(*current or (None, 0))

    @classmethod
    def on(cls, stream: int | None, gpu: int) -> EventHandle:
        """An event on a stream, a cudaStream_t; on None it has passed already."""
        event = cls.__new__(cls)
        event._record(stream, gpu)
        return event

    def _record(self, stream: int | None, gpu: int) -> None:
        self._gpu = gpu
        self._note: Callable[[object], None] | None = None
        self._event = None if stream is None else _core.Event(stream, gpu)

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for the event, if it has not passed already."""
        if self._event is None:
            return
        stream = current_stream_on(self._gpu)
        self._event.wait(stream_handle(stream))
        if self._note is not None:
            self._note(stream)

    def tell_streams_to(self, note: Callable[[object], None]) -> None:
        """Lets a function know of each stream that waits for the event."""
        self._note = note

    def synchronize(self) -> None:
        """Waits for the event on the host."""
        if self._event is not None:
            self._event.synchronize()

    def passed(self) -> bool:
        """Whether the event has passed."""
        return self._event is None or self._event.passed()

    @property
    def core(self) -> _core.Event | None:
        """The event of the C++ library; None if it has passed already."""
        return self._event


class EventOverlap:
    """An event and the tensors that must live until it has passed.

    Attributes:
        event: The event; None after a call that was not asynchronous.
        extra_tensors: What is kept alive.
        hook_after_wait: What the next wait calls, once; or None.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[object, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None
        self._release_at_exit = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Makes the current stream wait for the event.

        Args:
            release_handle: Forget the event afterwards.

        Raises:
            InvalidArgument: There is no event, as the call was not made with `async_finish`.
        """
        if self.event is None:
            msg = "there is no event to wait for: the call was not made with async_finish=True"
            raise InvalidArgument(msg)
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], object]) -> None:
        """Lets the next wait call a function when it has waited; replaces one not called yet."""
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For `with event(release_handle=True):`, which forgets the event at the end.

        Args:
            release_handle: As of `current_stream_wait`, for the wait at the end of the block.

        Returns:
            This object.
        """
        self._release_at_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        release, self._release_at_exit = self._release_at_exit, False
        if self.event is not None:
            self.current_stream_wait(release)
