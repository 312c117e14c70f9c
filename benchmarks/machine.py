"""The machine of a result, for benchmarks/serving.py."""

from benchmarks.result import machine

__all__ = ["machine"]
