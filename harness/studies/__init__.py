"""What is run once a release: calibration of the budgets, and the error rates of ``compare``."""
