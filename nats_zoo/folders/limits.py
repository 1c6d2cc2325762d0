"""What someone else's config.json may ask for: plain data within limits, and a network of bounded size.

timm passes a config's `model_args` to the constructor of a network, and its `pretrained_cfg` to the loader of weights.
So a config could name files and addresses to load weights from, or numbers for which a constructor takes all memory.
Both are looked at before timm sees them. What a network of these arguments then takes is counted while it is built,
on the meta device, where tensors take no memory; modules still take time, and end as soon as there are too many.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ..base.errors import NatsError, one_line, short

MAX_CLASSES = 2**18
MAX_NUMBER = 2**12  # of any other integer among a constructor's arguments: channels, depths
MAX_PIXELS = 2**11  # of those that say an image's or a window's size, to the square of which tables are computed
MAX_VALUES = 512  # of a constructor's arguments, nested ones counted singly
MAX_ARGS_LEVELS = 6
MAX_CHARACTERS = 200  # of a string
MAX_ELEMENTS = 2**31  # numbers in a network's parameters, 9 GB in float32, where its weights' file is not at hand
MAX_MODULES = 20_000  # several times what the deepest network of timm has

# Arguments of timm's factory, not of a network: where weights come from and what becomes of them, and where they lie.
_FACTORY_ARGS = frozenset({
    "cache_dir", "checkpoint_path", "device", "dtype", "feature_cls", "feature_cfg", "kwargs_filter", "model_cfg",
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load", "pretrained_filter_fn",
    "pretrained_model_args", "pretrained_strict", "pruned", "self", "variant",
})  # fmt: skip
_CFG_STRINGS = ("classifier", "first_conv")  # a module's name, or several


def check_config(config: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Check the parts of a backbone's config.json that timm reads.

    Args:
        config: the content of a backbone's, in timm's format.
        path: what error messages call it.

    Raises:
        NatsError: naming the file, the key and what was expected.

    Example:
        >>> check_config({"architecture": "resnet18", "num_classes": 10}, "config.json")
    """
    source = str(path)
    if config.get("model_args") is not None:
        check_model_args(config["model_args"], f"{source}: model_args")
    _check_classes(config.get("num_classes"), f"{source}: num_classes")
    if config.get("pretrained_cfg") is not None:
        check_pretrained_cfg(config["pretrained_cfg"], f"{source}: pretrained_cfg")


def check_model_args(args: Any, source: str) -> None:
    """Check the arguments that a config gives a network's constructor, but for the genotype, which checks itself.

    Raises:
        NatsError: what is no plain data within the limits above, or an argument of timm's factory.

    Example:
        >>> check_model_args({"checkpoint_path": "/etc/passwd"}, "config.json: model_args")
        Traceback (most recent call last):
        NatsError: config.json: model_args: checkpoint_path: is no argument of a network, and not taken from a config
    """
    if not isinstance(args, Mapping):
        raise NatsError(f"{source}: expected an object, found {short(args)}")
    for key, value in args.items():
        if not isinstance(key, str) or not key.isidentifier() or len(key) > MAX_CHARACTERS:
            raise NatsError(f"{source}: expected names of a network's arguments, found {short(key)}")
        if key in _FACTORY_ARGS:
            raise NatsError(f"{source}: {key}: is no argument of a network, and not taken from a config")
        if key == "num_classes":
            _check_classes(value, f"{source}: {key}")
        elif key != "genotype":
            _check_value(value, f"{source}: {key}", MAX_PIXELS if "size" in key else MAX_NUMBER, MAX_ARGS_LEVELS)
    if sum(_count(value) for key, value in args.items() if key != "genotype") > MAX_VALUES:
        raise NatsError(f"{source}: expected at most {MAX_VALUES} values")


def _check_value(value: Any, source: str, most: int, levels: int) -> None:
    if isinstance(value, str) and (len(value) > MAX_CHARACTERS or not value.isprintable()):
        raise NatsError(f"{source}: expected at most {MAX_CHARACTERS} printable characters, found {short(value)}")
    if type(value) in (int, float) and not abs(value) <= most:  # NaN neither
        raise NatsError(f"{source}: expected numbers of at most {most}, found {short(value)}")
    if not isinstance(value, list | tuple | Mapping):
        return
    if not levels:
        raise NatsError(f"{source}: nested too deeply, expected at most {MAX_ARGS_LEVELS} levels")
    for item in (*value.keys(), *value.values()) if isinstance(value, Mapping) else value:
        _check_value(item, source, most, levels - 1)


