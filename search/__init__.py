"""Finds genotypes: differentiable, channel-level searches over dilations."""

from .choosing.cost import CostTable
from .choosing.gains import calibrate_gains
from .config import SearchConfig
from .run.searcher import Searcher
from .space import SPACES, SearchError, SearchSpace, find_space
from .supernet.build import build_supernet, calibrate, draw_pairs
from .supernet.decode import decode, decode_network
from .supernet.searched_conv import MixtureConv2d, SampledConv2d, SearchedConv2d, SensitivityConv2d

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
