"""timm's plain networks without their memory: names, shapes and order of the convolutions."""

from typing import Any

import timm
import torch
from torch import nn

from ..base.errors import NatsError, one_line, short
from ..base.names import VARIANT_PREFIX


def meta_network(name: Any, *, what: str = "backbone", error: type[NatsError] = NatsError, **options: Any) -> nn.Module:
    """Build timm's plain network on the meta device.

        >>> meta_network("resnet18").conv1.weight.shape
        torch.Size([64, 3, 7, 7])

    Args:
        name: timm's; a tag and the prefix of a variant are left out.
        what: what error messages call it.
        error: the class of errors.
        **options: go to `timm.create_model`, such as `features_only`.

    Raises:
        NatsError: of the class `error`: no such network, or options that it does not take.
    """
    plain = name.partition(".")[0].removeprefix(VARIANT_PREFIX) if isinstance(name, str) else ""
    if not timm.is_model(plain):
        raise error(f"{what}: timm has no model {short(name)}")
    try:
        with torch.device("meta"):
            return timm.create_model(plain, **options)
    except (RuntimeError, AssertionError, TypeError) as reason:  # features_only of a network that has no such form
        raise error(f"{what} {plain}: {one_line(reason)}") from reason
