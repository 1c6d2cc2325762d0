"""Finds genotypes: differentiable, channel-level searches over dilations."""

from typing import TYPE_CHECKING

from ..base.lazy import lazy_names

if TYPE_CHECKING:
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

_MODULES = {
    "choosing.cost": "CostTable",
    "choosing.gains": "calibrate_gains",
    "config": "SearchConfig",
    "run.searcher": "Searcher",
    "space": "SPACES SearchError SearchSpace find_space",
    "supernet.build": "build_supernet calibrate draw_pairs",
    "supernet.decode": "decode decode_network",
    "supernet.searched_conv": "MixtureConv2d SampledConv2d SearchedConv2d SensitivityConv2d",
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
