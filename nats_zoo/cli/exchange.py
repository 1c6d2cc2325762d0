"""Commands about what comes from elsewhere and goes there: other libraries' files, and the Hugging Face Hub."""

from typing import Any, Literal

from .command import Command


def export(
    model: str,
    output: str | None = None,
    format: Literal["auto", "onnx", "torch", "torchscript"] = "auto",
    genotype: str | None = None,
    weights: str | None = None,
    outputs: Literal["features", "logits"] = "features",
    size: int | tuple[int, int] = 224,
    fixed: bool = False,
    opset: int | None = None,
    deploy: bool = False,
) -> None:
    """Write a backbone as a file for other runtimes, and check that it gives the same outputs there.

    Args:
        model: a variant or timm network, or the folder or Hub repository (org/name, org/name@revision) of a backbone.
        output: the file; default: the model's name in the working folder, with the format's suffix.
        format: onnx, torch (a torch.export program) or torchscript (a trace); auto: that of the output's suffix, .onnx,
            .pt2 or .pt, and onnx without an output.
        genotype: a genotype's name or file; default: the model's own.
        weights: random, pretrained (timm's, downloaded unless cached), or the folder, safetensors file or Hub
            repository of a model; default: the model folder's own. A name needs it.
        outputs: features (the maps at strides 4, 8, 16 and 32) or logits (the whole classifier).
        size: of the images that it is traced with, in pixels; a number, or [height, width].
        fixed: one image of that size only, instead of any batch and any size from 64 pixels (of some networks: any
            multiple of 32).
        opset: of ONNX; default: torch's choice.
        deploy: deployment form first: batch norms folded, channels sorted by dilation.
    """
    import torch
    from timm.utils import reparameterize_model

    from ..base.files import output_file
    from ..models.named import find_network
    from ..networks.export import SUFFIXES, describe_file, format_of
    from ..networks.export import export as export_network

    named = find_network(model, genotype)
    if format == "auto":
        format = "onnx" if output is None else format_of(output)
    target = output_file(output or named.label + SUFFIXES[format])
    torch.manual_seed(0)  # of random weights
    network = named.deploy(weights, with_classifier=outputs == "logits")
    if deploy:
        network = reparameterize_model(network)
    written = export_network(
        network, target, format, size=size, in_channels=named.in_channels, dynamic=not fixed, opset=opset
    )
    print(*describe_file(network, target, written), sep="\n")


def collection(owner: str, json: bool = False) -> None:
    """List what an organisation or user has published of the zoo on the Hugging Face Hub.

    Args:
        owner: name of the organisation or user.
        json: print JSON instead of a table.
    """
    from ..publishing.collection import collection_table, list_collection

    repositories = list_collection(owner)
    if json:
        from json import dumps

        print(dumps([repository.to_dict() for repository in repositories], indent=2))
    elif repositories:
        print(collection_table(repositories))
    else:
        print(f"{owner}: no repository with the tag nats-zoo (private ones are seen with a token: hf auth login)")


def _convert(from_torchvision: Any, options: dict[str, Any]) -> None:
    from ..detection.models.folder import save_detector

    output = options.pop("output")
    detector = from_torchvision(**options)
    classes = f"{detector.config.num_classes - 1} classes"
    print(f"{detector.config.framework} on {options['backbone']}, {classes}: {save_detector(detector, output)}")


def _publish(publish: Any, options: dict[str, Any]) -> None:
    print(publish(repo_id=options.pop("repo"), **options))


OUTPUT = "the folder, as nats train writes one."
COMMANDS = {
    "convert": Command(
        "a torchvision detector's checkpoint as a detector folder",
        "detection.models.convert:from_torchvision",
        _convert,
        more={"--output": {"type": str, "default": "detector", "help": OUTPUT}},
    ),
    "export": Command("a backbone as ONNX, torch.export or TorchScript file", "cli.exchange:export"),
    "publish": Command(
        "put a backbone, detector or genotype on the Hugging Face Hub",
        "publishing.publish:publish",
        _publish,
        skip=("repo_id", "token"),  # an option for the token could be seen by everybody on the machine
        more={"repo": {"type": str, "help": "ORG/NAME; created if it is not there."}},
    ),
    "collection": Command("what an organisation has published of the zoo", "cli.exchange:collection"),
}
