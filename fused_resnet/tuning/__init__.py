"""Tuning: which kernel runs a call, found by verifying and timing all of them, kept per device and version."""

from __future__ import annotations

from .run import Check, Tuning, selftest, selftest_table, tune

__all__ = ["Check", "Tuning", "selftest", "selftest_table", "tune"]
