"""What runs a step: a rank's core and runner, the captured decode step, and the driver that talks to all ranks."""
