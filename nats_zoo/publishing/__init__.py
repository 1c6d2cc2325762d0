"""Model cards, and publishing on the Hub: backbones, detectors, genotypes, collections.

Imports everything of nats_zoo but `cli`.
"""
