"""The background process of a run: it calibrates, runs trials and answers requests, and can be killed at any moment."""
