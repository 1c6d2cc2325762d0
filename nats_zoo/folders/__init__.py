"""Model folders, on disk or on the Hub: limits, checked weights, and the one door to genotypes by name.

Imports `hub`, `genotype` and `base`.
"""
