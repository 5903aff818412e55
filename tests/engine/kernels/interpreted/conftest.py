"""Kernels under Triton's interpreter, on the CPU.

The interpreter must be chosen before a kernel is imported, so these tests need a process of their own:
``tests/engine/kernels/test_interpreted.py`` starts it and counts them. In any other process there is nothing
here.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
