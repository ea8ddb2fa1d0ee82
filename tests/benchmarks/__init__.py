"""Measurements that drive a real browser; run by name, never collected."""
