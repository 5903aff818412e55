"""What an installation starts with: the command and the pytest plugin, under a name that no project has a module of.

Installed, this package is ``shardproof`` as well (pyproject.toml), so that pytest can load the plugin in a project that has a
package ``harness`` of its own. Hence its modules import each other relatively, and nothing else of the project until it is used.
"""

__version__ = "0.1.0"
