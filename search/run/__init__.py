"""A search's run: the searcher, trials by sensitivity, provenance.

Imports everything of search but `demo`.
"""
