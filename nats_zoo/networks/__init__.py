"""Convolutions at several dilations, and what is done to a network that has them.

Imports `genotype` and `base`; knows no folder and no Hub.
"""

from . import ic_conv, transfer  # they hand Genotype the methods that look at networks

__all__ = ["ic_conv", "transfer"]
