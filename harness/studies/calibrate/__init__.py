"""``shardproof calibrate``: measures what correct code gets wrong, so that tolerances are not chosen.

``collect`` runs clean random cases (``draws``, ``jobs``) and measures them (``samples``); ``fit`` turns these into constants;
``judge`` holds other seeds, of other shapes, against the constants in ``budgets.py`` and counts false alarms; ``power``
plants an error in one rank's part and finds the smallest that is seen; ``report`` makes records of it all.
"""

DEFAULT_MODELS = 15
"""Float32 models that are judged under each setting, unless told otherwise."""
