"""The `nats` command: the table of its subcommands, which their modules hold, and what all of them share.

Only the chosen subcommand's packages are imported, so that `nats --help` stays as cheap as `import nats_zoo`.
"""

import io
import os
import sys
from collections.abc import Sequence

from ..base.errors import Interrupted, NatsError, redact
from . import detection, exchange, search, start, zoo
from .command import Command

<<<<<<< HEAD
Runtime = Literal["onnxruntime", "openvino", "torch"]

=======
COMMANDS: dict[str, Command] = {}
for _group in (zoo, search, detection, exchange, start):
    COMMANDS |= _group.COMMANDS
>>>>>>> main
BAD_INPUT = 2
INTERRUPTED = 130  # what shells report for Ctrl-C
OUTPUT_CLOSED = 141  # what they report for a command whose reader has gone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for bad input, 130 when interrupted, 141 when nobody reads on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names that a Windows code page lacks are no reason to end
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from ..version import __version__

        print(f"nats-zoo {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        return _fail(f"{arguments[0]}: no such command, expected one of {', '.join(COMMANDS)}")
    return _run(arguments[0], arguments[1:])


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: nats COMMAND [options]",
            "",
            "Detection backbones whose dilations were searched channel by channel.",
            "",
            *lines,
            "",
            "nats COMMAND --help shows a command's options; each can also come from a YAML file, --config FILE.",
            "search, train and evaluate use several devices or machines as: accelerate launch -m nats_zoo COMMAND ...",
        ]
    )


def _run(name: str, arguments: list[str]) -> int:
    from ..detection.runs.processes import end_process, is_one_of_several

    code = _run_command(name, arguments)
    if is_one_of_several():
        end_process(code)
    return code


