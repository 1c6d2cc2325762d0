"""What timm records of how a network was built, and writes into config.json: the genotype travels in it as data.

timm sets `_model_args` of every network that it creates, to the arguments as they were given. A genotype's path means
nothing elsewhere, and a default genotype may change: so the genotype itself is recorded. And a config that was
downloaded must not choose which file is read here: so nothing but the genotype itself is accepted from one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.errors import GenotypeError, short
from ..base.names import HUB_PREFIX, WEIGHTS_NAME
from ..folders.limits import MAX_ELEMENTS, check_model_args, check_pretrained_cfg, is_on_meta, on_meta
from ..folders.weights_file import FINGERPRINT_KEY, WeightsFile
from ..genotype.genotype import Genotype
from ..hub.client import resolve_folder

_SAVED = ("hf-hub", "local-dir")  # timm's word for where a pretrained cfg was read


class RecordsGenotype:
    """Mixin of timm networks that have a `genotype`: their `_model_args` hold it as a plain dict.

    Example:
        >>> model = timm.create_model("nats_resnet18", genotype="mine.json")
        >>> model._model_args["genotype"] == model.genotype.to_dict()
        True
    """

    if TYPE_CHECKING:  # TorchScript knows no such type
        genotype: Genotype

    __jit_unused_properties__ = ("_model_args",)  # else TorchScript would compile the property below

    @property
    def _model_args(self) -> dict[str, Any]:
        return self._timm_args | self._recorded_args()

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._timm_args = dict(args)

    def _recorded_args(self) -> dict[str, Any]:
        return {"genotype": self.genotype.to_dict()}


def cfg_value(cfg: Any, key: str) -> Any:
    """Read a value of a pretrained cfg, which timm passes as a mapping or as its dataclass; None: it is not there.

    Example:
        >>> cfg_value(timm.get_pretrained_cfg("resnet18.tv_in1k"), "hf_hub_id")
        'timm/resnet18.tv_in1k'
    """
    return cfg.get(key) if isinstance(cfg, Mapping) else getattr(cfg, key, None)


def check_saved_args(arguments: Mapping[str, Any]) -> bool:
    """Check what timm read from a config.json before a network is built as it says.

    Args:
        arguments: of an entry point. `pretrained_model_args` among them, and a `pretrained_cfg` whose `source` is a
            folder or the Hub, come from there.

    Returns:
        Whether there was a config.

    Raises:
        GenotypeError: something else than a genotype where one belongs.
        NatsError: arguments or a pretrained cfg that are not taken from a config, see `config_limits`.

    Example:
        >>> check_saved_args({"num_classes": 10})
        False
    """
    model_args, cfg = arguments.get("pretrained_model_args"), arguments.get("pretrained_cfg")
    if cfg_value(cfg, "source") not in _SAVED and not model_args:
        return False
    saved = (model_args or {}).get("genotype")
    if saved is not None and not isinstance(saved, Mapping):
        raise GenotypeError(f"config.json: model_args: genotype must be the genotype itself, found {short(saved)}")
    check_model_args(model_args or {}, "config.json: model_args")
    if isinstance(cfg, Mapping):
        check_pretrained_cfg(cfg, "config.json: pretrained_cfg")
    return True


def check_saved_size(build: Callable[[], Any]) -> None:
    """Raise NatsError if a network that a config.json describes is too large, before it takes any memory.

    Args:
        build: builds it; called with the meta device, unless modules are built there already.

    Example:
        >>> check_saved_size(lambda: timm.create_model("resnet18", num_classes=2**31))
        Traceback (most recent call last):
        NatsError: config.json: asks for a network of over 2,147,483,648 parameters
    """
    if not is_on_meta():
        with on_meta("config.json", MAX_ELEMENTS):
            build()


def prepare_saved_weights(arguments: Mapping[str, Any]) -> None:
    """Fetch the weights that timm will load into a network from a config.json, and check what they belong to.

    Args:
        arguments: of an entry point. Nothing is done unless its `pretrained_cfg` was read from a folder or the Hub.

    Raises:
        NatsError: they can not be had, are not what the Hub says, are not safetensors, or say that they belong to
            another genotype than the config's.

    Example:
        >>> cfg = {"source": "hf-hub", "hf_hub_id": "org/name"}
        >>> prepare_saved_weights({"pretrained_cfg": cfg, "pretrained_model_args": {"genotype": genotype.to_dict()}})
    """
    cfg = arguments.get("pretrained_cfg")
    source = cfg_value(cfg, "source")
    if source == "hf-hub":
        name = HUB_PREFIX + cfg_value(cfg, "hf_hub_id")
        folder = resolve_folder(name, files=[WEIGHTS_NAME], cache_dir=arguments.get("cache_dir"))
    elif source == "local-dir":
        folder = Path(cfg_value(cfg, "file"))
    else:
        return
    path, genotype = folder / WEIGHTS_NAME, (arguments.get("pretrained_model_args") or {}).get("genotype")
    # Without a fingerprint they were saved by timm, which knows of none.
    if genotype is not None and path.is_file() and FINGERPRINT_KEY in (weights := WeightsFile(path)).metadata:
        weights.check_fingerprint(Genotype.from_dict(genotype, source="config.json: model_args: genotype"))
