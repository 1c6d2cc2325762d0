"""torchvision's detectors on timm backbones: building, converting, saving, loading.

Imports `nats_zoo`, nothing else of detection but `metrics`.
"""
