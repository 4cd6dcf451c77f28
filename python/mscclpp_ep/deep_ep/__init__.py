# SPDX-License-Identifier: MIT
"""The names of the package `deep_ep`, for programs written for it; needs torch.

`mscclpp_ep.install_as_deep_ep()` lets this process import it as `deep_ep`, and
`python -m mscclpp_ep run-as-deep-ep` runs a program that does.

Attributes:
    topk_idx_t: The dtype in which `topk_idx` is received by default, torch.int64; int32 works too.
"""

import torch

from mscclpp_ep import Buffer, Config, EventHandle, EventOverlap, __version__
from mscclpp_ep.deep_ep import utils

topk_idx_t: torch.dtype = torch.int64

__all__ = [
    "Buffer",
    "Config",
    "EventHandle",
    "EventOverlap",
    "__version__",
    "topk_idx_t",
    "utils",
]
