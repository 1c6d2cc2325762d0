"""Convolutions at several dilations, and what is done to a network that has them.

Imports `genotype` and `base`; knows no folder and no Hub.
"""
