"""Charts of a genotype and of receptive fields; the house's colours.

Imports `networks`, `genotype` and `base`. matplotlib, which is slow to import, is loaded by what draws only.
"""

import os

from ..genotype.genotype import Genotype


def save_chart(genotype: Genotype, path: str | os.PathLike) -> None:
    """Draw the genotype as for a model card: a PNG file.

    >>> save_chart(Genotype.load("mine.json"), "mine.png")
    """
    from .genotype_chart import genotype_chart

    genotype_chart(genotype, path)
