"""What timm records of how a network was built, and writes into config.json: the genotype travels in it as data.

timm sets `_model_args` of every network that it creates, to the arguments as they were given. A genotype's path means
nothing elsewhere, and a default genotype may change: so the genotype itself is recorded. And a config that was
downloaded must not choose which file is read here: so nothing but the genotype itself is accepted from one.
"""

from collections.abc import Mapping
from typing import Any

from .errors import GenotypeError


class RecordsGenotype:
    """Mixin of timm networks that have a `genotype`: their `_model_args` hold it as a plain dict."""

    __jit_unused_properties__ = ("_model_args",)  # else TorchScript would compile the property below

    @property
    def _model_args(self) -> dict[str, Any]:
        return self._timm_args | self._recorded_args()

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._timm_args = dict(args)

    def _recorded_args(self) -> dict[str, Any]:
        return {"genotype": self.genotype.to_dict()}


def refuse_genotype_path(model_args: Mapping[str, Any] | None) -> None:
    """Raise GenotypeError if a config.json has something else than a genotype where one belongs.

    Args:
        model_args: what timm read from there, `pretrained_model_args` in an entry point; None: there was no config.
    """
    saved = (model_args or {}).get("genotype")
    if saved is not None and not isinstance(saved, Mapping):
        raise GenotypeError(f"config.json: model_args: genotype must be the genotype itself, found {saved!r}")
