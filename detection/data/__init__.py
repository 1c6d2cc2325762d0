"""Data sets: reading, checking, images, masks, augmentation.

Imports `nats_zoo`, nothing else of detection.
"""
