"""Marks that several test files share."""

import pytest
import torch

from nats_zoo.networks.export import ONNX_TORCH

needs_onnx = pytest.mark.skipif(torch.__version__ < ONNX_TORCH, reason="an older torch exports nothing to ONNX")
