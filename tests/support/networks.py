"""What it takes for every convolution of any timm network to matter to its output, for tests of equality."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def wake(model):
    """Random values for all parameters that begin constant, such as layer scales, which begin at almost zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim and torch.all(parameter == parameter.flatten()[0]):
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


@torch.no_grad()
def settle(model, images):
    """Batch norm statistics of these images: with random ones, activations of deep networks explode or die out."""
    for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
        norm.momentum = 1.0
        norm.train()
    model(images)
    return model.eval()
