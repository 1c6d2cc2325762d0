"""Charts of a genotype and of receptive fields; the house's colours.

Imports `networks`, `genotype` and `base`; matplotlib only when something is drawn.
"""
