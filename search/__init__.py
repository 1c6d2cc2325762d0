"""Finds genotypes: a differentiable, channel-level search over dilations."""
