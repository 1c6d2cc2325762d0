"""Batch normalisation after a change of dilation: remeasure the statistics."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..base.errors import NatsError


@torch.no_grad()
def recalibrate_bn(model: nn.Module, loader: Iterable) -> nn.Module:
    """Replace every batch norm's running mean and variance by those of the given batches.

    Another dilation changes a convolution's output statistics. Each batch is normalised by its own statistics while
    their cumulative average (equal weight per batch) is taken; nothing else is trained.

        >>> model = timm.create_model("nats_resnet50.tv_in1k", pretrained=True)
        >>> recalibrate_bn(model, loader)

    Args:
        model: called as `model(images)`; its batch norms must be live (not frozen modules).
        loader: batches of images (N, C, H, W), or tuples that begin with one. All of them are used.

    Returns:
        The same model, in the mode it was in.

    Raises:
        NatsError: no batch norm with running statistics, or no batch. On any error the statistics stay what they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise NatsError("recalibrate_bn: the model has no batch norm with running statistics")
    device = next(norms[0].buffers()).device
    batches = 0
    with _measuring(model, norms):
        for batch in loader:
            images: Tensor = batch if isinstance(batch, Tensor) else batch[0]
            model(images.to(device))
            batches += 1
    if not batches:
        raise NatsError("recalibrate_bn: the loader gave no batch")
    return model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluate for a while; every module gets its own mode back: frozen ones stay so while the rest trains.

    >>> with evaluation_mode(model):
    ...     logits = model(images)
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _measuring(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    before = [{key: value.clone() for key, value in norm.state_dict().items()} for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # torch's way to ask for a cumulative average
    finished = False
    try:
        yield
        finished = True
    finally:
        for norm, momentum, state in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if not finished or not norm.num_batches_tracked:  # an error, or no batch came: keep what was there
                norm.load_state_dict(state)
        for module, training in modes.items():
            module.training = training
