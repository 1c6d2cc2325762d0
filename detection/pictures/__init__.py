"""Drawing boxes, masks and labels onto images.

Imports `nats_zoo`, nothing else of detection.
"""
