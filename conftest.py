"""Makes the harness's pytest plugin known when the tests run from a checkout."""

from __future__ import annotations

pytest_plugins = ["harness.plugin", "pytester"]
