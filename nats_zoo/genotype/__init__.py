"""Genotypes as plain data: runs, files, merging, provenance, the published ones.

Imports `base` and nothing else of nats_zoo.
"""

from .genotype import Genotype, Run, published_genotypes

__all__ = ["Genotype", "Run", "published_genotypes"]
