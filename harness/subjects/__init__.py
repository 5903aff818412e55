"""What can be checked: the subjects of this project by name, ``torch:package.module:function``, ``package.module:Class``."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.subjects.base import Subject

SUBJECTS = {"engine": "harness.subjects.engine:EngineSubject",
            "transformers": "harness.subjects.transformers:TransformersSubject",
            "transformers-ep": "harness.subjects.transformers:ExpertParallelSubject",
            "vllm": "harness.subjects.vllm:VllmSubject",
            "vllm-graphs": "harness.subjects.vllm:VllmGraphsSubject"}


def subject_class(name: str) -> type[Subject]:
    """The class of that name. Names with a colon run the code that they name: they may come from a command line alone.

    Raises:
        UsageError: if there is none, or it is no subject.
    """
    path = SUBJECTS.get(name, name)
    module, colon, attribute = path.partition(":")
    if not colon:
        raise UsageError(f"subject={name!r} is unknown; there are: {', '.join(SUBJECTS)}, torch:package.module:function, or "
                         "your own as package.module:Class")
    from harness.subjects.base import Subject

    if name not in SUBJECTS and os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    if module == "torch":
        from harness.subjects.torch_plan import torch_subject

        return torch_subject(attribute)
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"subject={name!r} can't be imported ({type(error).__name__}: {error}): give package.module:Class, "
                         "importable from here") from error
    if not (isinstance(found, type) and issubclass(found, Subject)):
        raise UsageError(f"subject={name!r} must be a subclass of harness.subjects.base.Subject")
    if missing := sorted(getattr(found, "__abstractmethods__", ())):
        raise UsageError(f"subject={name!r} lacks {', '.join(missing)}: every subject has them")
    return found
