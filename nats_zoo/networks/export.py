"""Networks as files for other runtimes: ONNX, torch.export's program, TorchScript.

Every file is one file, written beside its target and renamed. Before that it is loaded again and must give what the
network gives, on two batches of different sizes if both may vary.
"""

import json
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import NatsError
from ..base.files import atomic_file
from ..genotype.genotype import Genotype
from ..version import __version__
from .batch_norm import evaluation_mode
from .deploy import Form

Format = Literal["onnx", "torch", "torchscript"]
INPUT_NAME = "images"
INFO_NAME = "nats_zoo.json"  # the file inside a torch program that holds what `describe` says
SMALLEST_SIDE = 64  # pixels: two cells of a map of stride 32, for a map of one row is a special case to torch
MAX_IMAGES = 2**31 - 1  # of a batch; some versions of torch ask for a limit
COARSE_STEP = 32  # pixels: the stride of the last map
MAX_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit for one file, and room for the graph
TOLERANCE = 1e-4  # largest difference from the network's own output, relative to its largest value
ONNX_TORCH = "2.7"  # the first whose exporter works with the onnxscript of today
EXTRA = "pip install 'nats-zoo[export]'"

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, in what exporters say

# What a runtime reads, and the form whose worst measured ratio to the plain network, over float32 and int8, is lowest
# there, see docs/benchmarks.md.
BEST_FORMS: dict[str, tuple[Format, Form]] = {
    "onnxruntime": ("onnx", "deploy"),
    "openvino": ("onnx", "separate"),
    "torch": ("torch", "deploy"),
}
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "torchscript": ".pt"}

Runner = Callable[[Tensor], Sequence[Tensor]]


class Written(NamedTuple):
    """What a written file takes, and what it was checked on.

        >>> export(model, "network.onnx").step
        1

    Attributes:
        step: height and width may be any multiples of it, 1 or 32, from 64 pixels, in any batch; None: one size only.
        shapes: of the batches on which its outputs were compared with the network's; empty: of none.
        difference: the largest there, relative to an output's largest value.
    """

    step: int | None
    shapes: list[tuple[int, ...]]
    difference: float


def export(
    model: nn.Module,
    path: str | os.PathLike,
    format: Format = "onnx",
    *,
    size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    dynamic: bool = True,
    opset: int | None = None,
) -> Written:
    """Write a network as one file, in evaluation mode and as it is: see `timm.utils.reparameterize_model` before.

        >>> model = timm.create_model("nats_resnet50", features_only=True)
        >>> export(timm.utils.reparameterize_model(model.eval()), "network.onnx", size=512).shapes
        [(2, 3, 512, 512), (1, 3, 544, 576)]

    Args:
        model: called with images (N, in_channels, H, W); returns a tensor or a list of them, such as a timm network
            with or without `features_only`.
        path: the file; one that is there is replaced.
        format: "onnx"; "torch", a program of `torch.export` (.pt2); or "torchscript", a trace.
        size: height and width of the images that the network is traced with, in pixels.
        in_channels: channels of the images.
        dynamic: any batch, height and width (from 64 pixels) will do, or, where a network pools with `ceil_mode` (such
            as ResNet-D), multiples of 32; else only one image of `size`. A TorchScript trace is always dynamic.
        opset: of ONNX; default: torch's choice.

    Returns:
        What the file takes and was checked on; ONNX is not checked without onnxruntime.

    Raises:
        NatsError: an option that the format has not, a missing package, a network that can not be exported so, or a
            file that does not give what the network gives; nothing is left behind then.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < SMALLEST_SIDE:
        raise NatsError(f"size: expected at least {SMALLEST_SIDE} pixels on each side, found {height} x {width}")
    _check_options(format, dynamic, opset)
    if format == "torch" and Path(path).suffix != SUFFIXES["torch"]:
        raise NatsError(f"{path}: torch loads a program from files whose name ends in .pt2 only")
    shapes: list[tuple[int, ...]] = [(2, in_channels, height, width), (1, in_channels, height + 32, width + 64)]
    shapes = shapes if dynamic else [(1, in_channels, height, width)]
    _check_packages(format)
    with evaluation_mode(model), torch.no_grad(), atomic_file(path) as scratch:
        run, step = WRITERS[format](model, _batch(shapes[0], model), scratch, dynamic, opset)
        if run is None:
            return Written(step, [], math.nan)
        return Written(step, shapes, _largest_difference(run, model, shapes, path))


def output_names(model: nn.Module) -> list[str]:
    """Name a network's outputs in a file: `stride4`, `stride8`, ... for feature maps, else `logits`.

    >>> output_names(timm.create_model("resnet18"))
    ['logits']
    """
    info = getattr(model, "feature_info", None)
    if info is None or not hasattr(info, "reduction"):  # the plain list of a network that returns no maps
        return ["logits"]
    return [f"stride{stride}" for stride in info.reduction()]


def describe(model: nn.Module) -> dict[str, Any]:
    """Say what a file's user has to know: outputs, the images' mean and deviation, the genotype's fingerprint.

    >>> describe(timm.create_model("nats_resnet18"))["outputs"]
    ['logits']
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    genotype = getattr(model, "genotype", None)
    facts = {
        "nats_zoo": __version__,
        "architecture": cfg.get("architecture"),
        "genotype_sha256": genotype.fingerprint() if isinstance(genotype, Genotype) else None,
        "outputs": output_names(model),
        "mean": cfg.get("mean"),
        "std": cfg.get("std"),
    }
    return {key: value for key, value in facts.items() if value is not None}


