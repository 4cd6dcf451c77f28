"""Expert-parallel dispatch and combine for mixture-of-experts layers, for any array framework."""

from mscclpp_ep._as_deep_ep import install_as_deep_ep
from mscclpp_ep._core import (
    BufferStats,
    Config,
    CudaError,
    Error,
    InvalidArgument,
    NotBuilt,
    PeerFailure,
    SystemError,
    Timeout,
    build_info,
)
from mscclpp_ep._dlpack_array import DLPackArray
from mscclpp_ep.buffer import Buffer
from mscclpp_ep.event import EventHandle, EventOverlap
from mscclpp_ep.group import Group, GroupLike, as_group
from mscclpp_ep.handle import DispatchHandle, LowLatencyHandle
from mscclpp_ep.recording import record_routing

__version__: str = build_info()["version"]

__all__ = [
    "Buffer",
    "BufferStats",
    "Config",
    "CudaError",
    "DLPackArray",
    "DispatchHandle",
    "Error",
    "EventHandle",
    "EventOverlap",
    "Group",
    "GroupLike",
    "InvalidArgument",
    "LowLatencyHandle",
    "NotBuilt",
    "PeerFailure",
    "SystemError",
    "Timeout",
    "__version__",
    "as_group",
    "build_info",
    "install_as_deep_ep",
    "record_routing",
]
