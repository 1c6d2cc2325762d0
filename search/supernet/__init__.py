"""The network during search: convolutions that hold all candidates, building, decoding.

Imports `space`, `config`, and detection.
"""