def describe_file(model: nn.Module, path: str | os.PathLike, written: Written) -> list[str]:
    """Tell who asked for a file what it takes and gives, and how it was checked.

    >>> print(*describe_file(model, "network.onnx", export(model, "network.onnx")), sep="\\n")
    """
    facts = describe(model)
    lines = [f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB, {INPUT_NAME} -> {', '.join(facts['outputs'])}"]
    if written.step is not None:
        multiples = (
            "any height and width" if written.step == 1 else f"heights and widths in multiples of {written.step}"
        )
        lines.append(f"takes any batch, and {multiples} from {SMALLEST_SIDE} pixels")
    if "mean" in facts and "std" in facts:
        lines.append(f"images: RGB in 0..1, less mean {list(facts['mean'])}, divided by std {list(facts['std'])}")
    if not written.shapes:
        lines.append(f"not checked: the package onnxruntime is missing ({EXTRA})")
    else:
        sizes = " and ".join("x".join(map(str, shape)) for shape in written.shapes)
        lines.append(f"checked on {sizes}: off by at most {written.difference:.0e} of an output's largest value")
    return lines


def format_of(path: str | os.PathLike) -> Format:
    """Find the format that a file's suffix stands for; NatsError names the suffixes if it is another one.

    >>> format_of("network.pt2")
    'torch'
    """
    for format, suffix in SUFFIXES.items():
        if Path(path).suffix == suffix:
            return format
    raise NatsError(f"output: {path}: expected a suffix that tells the format, {', '.join(SUFFIXES.values())}")


def choose_form(runtime: str | None, format: Format | Literal["auto"], deploy: bool | None) -> tuple[Format, Form]:
    """The format and the form to export.

    Args:
        runtime: `onnxruntime`, `openvino` or `torch`, for the form that was measured to be best there; None: any.
        format: "auto" with a runtime only, for the one that it reads.
        deploy: whether to export the deployment form; None: what is best for the runtime, else not.

    Raises:
        NatsError: a runtime that does not read the format.

    Example:
        >>> choose_form("onnxruntime", "auto", None)
        ('onnx', 'deploy')
    """
    if runtime is None:
        assert format != "auto", "only a runtime says which"
        return format, "deploy" if deploy else "as it is"
    best, form = BEST_FORMS[runtime]
    if format not in ("auto", best):
        raise NatsError(f"for: {runtime} is served best by {SUFFIXES[best]} files, found the format {format!r}")
    return best, "as it is" if deploy is False else form


def _check_options(format: str, dynamic: bool, opset: int | None) -> None:
    if format not in SUFFIXES:
        raise NatsError(f"format: expected one of {', '.join(SUFFIXES)}, found {format!r}")
    if opset is not None and format != "onnx":
        raise NatsError(f"opset: is for the format 'onnx', not for {format!r}")
    if not dynamic and format == "torchscript":
        raise NatsError("fixed: a TorchScript trace takes images of any size; leave it out")


def _check_packages(format: str) -> None:
    if format != "onnx":
        return
    if torch.__version__ < ONNX_TORCH:
        raise NatsError(f"format 'onnx' needs torch {ONNX_TORCH} or newer, this is {torch.__version__}")
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise NatsError(f"format 'onnx' needs the package {package}: {EXTRA}")


def _batch(shape: tuple[int, ...], model: nn.Module) -> Tensor:
    parameter = next(model.parameters(), torch.empty(0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(parameter.device, parameter.dtype)


def _write_onnx(
    model: nn.Module, images: Tensor, path: Path, dynamic: bool, opset: int | None
) -> tuple[Runner | None, int | None]:
    weight = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if weight > MAX_ONNX_BYTES:
        raise NatsError(f"{weight / 2**30:.1f} GiB of weights do not fit into one ONNX file, expected less than 2")
    with _exporter_errors("onnx"):
        program, step = _trace_program(model, images, dynamic)
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT_NAME],
            output_names=output_names(model),
            dynamic_shapes=None if step is None else _dynamic_shapes(step),  # for the names of the axes
        )
        assert onnx_program is not None, "torch returns None only where it is given a file"
        found = onnx_program.model.opset_imports[""]
        onnx_program.model.metadata_props.update({key: json.dumps(value) for key, value in describe(model).items()})
        onnx_program.save(path, external_data=False)
    if opset not in (None, found):
        raise NatsError(f"opset: the network can not be written in {opset}, only in {found}")
    return _onnx_runner(path), step


def _onnx_runner(path: Path) -> Runner | None:
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(y) for y in session.run(None, {INPUT_NAME: images.cpu().numpy()})]


