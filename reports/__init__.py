"""Records of a run, and the tables, pages and verdicts computed from them alone.

Imports nothing else of the project, and no torch: a report can be read, compared and rendered on any machine.
"""
