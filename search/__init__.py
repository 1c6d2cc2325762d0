"""Finds genotypes: a differentiable, channel-level search over dilations."""

from .decode import decode, decode_network
from .searcher import SearchConfig, Searcher
from .space import SPACES, SearchError, SearchSpace
from .supernet import MixtureConv2d, build_supernet, calibrate

__all__ = [
    "SPACES",
    "MixtureConv2d",
    "SearchConfig",
    "SearchError",
    "SearchSpace",
    "Searcher",
    "build_supernet",
    "calibrate",
    "decode",
    "decode_network",
]
