"""Kernels under Triton's interpreter, on the CPU.

The interpreter must be chosen before a kernel is imported, so these tests need a process of their own:
``tests/engine/kernels/test_interpreted.py`` starts it and counts them. In any other process there is nothing
here.
"""

import os
from typing import Any

import numpy as np
from hypothesis import settings

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

if not collect_ignore_glob:
    # --hypothesis-profile=many draws more.
    settings.register_profile("few", max_examples=4, deadline=None)
    settings.register_profile("many", max_examples=20, deadline=None)
    settings.load_profile("few")

    from triton._C.libtriton import interpreter
    from triton.runtime import interpreter as interpreted
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    def fused(builder: InterpreterBuilder, x: Any, y: Any, z: Any) -> TensorHandle:
        """``x * y + z`` with the product exact, as float64 holds it."""
        return TensorHandle((x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)

    def smaller(builder: InterpreterBuilder, x: Any, y: Any) -> TensorHandle:
        return builder.binary_op(x, y, np.fmin)

    def larger(builder: InterpreterBuilder, x: Any, y: Any) -> TensorHandle:
        return builder.binary_op(x, y, np.fmax)

    # The interpreter of Triton before 3.9 rounds twice in an fma, and NaN wins in its minimum and maximum; no GPU does either.
    if not hasattr(interpreter, "fma_fp32"):
        InterpreterBuilder.create_fma = fused
        InterpreterBuilder.create_minnumf = smaller
        InterpreterBuilder.create_maxnumf = larger

    def call(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """What a kernel calls: Triton's language is patched for it at its first call, and that patch stays, as it does in Triton.

        Triton patches again at every call, which is a quarter of these tests' time.
        """
        if function.fn not in InterpretedFunction.rewritten_fn:
            interpreted._patch_lang(function.fn)
        return function.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = call
