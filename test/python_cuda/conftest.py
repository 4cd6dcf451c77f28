# SPDX-License-Identifier: MIT
"""What the tests on a GPU need before a framework is imported."""

import os

# JAX would take most of the GPU's memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
