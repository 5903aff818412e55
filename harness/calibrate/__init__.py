"""``shardproof calibrate``: measures what correct code gets wrong, so that tolerances are not chosen.

``samples`` runs clean random cases and measures them; ``fit`` turns one set of seeds into constants; ``judge`` holds other
seeds, of other shapes, against the constants in ``harness.budgets`` and counts false alarms; ``power`` plants an error in one
rank's part and finds the smallest that is seen.
"""
