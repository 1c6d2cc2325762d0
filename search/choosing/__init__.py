"""From alpha to dilations: the exact choice, what candidates cost, gains.

Imports `supernet` and `space`.
"""
