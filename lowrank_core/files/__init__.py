"""Untrusted files: JSON records, arrays with digests, weight files of a checkpoint. Torch-free."""
