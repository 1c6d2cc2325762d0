"""timm's entry points of the variants, networks by name, saved backbones.

Imports `networks`, `folders` and what lies below.
"""
