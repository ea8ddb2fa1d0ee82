"""Benchmarks behind the README's tables: the same code that users run, and every number measured."""
