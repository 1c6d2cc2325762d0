"""Detectors in bf16 or fp16 with boxes in full precision.

Under autocast torchvision's heads give offsets in the low precision, and its box coder converts the boxes to the
offsets' precision: with bf16's eight bits a coordinate beyond 512 pixels is rounded to a multiple of 4 pixels. Offsets
and scores lose little by it, coordinates a lot.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...base.errors import NatsError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Names of the modules from whose outputs torchvision's detectors compute boxes, scores and masks.
HEADS = re.compile(r"rpn\.head|head|roi_heads\.(box|mask)_predictors?(\.\d+)?")


@contextmanager
def mixed_precision(detector: nn.Module, precision: str) -> Iterator[None]:
    """Run a detector under autocast, its boxes, scores and masks computed in float32 from its heads' outputs.

    Args:
        detector: on its device.
        precision: "no" (nothing changes), "bf16" or "fp16".

    Raises:
        NatsError: an unknown precision, or fp16 without a GPU.

    Example:
        >>> with mixed_precision(detector, "bf16"):
        ...     losses = detector(images, targets)
    """
    device = next(detector.parameters()).device.type
    check_precision(precision, device)
    if precision == "no":
        yield
        return
    hooks = keep_boxes_exact(detector)
    try:
        with torch.autocast(device, DTYPES[precision]):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def keep_boxes_exact(detector: nn.Module) -> list[RemovableHandle]:
    """Have a detector's heads give float32 whatever they compute in; in float32 nothing changes.

    Returns:
        Handles, by which it is undone.

    Example:
        >>> handles = keep_boxes_exact(detector)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     losses = detector(images, targets)
    """
    heads = [module for name, module in detector.named_modules() if HEADS.fullmatch(name)]
    return [head.register_forward_hook(_to_float32) for head in heads]


def check_precision(precision: str, device: str) -> None:
    """NatsError for a precision that does not exist or is not for a type of device.

    Example:
        >>> check_precision("fp16", "cpu")
        Traceback (most recent call last):
        NatsError: precision: fp16 is not for the device 'cpu', bf16 may be
    """
    if precision not in ("no", *DTYPES):
        raise NatsError(f"precision: {precision!r} is unknown, expected one of no, {', '.join(DTYPES)}")
    if precision == "fp16" and device == "cpu":
        raise NatsError("precision: fp16 is not for the device 'cpu', bf16 may be")


def _to_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the same structure of tensors, those in low precision in float32."""
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype in DTYPES.values() else output
    if isinstance(output, dict):
        return {key: _to_float32(module, inputs, value) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return type(output)(_to_float32(module, inputs, value) for value in output)
    return output
