"""Finds genotypes: differentiable, channel-level searches over dilations."""

from .config import SearchConfig
from .cost import CostTable
from .decode import decode, decode_network
from .gains import calibrate_gains
from .searched_conv import MixtureConv2d, SampledConv2d, SearchedConv2d, SensitivityConv2d
from .searcher import Searcher
from .space import SPACES, SearchError, SearchSpace, find_space
from .supernet import build_supernet, calibrate, draw_pairs

__all__ = [
    "SPACES",
    "CostTable",
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
    "calibrate_gains",
    "decode",
    "decode_network",
    "draw_pairs",
    "find_space",
]
