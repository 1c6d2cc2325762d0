"""Write what version 0.1.0 saves, as test data for later versions: genotypes, model folders, run folders, outputs.

    git worktree add ../nats-zoo-0.1.0 74ac88f  # and install that one
    OMP_NUM_THREADS=1 python tests/whole/saved_by_0_1_0/write.py NEW_FOLDER

Only public doors are used. Weights are random, data drawn. The tests import from here what both sides need: the small
network, a digest of weights, and by which command lines the runs were begun.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import nats_zoo
from nats_zoo import Genotype, cli, detection

TINY = "resnet_of_few_channels"
MAX_NUMBERS = 300  # of a tensor of the trained detector that is kept whole
STOP = 10  # the step after which the training run was stopped, of 12

# Options that keep a variant small: they travel in its config.json.
RESNET18 = {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 16], "num_classes": 3}
RESNET10T = {"channels": [4, 8, 8, 8], "stem_width": 4, "num_classes": 2}

SMALL = [
    *("--data", "data", "--weights", "detector", "--fpn_channels", "8", "--head_size", "8", "--roi_samples", "16"),
    *("--min_size", "64", "--max_size", "64", "--anchor_sizes", "[8,16,32,48,64]", "--calibration_images", "2"),
    *("--batch_size", "2", "--workers", "0", "--detections", "5"),
]
TRAIN = [
    *("train", "--backbone", TINY, "--genotype", "genotype", *SMALL, "--epochs", "4", "--warmup_steps", "3"),
    *("--lr_per_image", "0.005", "--eval_every", "4", "--trainable_layers", "2"),
]
SEARCH = [
    *("search", "--backbone", TINY, *SMALL, "--epochs", "3", "--alpha_start", "1", "--space", "A", "--groups", "2"),
    *("--mode", "sampled", "--alpha_lr", "0.05", "--trainable_layers", "2", "--note", "a note"),
]

default_cfgs = generate_default_cfgs({
    TINY: {
        **{"num_classes": 1000, "input_size": (3, 64, 64), "first_conv": "conv1.0", "classifier": "fc"},
        **{"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    }
})  # fmt: skip


@register_model
def resnet_of_few_channels(pretrained: bool = False, **kwargs: object) -> ResNet:
    """A ResNet that timm can name, small enough to keep detectors and checkpoints of it."""
    small = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    return build_model_with_cfg(ResNet, TINY, pretrained, **small, stem_type="deep", stem_width=4, **kwargs)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def environment() -> dict[str, str]:
    """What the bits of floating-point results depend on."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "torchvision": torchvision.__version__, "cpu": cpu}


def probe(seed: int = 0) -> Tensor:
    """What torch alone computes of random numbers: if two machines differ in it, they may differ in anything."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 8, 24, 40, generator=random)
    for dilation in (1, 2):
        x = nn.functional.conv2d(x, torch.randn(8, 8, 3, 3, generator=random), padding=dilation, dilation=dilation)
        x = nn.functional.batch_norm(x, torch.zeros(8), torch.ones(8), training=True).sigmoid()
    return (x.flatten(1) @ torch.randn(x[0].numel(), 16, generator=random) / 50).softmax(1)


def genotypes() -> dict[str, Genotype]:
    """By architecture: several runs of a dilation, gains, provenance."""
    convs = {
        "layer2.0.conv2": [[2, 1, 1], [2, 1, 3], [1, 2, 2], [3, 1, 3]],
        "layer3.0.conv1": [[4, 1, 2], [12, 1, 1]],
        "layer4.0.conv2": [[5, 1, 1], [4, 2, 1], [3, 1, 1], [4, 3, 3]],
    }
    gains = {"layer2.0.conv2": [1.0, 0.93, 1.125, 1.07], "layer4.0.conv2": [1.0, 1.1, 1.0, 0.8]}
    provenance = {"method": "random", "seed": 3, "note": "Drawn, and ÷ by hand", "metrics": {"share_changed": 0.5}}
    short = {"layer2.0.conv2": convs["layer2.0.conv2"], "layer3.0.conv2": [[3, 3, 1], [5, 1, 1]]}
    halves = {"layer3.0.conv2": [0.5, 2.0]}
    return {
        TINY: Genotype(TINY, convs, gains, provenance),
        "resnet18": Genotype("resnet18", {**short, "layer4.0.conv2": convs["layer4.0.conv2"]}, halves),
        "resnet10t": Genotype("resnet10t", short, {"layer2.0.conv2": gains["layer2.0.conv2"]}, provenance),
    }


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random batch norms, and classifiers that decide: those of a fresh network hide errors."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=random)
            module.running_var.uniform_(0.5, 1.5, generator=random)
            module.weight.uniform_(0.5, 1.5, generator=random)
            module.bias.normal_(0, 0.3, generator=random)
        if isinstance(module, nn.Linear):
            module.weight.normal_(0, 0.1, generator=random)
    return model.eval()


@torch.no_grad()
def make_exact(model: nn.Module, seed: int) -> nn.Module:
    """Kernels of three taps of 1 or -1, batch norms that halve and shift by wholes: all sums are exact in float32.

    So no processor and no order of additions changes a bit of what the network gives for whole numbers.
    """
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            taps = torch.zeros(len(module.weight), module.weight[0].numel())
            places = torch.rand(taps.shape, generator=random).topk(3).indices
            taps.scatter_(1, places, torch.randint(0, 2, places.shape, generator=random) * 2.0 - 1)
            module.weight.copy_(taps.view_as(module.weight))
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(1 - module.eps)  # with epsilon 1, the only divisor
            module.weight.fill_(0.5)
            module.running_mean.copy_(torch.randint(-1, 2, module.bias.shape, generator=random))
            module.bias.copy_(torch.randint(0, 3, module.bias.shape, generator=random))
    model.fc.bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    return model.eval()


@torch.no_grad()
def check_exact(model: nn.Module, images: Tensor) -> None:
    """See that every layer is given multiples of a power of two, and that no sum of them can lose a bit."""

    def check(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].double()
        unit = next(2.0**-n for n in range(24) if torch.equal(x * 2**n, (x * 2**n).round()))
        most = 3 * 2 * x.abs().amax() + 4  # three taps, gains of up to 2, shifts
        assert most / unit < 2**20, f"{most} in units of {unit}"  # 24 bits, but for a half of one and means of eight

    hooks = [module.register_forward_hook(check) for module in model.modules() if not list(module.children())]
    model(images)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The map at stride 32 and the logits of a classifier."""
    features = model.forward_features(images)
    return {"map": features, "logits": model.forward_head(features)}


