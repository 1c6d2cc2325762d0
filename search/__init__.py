"""Finds genotypes: differentiable, channel-level searches over dilations."""

from .config import SearchConfig
from .decode import decode, decode_network
from .searched_conv import MixtureConv2d, SampledConv2d, SearchedConv2d, SensitivityConv2d
from .searcher import Searcher
from .space import SPACES, SearchError, SearchSpace, find_space
from .supernet import build_supernet, calibrate, draw_pairs

__all__ = [
    "SPACES",
    "MixtureConv2d",
    "SampledConv2d",
    "SearchConfig",
    "SearchError",
    "SearchSpace",
    "SearchedConv2d",
    "Searcher",
    "SensitivityConv2d",
    "build_supernet",
    "calibrate",
    "decode",
    "decode_network",
    "draw_pairs",
    "find_space",
]
