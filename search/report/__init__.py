"""What a search came to: the outcome in figures, its pictures, its page.

Imports `supernet`, `choosing` and `space`.
"""
