"""The background process of a run: calibration, trials, requests. It may be killed at any moment."""
