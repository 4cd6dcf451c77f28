# SPDX-License-Identifier: MIT
"""What `python -m mscclpp_ep bench` measures, and how; docs/bench.md tells the method.

It needs the `cli` extra, the library does not.
"""
