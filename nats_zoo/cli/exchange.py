"""Commands about what comes from elsewhere and goes there: other libraries' files, and the Hugging Face Hub."""

from pathlib import Path
from typing import Any, Literal

from ..base.errors import NatsError
from .command import Command, typed_command
from .zoo import save_genotype

Runtime = Literal["onnxruntime", "openvino", "torch"]


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
    deploy: bool | None = None,
    runtime: Runtime | None = None,
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
        deploy: deployment form first: batch norms folded, channels sorted by dilation; default: false, or as --for has
            it.
        runtime: what is to run it: chooses the format and form that were measured to be best there.
    """
    import torch

    from ..base.files import output_file
    from ..models.named import find_network
    from ..networks.deploy import in_form
    from ..networks.export import SUFFIXES, choose_form, describe_file, format_of
    from ..networks.export import export as export_network

    named = find_network(model, genotype)
    if format == "auto" and (output is not None or runtime is None):
        format = "onnx" if output is None else format_of(output)
    format, form = choose_form(runtime, format, deploy)
    target = output_file(output or named.label + SUFFIXES[format])
    torch.manual_seed(0)  # of random weights
    network = in_form(named.deploy(weights, with_classifier=outputs == "logits"), form)
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


def convert(
    source: str,
    output: str | None = None,
    backbone: str = "resnet50",
    classes: tuple[str, ...] | None = None,
    epsilon: float | None = None,
    pattern: str | None = None,
    checkpoint: str | None = None,
) -> None:
    """Write a torchvision detector's checkpoint as a detector folder, with the same outputs, or what Inception
    Convolution published as a genotype file or backbone folder.

    Args:
        source: a .pth file of fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn, retinanet_resnet50_fpn or
            fcos_resnet50_fpn, of torchvision's reference training or with the state dict alone, or a .safetensors file;
            or the name of weights that torchvision downloads (FasterRCNN_ResNet50_FPN_Weights.COCO_V1); or the word
            ic_conv, for --pattern and --checkpoint.
        output: the folder, as nats train writes one, or genotype file; default: detector, backbone, or the pattern's
            name with the suffix _genotype.json.
        backbone: timm name of a ResNet with the same layers.
        classes: names of the labels 1, 2, ...; default: COCO's, if there are 90.
        epsilon: of the backbone's batch norms in torchvision; default: 0 for published checkpoints that were trained
            so, else 1e-5.
        pattern: of ic_conv: its pattern file; alone it becomes a genotype file.
        checkpoint: of ic_conv: the classifier's that was trained with the pattern, or a detector's on it; becomes a
            backbone folder.
    """
    if source == "ic_conv":
        if classes is not None or epsilon is not None:
            raise NatsError("classes, epsilon: are for detectors of torchvision, not for ic_conv")
        return _convert_ic_conv(pattern, checkpoint, backbone, output)
    if pattern is not None or checkpoint is not None:
        raise NatsError(f"pattern, checkpoint: are for nats convert ic_conv, found nats convert {source}")
    from ..detection.models.convert import from_torchvision
    from ..detection.models.folder import save_detector

    detector = from_torchvision(source, backbone, classes, epsilon)
    folder = save_detector(detector, output or "detector")
    print(f"{detector.config.framework} on {backbone}, {detector.config.num_classes - 1} classes: {folder}")


def _convert_ic_conv(pattern: str | None, checkpoint: str | None, backbone: str, output: str | None) -> None:
    from ..base.run_facts import BaseWeights, RunFacts
    from ..genotype.genotype import Genotype
    from ..models.ic_conv import from_ic_conv_checkpoint
    from ..publishing.backbone import save_backbone

    if pattern is None:
        raise NatsError("pattern: expected Inception Convolution's pattern file, as of its checkpoint")
    if checkpoint is None:
        genotype = Genotype.from_ic_conv(pattern, backbone)
        return save_genotype(genotype, output or f"{Path(pattern).stem}_genotype.json")
    model = from_ic_conv_checkpoint(pattern, checkpoint, backbone)
    base = BaseWeights(name=f"Inception Convolution's {Path(checkpoint).name}")
    folder = save_backbone(model, output or "backbone", run=RunFacts(command=typed_command(), base=base))
    head = f"{model.num_classes} classes" if model.num_classes else "no classifier"
    print(f"{model.genotype}\n\n{backbone} with Inception Convolution's weights, {head}: {folder}")


def _export(export: Any, options: dict[str, Any]) -> None:
    export(runtime=options.pop("for"), **options)  # no parameter can have the option's name


def _publish(publish: Any, options: dict[str, Any]) -> None:
    print(publish(repo_id=options.pop("repo"), **options))


FOR = "what is to run it: chooses the format and form that were measured to be best there."
COMMANDS = {
    "convert": Command("torchvision's detectors and Inception Convolution's files as ours", "cli.exchange:convert"),
    "export": Command(
        "a backbone as ONNX, torch.export or TorchScript file",
        "cli.exchange:export",
        _export,
        skip=("runtime",),
        more={"--for": {"type": Runtime | None, "default": None, "help": FOR}},
    ),
    "publish": Command(
        "put a backbone, detector or genotype on the Hugging Face Hub",
        "publishing.publish:publish",
        _publish,
        skip=("repo_id", "token"),  # an option for the token could be seen by everybody on the machine
        more={"repo": {"type": str, "help": "ORG/NAME; created if it is not there."}},
    ),
    "collection": Command("what an organisation has published of the zoo", "cli.exchange:collection"),
}