def _write_program(
    model: nn.Module, images: Tensor, path: Path, dynamic: bool, opset: int | None
) -> tuple[Runner, int | None]:
    with _exporter_errors("torch"):
        program, step = _trace_program(model, images, dynamic)
        torch.export.save(program, path, extra_files={INFO_NAME: json.dumps(describe(model))})
        loaded = torch.export.load(path).module()
    return lambda images: _as_list(loaded(images)), step


def _trace_program(model: nn.Module, images: Tensor, dynamic: bool) -> tuple[torch.export.ExportedProgram, int | None]:
    """The network as a program, and the step of the sizes that it takes (None: one size)."""
    if not dynamic:
        return torch.export.export(model, (images,)), None
    try:
        return torch.export.export(model, (images,), dynamic_shapes=_dynamic_shapes(1)), 1
    except torch._dynamo.exc.UserError as error:  # it asks for constraints on the sizes
        if "Constraints violated" not in str(error):
            raise
        if any(side % COARSE_STEP for side in images.shape[2:]):
            raise NatsError(
                f"size: this network needs multiples of {COARSE_STEP}, found {list(images.shape[2:])}"
            ) from error
        return torch.export.export(model, (images,), dynamic_shapes=_dynamic_shapes(COARSE_STEP)), COARSE_STEP


def _dynamic_shapes(step: int) -> tuple[dict[int, Any]]:
    dim = torch.export.Dim
    # the names that an ONNX file shows
    height, width = (
        dim(name, min=SMALLEST_SIDE) if step == 1 else step * dim(f"{name}_{step}", min=SMALLEST_SIDE // step)
        for name in ("height", "width")
    )
    return ({0: dim("batch", min=1, max=MAX_IMAGES), 2: height, 3: width},)


def _write_trace(model: nn.Module, images: Tensor, path: Path, dynamic: bool, opset: int | None) -> tuple[Runner, int]:
    with _exporter_errors("torchscript"):
        traced = torch.jit.trace(_Tuple(model), images, check_trace=False)
        torch.jit.save(traced, path, _extra_files={INFO_NAME: json.dumps(describe(model))})
        loaded = torch.jit.load(path)
    return lambda images: _as_list(loaded(images)), 1


WRITERS = {"onnx": _write_onnx, "torch": _write_program, "torchscript": _write_trace}


class _Tuple(nn.Module):
    """A network whose list of maps comes as a tuple, which a trace can return."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = self.model(images)
        return tuple(output) if isinstance(output, list) else output


@contextmanager
def _exporter_errors(format: str) -> Iterator[None]:
    """Without the exporters' warnings and logs; what they raise, of many kinds, becomes one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (NatsError, OSError):
        raise
    except Exception as error:
        said = _COLOURS.sub("", str(error)).strip()
        first = next(iter(said.splitlines()), type(error).__name__)
        raise NatsError(f"format {format!r}: the network can not be exported: {first}") from error
    finally:
        logging.disable(disabled)


def _largest_difference(run: Runner, model: nn.Module, shapes: list[tuple[int, ...]], path: str | os.PathLike) -> float:
    """Compare a file with its network; NatsError if it gives anything else."""
    worst = 0.0
    for shape in shapes:
        images = _batch(shape, model)
        for name, found, expected in zip(output_names(model), run(images), _as_list(model(images)), strict=True):
            difference = _difference(found, expected.cpu())
            if not difference <= TOLERANCE:
                where = f"{name} of {'x'.join(map(str, shape))}"
                raise NatsError(f"{path}: not written: {where} is off by {difference:.1e} of its largest value")
            worst = max(worst, difference)
    return worst


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def _as_list(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)
