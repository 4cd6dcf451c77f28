# SPDX-License-Identifier: MIT
"""What the tests share: pools of ranks, cases, the oracle, and the programs that ranks run."""
