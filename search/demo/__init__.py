"""The whole effect on drawn data, in minutes and without a download: `run_demo`."""

from .stages import run_demo

__all__ = ["run_demo"]