def _count(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + sum(map(_count, value.values()))
    return 1 + sum(map(_count, value)) if isinstance(value, list | tuple) else 1


def _check_classes(value: Any, source: str) -> None:
    if value is not None and not (type(value) is int and 0 <= value <= MAX_CLASSES):
        raise NatsError(f"{source}: expected an integer from 0 to {MAX_CLASSES}, found {short(value)}")


def check_pretrained_cfg(cfg: Any, source: str) -> None:
    """Check what a config says of the weights: their classes, and how images are prepared for them.

    Raises:
        NatsError: naming the source, the key and what was expected.

    Example:
        >>> check_pretrained_cfg({"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5]}, "config.json: pretrained_cfg")
    """
    if not isinstance(cfg, Mapping):
        raise NatsError(f"{source}: expected an object, found {short(cfg)}")
    _check_classes(cfg.get("num_classes"), f"{source}: num_classes")
    for key in ("input_size", "test_input_size", "min_input_size"):
        size = cfg.get(key)
        if size is not None and not (_are_numbers(size, (int,), MAX_NUMBER) and len(size) == 3 and min(size) >= 1):
            raise NatsError(f"{source}: {key}: expected [channels, height, width], found {short(size)}")
    for key in ("mean", "std"):
        values = cfg.get(key)
        if values is not None and not (_are_numbers(values, (int, float), 1e6) and 1 <= len(values) <= 1024):
            raise NatsError(f"{source}: {key}: expected a list of numbers, found {short(values)}")
    for key in _CFG_STRINGS:
        names = cfg.get(key)
        names = names if isinstance(names, list | tuple) else [names]
        if not all(name is None or (isinstance(name, str) and len(name) <= MAX_CHARACTERS) for name in names):
            raise NatsError(f"{source}: {key}: expected a module's name, or a list of some, found {short(names)}")


def _are_numbers(values: Any, kinds: tuple[type, ...], most: float) -> bool:
    """Tell whether it is a list of numbers of these types, none of them beyond `most` on either side."""
    return isinstance(values, list | tuple) and all(type(one) in kinds and abs(one) <= most for one in values)


@contextmanager
def bounded(source: str, most_elements: int | None = None) -> Iterator[None]:
    """Build a network as someone else's config says in this block, of a bounded size.

    Args:
        source: what error messages call the config.
        most_elements: numbers in all parameters that are made, also of modules that are thrown away, such as the
            classifier of a `features_only` network; None: any.

    Raises:
        NatsError: a network of more elements or modules, or whatever building it raised, in one line: arguments that
            a constructor does not take are told by all kinds of errors.

    Example:
        >>> with bounded("config.json", most_elements=12_000_000):
        ...     model = timm.create_model("resnet18")
    """
    with limited_size(source, most_elements):
        try:
            yield
        except NatsError:
            raise
        except (MemoryError, RecursionError, Exception) as error:
            reason = one_line(error)[:300] or type(error).__name__
            raise NatsError(f"{source}: no network can be built as it says: {reason}") from error


@contextmanager
def on_meta(source: str, most_elements: int | None = None) -> Iterator[None]:
    """As `bounded`, on the meta device, to learn what the config says where no weights' file tells a size.

    Example:
        >>> with on_meta("config.json"):
        ...     shapes = {name: tensor.shape for name, tensor in timm.create_model("resnet18").state_dict().items()}
    """
    with torch.device("meta"), bounded(source, most_elements):
        yield


def is_on_meta() -> bool:
    """Tell whether modules that are built now have no memory.

    Example:
        >>> with torch.device("meta"):
        ...     is_on_meta()
        True
    """
    return torch.empty(0).is_meta


@contextmanager
def limited_size(source: str, most_elements: int | None = None) -> Iterator[None]:
    """End the building of networks in this block, by this thread, as soon as they grow too large.

    Raises:
        NatsError: naming the source and what was expected.

    Example:
        >>> with limited_size("config.json", most_elements=10):
        ...     nn.Linear(5, 5)
        Traceback (most recent call last):
        NatsError: config.json: asks for a network of over 10 parameters
    """
    thread, elements, modules = threading.get_ident(), 0, 0

    def count_parameter(_: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal elements
        is_lazy = isinstance(parameter, nn.UninitializedParameter)
        if threading.get_ident() == thread and parameter is not None and not is_lazy:
            elements += parameter.numel()
            if most_elements is not None and elements > most_elements:
                raise NatsError(f"{source}: asks for a network of over {most_elements:,} parameters")

    def count_module(_: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > MAX_MODULES:
                raise NatsError(f"{source}: asks for a network of over {MAX_MODULES:,} modules")

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
