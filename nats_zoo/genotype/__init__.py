"""Genotypes as plain data: runs, files, merging, provenance, the published ones.

Imports `base` and nothing else of nats_zoo.
"""

from .catalogue import published_genotypes
from .genotype import Genotype
from .runs import Run

__all__ = ["Genotype", "Run", "published_genotypes"]
