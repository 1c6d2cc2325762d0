"""What a run computes on."""

import platform

import timm
import torch
import torchvision
from accelerate import Accelerator

from ...version import __version__

PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


def describe_hardware(accelerator: Accelerator) -> dict[str, str]:
    """Device, precision and processes of this run, and the versions of what computes."""
    device = accelerator.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type.upper()} ({platform.machine()}), {torch.get_num_threads()} threads"
    packages = {"torch": torch, "torchvision": torchvision, "timm": timm}
    return {
        "device": name,
        "processes": str(accelerator.num_processes),
        "precision": PRECISIONS.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "nats-zoo": __version__,
        **{package: module.__version__ for package, module in packages.items()},
        "Python": platform.python_version(),
    }