def draw_data(folder: Path, seed: int = 0) -> None:
    """Squares and discs on grey, in COCO's layout: six images to train on, two to evaluate on."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, count in {"train": 6, "val": 2}.items():
        images, objects = [], []
        for number in range(count):
            name = f"{split}{number}.png"
            image = Image.new("RGB", (64, 64), tuple(map(int, random.integers(60, 120, 3))))
            draw = ImageDraw.Draw(image)
            for side in map(int, random.integers(12, 28, 2)):
                x, y = map(int, random.integers(0, 64 - side, 2))
                kind, box = int(random.integers(1, 3)), (x, y, x + side - 1, y + side - 1)
                (draw.rectangle if kind == 1 else draw.ellipse)(box, fill=tuple(map(int, random.integers(0, 256, 3))))
                entry = {"id": len(objects) + 1, "image_id": number, "category_id": kind, "iscrowd": 0}
                objects.append({**entry, "bbox": [x, y, side, side], "area": side * side})
            image.save(folder / "images" / name)
            images.append({"id": number, "file_name": name, "width": 64, "height": 64})
        categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}]
        content = {"images": images, "annotations": objects, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def nats(*words: str, code: int = 0) -> None:
    """Run a command as if it had been typed."""
    sys.argv = ["nats", *words]
    assert cli.main(list(words)) == code, words


def stop_after(step: int) -> None:
    """Press Ctrl-C, so to speak, at the end of an optimiser's step."""
    done = iter(range(1, step + 1))

    def interrupt(*_: object) -> None:
        if next(done, step) == step:
            hook.remove()
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(interrupt)


def write(folder: Path) -> None:
    """Everything, into a new folder."""
    folder.mkdir()
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    named = genotypes()
    named[TINY].save("genotype.json")
    nats_zoo.save_genotype_folder(named[TINY], "genotype")

    variant = timm.create_model("nats_resnet18", genotype=named["resnet18"], **RESNET18)
    nats_zoo.save_backbone(make_exact(variant, 1), "variant")
    other = timm.create_model("nats_any", architecture="resnet10t", genotype=named["resnet10t"], **RESNET10T)
    nats_zoo.save_backbone(randomise(other, 2), "any")
    detector = detection.create_detector(
        *("fasterrcnn", TINY, 3, named[TINY], None), fpn_channels=8, head_size=8, min_size=64, max_size=96,
        anchor_sizes=(8, 16, 32, 48, 64), detections=4, classes=("square", "disc"),
    )  # fmt: skip
    detection.save_detector(randomise(detector, 7), "detector")

    random = torch.Generator().manual_seed(4)
    tensors = {
        "whole numbers": torch.randint(0, 4, (2, 3, 64, 128), generator=random, dtype=torch.uint8),
        "image": torch.randint(0, 256, (3, 60, 80), generator=random, dtype=torch.uint8),
        "probe": probe(),
    }
    inputs = {"variant": tensors["whole numbers"].float(), "any": tensors["image"][None] / 255}
    digests = {}
    for name, batch in inputs.items():
        model = nats_zoo.from_pretrained(name).eval()
        digests[name] = digest(model.state_dict())
        tensors |= {f"{name}/{key}": value for key, value in outputs(model, batch).items()}
        if name == "variant":
            check_exact(model, batch)
        plain = outputs(nats_zoo.to_plain(model), batch)
        assert not torch.allclose(plain["map"], tensors[f"{name}/map"], rtol=0.01, atol=0.01), "dilations matter"
    detector = detection.from_pretrained("detector")
    digests["detector"] = digest(detector.state_dict())
    with torch.no_grad():
        found = detector([tensors["image"] / 255])[0]
    assert found["scores"].diff().abs().amin() > 1e-3, "the order is that of rounding"
    tensors |= {f"detector/{key}": value for key, value in found.items()}

    draw_data(Path("data"))
    nats(*TRAIN, "--output", "uninterrupted")
    trained = load_file("uninterrupted/model/model.safetensors")
    digests["trained"] = digest(trained)
    tensors |= {f"trained/{name}": tensor for name, tensor in trained.items() if tensor.numel() <= MAX_NUMBERS}
    stop_after(STOP)
    nats(*TRAIN, "--output", "stopped", code=130)
    nats(*SEARCH, "--output", "searched")
    shutil.rmtree("uninterrupted")

    save_file(tensors, "expected.safetensors")
    facts = {"environment": environment(), "digests": digests}
    Path("expected.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for chart in (*Path().glob("*/genotype.png"), *Path("searched/report").glob("*.png")):  # drawn, never read
        chart.unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