def _run_command(name: str, arguments: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser

    from ..detection.runs.processes import is_lost_process, lost_process_line

    parser = ArgumentParser(prog=f"nats {name}", description=COMMANDS[name].summary, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    run = COMMANDS[name].build(parser)
    try:
        options = parser.instantiate(parser.parse_args(arguments))
        options.pop("config", None)
        run(options)
        sys.stdout.flush()
    except ArgumentError as error:
        return _fail(f"{name}: {error}; see nats {name} --help")
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        return _fail(lost_process_line())
    except BrokenPipeError:  # of the output, as in `nats list | head`; the Hub's client has errors of its own
        return _end_output()
    except (NatsError, OSError) as error:  # OSError: a folder that can not be written, a full disk
        return _fail(str(error))
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"nats: {str(stop) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    return 0


<<<<<<< HEAD
def _allow_bare_flags(parser: Any) -> None:
    """Let `--fixed` stand for `--fixed true`."""
    for action in parser._actions:
        if action.option_strings and getattr(action, "_typehint", None) in (bool, bool | None):
            action.nargs, action.const = "?", True


=======
>>>>>>> main
def _end_output() -> int:
    """Print nothing more: Python would complain at its end of what nobody has read."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OUTPUT_CLOSED


def _fail(message: str) -> int:
    print(f"nats: {' '.join(redact(message).split())}", file=sys.stderr)
    return BAD_INPUT
<<<<<<< HEAD


def _from_function(function: Callable[..., None]) -> Callable[[Any], Callable[[Any], None]]:
    """Parameters become options; those without a default are positional."""

    def build(parser: Any) -> Callable[[Any], None]:
        parser.add_function_arguments(function, as_group=False, as_positional=True)
        return lambda options: function(**options.as_dict())

    return build


def _predict(parser: Any) -> Callable[[Any], None]:
    # By hand, as a list that is a positional would have to be typed as [one.jpg,two.jpg], and so would an option's.
    skipped = {"model", "images", "classes"}
    parser.add_function_arguments(predict, as_group=False, as_positional=True, skip=skipped)
    parser.add_argument(
        "--model",
        type=str,
        help="a detector's folder or Hub repository, org/name or org/name@revision; without this option the first of"
        " the IMAGES is it.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        type=str,
        help="image files, videos (with PyAV: pip install 'nats-zoo[video]'), folders of images, and patterns in quotes"
        " such as 'photos/**/*.jpg'; the model before them, without --model.",
    )
    parser.add_argument("--classes", nargs="+", type=str, help="names of the only classes to look for; default: all.")

    def run(options: Any) -> None:
        named = options.as_dict()
        if named["model"] is None:
            named["model"], *named["images"] = named["images"]
        if not named["images"]:
            raise NatsError(f"images: expected some beside the model, {named['model']}; see nats predict --help")
        predict(**named)

    return run


def _export(parser: Any) -> Callable[[Any], None]:
    # By hand, as no parameter can have the name that the option has.
    parser.add_function_arguments(export, as_group=False, as_positional=True, skip={"runtime"})
    help = "what is to run it: chooses the format and form that were measured to be best there."
    parser.add_argument("--for", type=Runtime | None, default=None, help=help)

    def run(options: Any) -> None:
        named = options.as_dict()
        export(runtime=named.pop("for"), **named)

    return run


def _publish(parser: Any) -> Callable[[Any], None]:
    from ..publishing.publish import publish

    # No option for the token, which everybody on the machine could see.
    parser.add_function_arguments(publish, as_group=False, as_positional=True, skip={"repo_id", "token"})
    parser.add_argument("repo", type=str, help="ORG/NAME; created if it is not there.")

    def run(options: Any) -> None:
        named = options.as_dict()
        print(publish(repo_id=named.pop("repo"), **named))

    return run


def _recipes(parser: Any) -> Callable[[Any], None]:
    # By hand, as a list that is a positional would have to be typed as [one,two].
    parser.add_argument("names", nargs="*", default=[], type=str, help="recipes to copy; without any all are listed")
    parser.add_argument("--output", default="recipes", type=str, help="folder to copy to")
    return lambda options: recipes(**options.as_dict())


def _search(parser: Any) -> Callable[[Any], None]:
    from ..search import SearchConfig, Searcher
    from ..search.report.page import PAGE, REPORT

    parser.add_class_arguments(SearchConfig, as_group=False)

    def run(options: Any) -> None:
        searcher = Searcher(SearchConfig(**options.as_dict()), command=_typed_command())
        _print_once(f"{searcher.run()}\n")
        folder = searcher.folder.path
        _print_once(f"genotype: {folder / 'genotype.json'}\nreport: {folder / REPORT / PAGE}")
        for warning in searcher.warnings:
            _print_once(f"warning: {warning}")

    return run


def _train(parser: Any) -> Callable[[Any], None]:
    from ..detection import TrainConfig, Trainer

    parser.add_class_arguments(TrainConfig, as_group=False)

    def run(options: Any) -> None:
        trainer = Trainer(TrainConfig(**options.as_dict()), command=_typed_command())
        metrics = trainer.run()
        if metrics is not None:
            _print_once(f"{metrics.table()}\n")
        folder = trainer.folder.path
        best = f", of the highest AP: {folder / 'best'}" if (folder / "best").exists() else ""
        _print_once(f"model: {folder / 'model'}{best}")

    return run


def _print_once(text: str) -> None:
    """Print from one process per machine; all of them come here."""
    from accelerate import PartialState

    PartialState().print(text)


def _typed_command() -> str:
    return redact(shlex.join(["nats", *sys.argv[1:]]))  # it goes into files, and model cards


def control(
    kind: Literal["uniform", "random", "shares", "shuffled"],
    backbone: str | None = None,
    space: str | None = None,
    groups: int | None = None,
    channels_per_group: int | None = None,
    convs: list[str] | None = None,
    basic_block: Literal["conv2", "both"] | None = None,
    dilation: str | None = None,
    shares: dict[int, dict[str, float]] | None = None,
    genotype: str | None = None,
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Make a genotype without a search, as a control for a searched one.

    Args:
        kind: uniform (one dilation everywhere), random (each group draws any candidate), shares (given shares of each
            stage's groups), or shuffled (another genotype's shares, on other channels).
        backbone: timm name of the plain network; of all kinds but shuffled.
        space: the candidate dilations and stages, as for nats search: A, B, C or a YAML file; default: C.
        groups: groups of output channels per convolution, of random and shares; default: 16.
        channels_per_group: size of the groups instead of their number.
        convs: names of the convolutions, or patterns, as for nats search.
        basic_block: which convolutions of a BasicBlock, as for nats search; default: conv2.
        dilation: of uniform, as HEIGHTxWIDTH.
        shares: of shares, by stage and dilation, such as {3: {1x1: 0.5, 1x3: 0.5}}; other stages stay plain.
        genotype: of shuffled: a published genotype's name, a genotype file, or the folder of a search or model.
        seed: of what is drawn.
        output: JSON file; default: the backbone's name, the kind and the seed, in the working folder.
    """
    from ..search.controls import make_control

    options: dict[str, Any] = {"backbone": backbone, "space": space}
    options |= {"groups": groups, "channels_per_group": channels_per_group}
    options |= {"convs": convs, "basic_block": basic_block, "dilation": dilation, "shares": shares}
    options |= {"genotype": genotype}
    made = make_control(kind, {key: value for key, value in options.items() if value is not None}, seed)
    _save_genotype(made, output or f"{made.architecture}_{kind}_{dilation or seed}.json")


def profile(
    backbone: str,
    space: str = "C",
    size: int | tuple[int, int] = 512,
    batch: int = 1,
    convs: tuple[str, ...] = (),
    basic_block: Literal["conv2", "both"] = "conv2",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    device: str = "cpu",
    threads: int | None = None,
    repeats: int = 10,
    output: str = "costs.json",
) -> None:
    """Measure what each convolution costs at each candidate dilation on this machine, for `nats search --costs`.

    Args:
        backbone: a plain timm network, or a variant for its plain twin.
        space: the candidate dilations and stages, as for a search: A, B, C or a YAML file.
        size: of the images, in pixels; a number, or [height, width].
        batch: images per forward pass.
        convs: names of the convolutions, or patterns with * and ?, instead of those that a search would search.
        basic_block: which convolutions of a ResNet's BasicBlocks.
        dtype: of weights and images.
        memory_format: of weights and images.
        device: cpu, cuda, cuda:1.
        threads: of the CPU; default: torch's own choice.
        repeats: timed rounds.
        output: JSON file.
    """
    import torch

    from ..search.choosing.profile import profile_network

    target = _output_file(output)
    if threads is not None and threads < 1:
        raise NatsError(f"threads: expected a positive number, found {threads}")
    if threads is not None:
        torch.set_num_threads(threads)
    options = {"device": device, "dtype": dtype, "memory_format": memory_format, "repeats": repeats}
    table = profile_network(backbone, space, convs, basic_block, size=size, batch=batch, **options)
    table.save(target)
    print(f"{table}\n\ncosts: {target}")


def list_zoo(json: bool = False) -> None:
    """List the variants, their default genotypes with how those were found, and the tags of pretrained weights.

    Args:
        json: print JSON instead of a table, with the whole provenance.
    """
    from ..models.zoo import list_zoo as list_entries
    from ..models.zoo import zoo_table

    entries = list_entries()
    if json:
        from json import dumps

        print(dumps([entry.to_dict() for entry in entries], indent=2))
    else:
        print(zoo_table(entries))


def show(genotype: str, output: str | None = None) -> None:
    """Print a genotype's table and provenance, and draw its chart.

    Args:
        genotype: a published genotype's name, a variant's (its default), a genotype file, the folder of a search or
            model, or the Hub repository of a genotype or model (org/name, org/name@revision).
        output: PNG file for the chart; default: the genotype's name in the working folder.
    """
    from ..folders.find_genotype import find_genotype
    from ..genotype.provenance import provenance_lines
    from ..models.named import genotype_name

    found = find_genotype(genotype)
    target = _output_file(output or f"{genotype_name(found)}.png")
    from ..pictures.genotype_chart import genotype_chart

    print(found, "", *provenance_lines(found.provenance), sep="\n")
    genotype_chart(found, target)
    print(f"\nchart: {target}")


def erf(
    model: str,
    genotype: str | None = None,
    weights: str | None = None,
    size: int = 768,
    stage: int = 4,
    output: str = "erf.png",
    seed: int = 0,
) -> None:
    """Draw the effective receptive fields of the plain and of the NATS network side by side, with their radii.

    Args:
        model: a variant or timm network, or the folder or Hub repository (org/name, org/name@revision) of a backbone
            or detector.
        genotype: a genotype's name or file; default: the model's own, else the architecture's default one.
        weights: random, pretrained (timm's, downloaded unless cached), or the folder, safetensors file or Hub
            repository of a model; default: the model folder's own, for a name random ones.
        size: height and width of the input, in pixels.
        stage: whose map's centre neuron is looked at; stage 4 has stride 32.
        output: PNG file.
        seed: of random weights.
    """
    import torch

    from ..models.named import RANDOM, find_nats_network, genotype_name
    from ..networks.erf import erf_radius, plain_and_nats_fields

    target = _output_file(output)
    named = find_nats_network(model, genotype)
    weights = weights or (str(named.folder) if named.folder else RANDOM)
    index = named.stage_index(stage)
    torch.manual_seed(seed)
    network = named.create(weights, features_only=True, out_indices=(index,))
    fields = plain_and_nats_fields(network, size, named.in_channels)
    from ..pictures.erf_picture import erf_picture

    used = f"{named.weights_name(weights)}{f', seed {seed}' if weights == RANDOM else ''}"
    title = f"Effective receptive field of {named.architecture}, stage {stage}, in {size} x {size} pixels"
    assert named.genotype is not None, "find_nats_network sees to it"
    name = f"NATS: {genotype_name(named.genotype)}"
    erf_picture(*fields, target, f"{title}\nweights: {used}", name)
    print(f"{title}; weights: {used}")
    for label, field in zip(("plain", name), fields, strict=True):
        print(f"{label}: {erf_radius(field)}")
    print(f"picture: {target}")


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

    from ..models.named import find_network
    from ..networks.deploy import in_form
    from ..networks.export import SUFFIXES, choose_form, describe_file, format_of
    from ..networks.export import export as export_network

    named = find_network(model, genotype)
    if format == "auto" and (output is not None or runtime is None):
        format = "onnx" if output is None else format_of(output)
    format, form = choose_form(runtime, format, deploy)
    target = _output_file(output or named.label + SUFFIXES[format])
    torch.manual_seed(0)  # of random weights
    network = in_form(named.deploy(weights, with_classifier=outputs == "logits"), form)
    written = export_network(network, target, format, size, named.in_channels, not fixed, opset)
    print(*describe_file(network, target, written), sep="\n")


def _output_file(path: str) -> Path:
    """The path of a file to be written, seen to be possible before the work for it begins."""
    target = Path(path)
    if not target.parent.is_dir():
        raise NatsError(f"output: {path}: there is no folder {target.parent}")
    if target.is_dir():
        raise NatsError(f"output: {path}: expected a file, found a folder")
    return target


def evaluate(
    model: str,
    data: str,
    split: str = "test",
    format: Literal["coco", "voc", "yolo"] | None = None,
    images: str | None = None,
    skip_bad: bool = False,
    batch_size: int = 1,
    precision: Literal["no", "bf16", "fp16"] | None = None,
    workers: int = 2,
    output: str | None = None,
    transpose: bool = False,
    report: bool = False,
    revision: str | None = None,
) -> None:
    """Evaluate a detector, or the results file of any program, with COCO's metrics of boxes and masks.

    Args:
        model: a detector's folder or Hub repository, org/name or org/name@revision; or results in COCO's format, a
            file FILE.json of another program, with boxes, masks or both.
        data: folder of a data set (COCO, Pascal VOC or YOLO), or its annotation file or data.yaml.
        split: split to evaluate on.
        format: coco, voc or yolo; default: told by looking, the first of these that is there.
        images: folder of the images, if it is not found by itself; not for YOLO.
        skip_bad: leave out and count entries of the data set that can not be used, instead of refusing them.
        batch_size: images per batch and process; AP moves a little with it (padding).
        precision: 'no' (float32), 'bf16' or 'fp16'; null: what `accelerate config` says.
        workers: data loading processes.
        output: folder for metrics.json and results.json (COCO results format; not of a results file).
        transpose: swap rows and columns of all images and boxes: the data set's transposed twin.
        report: write report/report.md into the output folder (default: evaluation): precision-recall curves, AP by
            class and size, numbers and pictures of the worst errors.
        revision: branch, tag or commit of the Hub repository, as after its @.
    """
    from ..detection.evaluation.evaluate import REPORT_OUTPUT, evaluate_model

    model = _with_revision(model, revision)
    metrics = evaluate_model(
        model, data, split, images, skip_bad, batch_size, precision, workers, output, transpose, format, report
    )
    _print_once(metrics.table())
    if report:
        _print_once(f"\n{Path(output or REPORT_OUTPUT) / 'report' / 'report.md'}")


def predict(
    model: str,
    images: list[str],
    output: str = "predictions",
    threshold: float = 0.5,
    classes: list[str] | None = None,
    recursive: bool = False,
    batch_size: int = 1,
    precision: Literal["no", "bf16", "fp16"] = "no",
    device: str | None = None,
    draw: bool = True,
    every: int = 1,
    revision: str | None = None,
) -> None:
    """Draw what a detector finds on images and videos and write it as JSON.

    Args:
        model: a detector's folder or Hub repository, org/name or org/name@revision.
        images: image files, videos (with PyAV: pip install 'nats-zoo[video]'), folders of images, and patterns in
            quotes such as 'photos/**/*.jpg'.
        output: folder for a PNG per image and predictions.json (boxes as x1, y1, x2, y2 in pixels, masks as COCO's run
            lengths), and for an MP4 and a JSON file per video.
        threshold: detections with a lower score are left out.
        classes: names of the only classes to look for; default: all.
        recursive: take the images in folders of folders too.
        batch_size: images of the same size in the network that go through it at once; what is found does not depend on
            it, up to rounding.
        precision: 'no' (float32), 'bf16' or 'fp16'.
        device: cpu, cuda, cuda:1; default: a GPU if there is one.
        draw: draw pictures; false: JSON only.
        every: of a video, look at, draw and write only every n-th frame.
        revision: branch, tag or commit of the Hub repository, as after its @.
    """
    from tqdm import tqdm

    from ..detection.prediction.predict import predict_images

    options: dict[str, Any] = {"classes": classes, "recursive": recursive}
    options |= {"batch_size": batch_size, "precision": precision}
    options |= {"device": device, "draw": draw, "every": every}
    for line in predict_images(_with_revision(model, revision), images, output, threshold, **options):
        tqdm.write(line)  # above the bar, if there is one


def _with_revision(model: str, revision: str | None) -> str:
    """`org/name@revision`, from a model and the option --revision."""
    if revision is None:
        return model
    from ..hub.client import split_revision

    if Path(model).exists():
        raise NatsError(f"revision: is for repositories on the Hub, {model} is a file or a folder")
    return "@".join(map(str, split_revision(model, revision)))


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
        return _save_genotype(genotype, output or f"{Path(pattern).stem}_genotype.json")
    model = from_ic_conv_checkpoint(pattern, checkpoint, backbone)
    base = BaseWeights(name=f"Inception Convolution's {Path(checkpoint).name}")
    folder = save_backbone(model, output or "backbone", run=RunFacts(command=_typed_command(), base=base))
    head = f"{model.num_classes} classes" if model.num_classes else "no classifier"
    print(f"{model.genotype}\n\n{backbone} with Inception Convolution's weights, {head}: {folder}")


def transfer(genotype: str, architecture: str, output: str | None = None) -> None:
    """Take a genotype over to another network, by stage, relative depth and relative channel position.

    Args:
        genotype: whatever nats show takes.
        architecture: timm name of the network that is to have it.
        output: JSON file; default: the network's name with the suffix _transfer.json, in the working folder.
    """
    from ..folders.find_genotype import find_genotype

    _save_genotype(find_genotype(genotype).transfer(architecture), output or f"{architecture}_transfer.json")


def merge(genotype: str, max_dilations: int, output: str | None = None) -> None:
    """Find the nearest genotype with at most so many different dilations in each convolution.

    Args:
        genotype: whatever nats show takes.
        max_dilations: in a convolution; those that move its channels least are kept.
        output: JSON file; default: the genotype's name with the number, in the working folder.
    """
    from ..folders.find_genotype import find_genotype
    from ..models.named import genotype_name

    found = find_genotype(genotype)
    _save_genotype(found.merge(max_dilations), output or f"{genotype_name(found)}_k{max_dilations}.json")


def _merge(parser: Any) -> Callable[[Any], None]:
    # By hand, for the short -k.
    parser.add_function_arguments(merge, as_group=False, as_positional=True, skip={"max_dilations"})
    help = "most dilations in a convolution; those that move its channels least are kept."
    parser.add_argument("-k", "--max_dilations", type=int, required=True, help=help)
    return lambda options: merge(**options.as_dict())


def _save_genotype(genotype: Any, output: str) -> None:
    target = _output_file(output)
    genotype.save(target)
    print(f"{genotype}\n\ngenotype: {target}")


def data(
    path: str,
    split: str | None = None,
    format: Literal["coco", "voc", "yolo"] | None = None,
    images: str | None = None,
    output: str | None = None,
    skip_bad: bool = False,
    samples: int = 8,
) -> None:
    """Check a data set, every image and object of it, and show what is in it: numbers, defects, a picture of samples.

    Exit code 0: all of it can be used; 2: there are defects.

    Args:
        path: folder of a data set (COCO, Pascal VOC or YOLO), or its annotation file or data.yaml.
        split: the split to look at; default: all.
        format: coco, voc or yolo; default: told by looking, the first of these that is there.
        images: folder of the images, if it is not found by itself; not for YOLO.
        output: PNG file for the samples, the numbers going into a JSON file beside it, or a folder for data.png and
            data.json; default: the data set's name with _data.png and _data.json, in the working folder.
        skip_bad: end with exit code 0 in spite of defects, which training with --skip_bad leaves out.
        samples: images of each split in the picture; 0 for no picture.
    """
    from ..detection.data_report.report import report_data, summarise_defects

    report, written = report_data(path, split, format, images, output, samples)
    print(f"{report}\n")
    print(*written, sep="\n")
    if report.defects and not skip_bad:
        raise NatsError(summarise_defects(report))


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


def recipes(names: list[str], output: str) -> None:
    """List the recipes that come with the package, or copy some into a folder and print what stands at their heads."""
    from .recipes import copy_recipe, read_recipe, recipe_head, recipe_names, recipe_title

    if not names:
        found = recipe_names()
        width = max(map(len, found))
        print(*(f"{name:<{width}}  {recipe_title(read_recipe(name))}" for name in found), sep="\n")
        print("\nnats recipes NAME copies one to recipes/NAME.yaml and shows the commands that it is for.")
    for name in names:
        print(f"{copy_recipe(name, output)}\n\n{recipe_head(read_recipe(name))}\n")


def demo(output: str = "demo", seed: int = 0) -> None:
    """Search and train on a drawn data set: minutes on two CPU cores, no download.

    Args:
        output: folder for the data, the runs and the pictures; a demo that was stopped goes on there.
        seed: of everything random.
    """
    from ..search.demo import run_demo

    run_demo(Path(output), seed)


COMMANDS = {
    "list": Command("the variants, their genotypes and their pretrained weights", _from_function(list_zoo)),
    "show": Command("a genotype's table, provenance and chart", _from_function(show)),
    "erf": Command("receptive fields of the plain and the NATS network, side by side", _from_function(erf)),
    "profile": Command("what each dilation costs on this machine, for search --costs", _from_function(profile)),
    "search": Command("find a genotype for a detector's backbone", _search),
    "control": Command("a genotype that was not searched, to compare with", _from_function(control)),
    "data": Command("what is in a data set, and what is wrong with it", _from_function(data)),
    "train": Command("train a detector on a timm backbone", _train),
    "recipes": Command("YAML files for --config: the paper's rows and others, ready to run", _recipes),
    "evaluate": Command("COCO metrics of a detector or a results file", _from_function(evaluate)),
    "predict": Command("draw what a detector finds on images and videos", _predict),
    "convert": Command("torchvision's detectors and Inception Convolution's files as ours", _from_function(convert)),
    "transfer": Command("a genotype on another network", _from_function(transfer)),
    "merge": Command("a genotype with fewer dilations", _merge),
    "export": Command("a backbone as ONNX, torch.export or TorchScript file", _export),
    "publish": Command("put a backbone, detector or genotype on the Hugging Face Hub", _publish),
    "collection": Command("what an organisation has published of the zoo", _from_function(collection)),
    "demo": Command("the whole path on a drawn data set, without a download", _from_function(demo)),
}
=======
>>>>>>> main
