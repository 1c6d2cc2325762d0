"""COCO evaluation of a detector: metrics, errors, the report with its sheets.

Imports `runs`, `models`, `data` and `pictures`.
"""
