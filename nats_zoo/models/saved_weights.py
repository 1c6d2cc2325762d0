"""The weights beside a config.json, before timm reads them.

timm's download compares no checksum and begins anew after a cut, and where there are no safetensors it unpickles. So
what `timm.create_model("hf-hub:org/name", pretrained=True)` is about to read is fetched here, into the cache where timm
looks: in the same way as for `from_pretrained`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..folders.weights_file import FINGERPRINT_KEY, WEIGHTS_NAME, check_fingerprint, safetensors_metadata
from ..genotype.genotype import HUB_PREFIX, Genotype
from ..hub.client import resolve_folder
from .model_args import cfg_value


def prepare_saved_weights(arguments: Mapping[str, Any]) -> None:
    """Fetch the weights that timm will load into a network from a config.json, and check what they belong to.

    Args:
        arguments: of an entry point. Nothing is done unless its `pretrained_cfg` was read from a folder or the Hub.

    Raises:
        NatsError: they can not be had, are not what the Hub says, are not safetensors, or say that they belong to
            another genotype than the config's.
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
    weights, genotype = folder / WEIGHTS_NAME, (arguments.get("pretrained_model_args") or {}).get("genotype")
    # Without a fingerprint they were saved by timm, which knows of none.
    if genotype is not None and weights.is_file() and FINGERPRINT_KEY in safetensors_metadata(weights):
        check_fingerprint(weights, Genotype.from_dict(genotype, source="config.json: model_args: genotype"))
