"""The client of the Hugging Face Hub: its settings, checked downloads, faults in one line.

Imports `base`.
"""
