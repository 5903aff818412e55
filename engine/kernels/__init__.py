"""One Triton kernel (or a small family) and its plain-torch twin per file.

``xxx`` launches Triton and needs a GPU (or ``TRITON_INTERPRET=1``); ``xxx_torch`` takes the same arguments,
runs on any device and in float64 too. Callers choose: nothing here looks at a device to pick for them.

Annotations stay evaluated in these files (no ``from __future__ import annotations``): Triton's interpreter
recognises ``tl.constexpr`` parameters by the object, not by its name in a string.
"""
