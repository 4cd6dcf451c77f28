# SPDX-License-Identifier: MIT
"""What the tests of every folder need."""

import os
import signal

# A buffer whose device is not said is on the CPU, on machines with a GPU too.
os.environ.setdefault("MSCCLPP_EP_DEVICE", "cpu")


def pytest_configure():
    # A shell that runs pytest in the background makes it ignore Ctrl-C, and every process that it
    # starts inherits that; some tests interrupt those.
    signal.signal(signal.SIGINT, signal.default_int_handler)
