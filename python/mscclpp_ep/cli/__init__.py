# SPDX-License-Identifier: MIT
"""The programs of `python -m mscclpp_ep`; they need the `cli` extra, the library does not."""


class InputError(Exception):
    """What the user gave cannot be used; the message says why and what would do."""
