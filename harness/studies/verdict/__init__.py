"""How often ``verdict`` is wrong, beside the rules that people use: on clean pairs, and on planted faults."""
