"""A plugin of mypy: types of torch's modules that torch declares too widely.

What `nn.Module.__getattr__` finds is declared as `Tensor | Module`, which holds for parameters, buffers and submodules
but not for the attributes that timm, torchvision and we set: any type, here. And a Conv2d's kernel size, stride,
padding and dilation, declared as tuples of any length, are pairs.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Instance, TupleType, Type, TypeOfAny, UnionType, get_proper_type

_MODULE = "torch.nn.modules.module.Module."
_CONVOLUTION = "torch.nn.modules.conv._ConvNd."
_PAIRS = frozenset({"kernel_size", "stride", "padding", "dilation"})


class TorchPlugin(Plugin):
    """Takes over the attributes that the module's docstring names."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        if fullname.startswith(_MODULE):
            return _found_dynamically
        if fullname.startswith(_CONVOLUTION) and fullname.rpartition(".")[2] in _PAIRS:
            return _with_pairs
        return None


def _found_dynamically(context: AttributeContext) -> Type:
    type_ = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.explicit) if isinstance(type_, UnionType) else type_  # none is declared as a union


def _with_pairs(context: AttributeContext) -> Type:
    owner, declared = context.type, get_proper_type(context.default_attr_type)
    if not isinstance(owner, Instance) or not owner.type.has_base("torch.nn.modules.conv.Conv2d"):
        return declared
    items = declared.items if isinstance(declared, UnionType) else [declared]
    return UnionType.make_union([_pair(get_proper_type(item)) for item in items])


def _pair(type_: Type) -> Type:
    if isinstance(type_, Instance) and type_.type.fullname == "builtins.tuple":
        return TupleType([type_.args[0]] * 2, type_)
    return type_


def plugin(version: str) -> type[Plugin]:
    return TorchPlugin
