# SPDX-License-Identifier: MIT
"""What ranks do in a test: functions that take the rank's context, and arguments."""
