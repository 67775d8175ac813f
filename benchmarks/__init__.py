"""Benchmarks: ``pytest benchmarks --benchmark-only``; ``python -m benchmarks.report`` makes tables and plots."""
