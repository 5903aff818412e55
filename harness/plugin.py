"""For a project that wants the whole pytest plugin: ``pytest_plugins = ["harness.plugin"]``, or ``pytest -p harness.plugin``.

What installing brings by itself acts on tests that take ``ranks`` or ``tp_size``. With this, every ``multigpu`` mark of the
project is the plugin's too.
"""

pytest_plugins = ["harness.shardproof.pytest_plugin"]  # the entry point bears that name, so that pytest takes no second one
