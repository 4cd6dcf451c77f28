"""Events, as DeepEP's callers use them. On the CPU a call returns with its work done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mscclpp_ep._core import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


class EventHandle:
    """A point in a stream, recorded when this is made."""

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for the event. On the CPU it has passed already."""


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
