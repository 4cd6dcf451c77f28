# SPDX-License-Identifier: MIT
"""What `import deep_ep` finds when this file's folder is on PYTHONPATH: mscclpp_ep's module."""

import sys

from mscclpp_ep import install_as_deep_ep

# The import system returns what it finds under this name in the end, which is to be that module.
del sys.modules[__name__]
install_as_deep_ep()
