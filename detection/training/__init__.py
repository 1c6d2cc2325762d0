"""Training a detector.

Imports everything of detection.
"""
