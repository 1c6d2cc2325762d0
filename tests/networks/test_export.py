"""Export: files give what the network gives, in the form that trains and in deployment form."""

import json
import sys

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from nats_zoo import Genotype, NatsError
from nats_zoo.networks.export import TOLERANCE, Written, describe, export, output_names
from tests.support.marks import needs_onnx

SHALLOW = dict(layers=(1, 1, 1, 1), zero_init_last=False)
NETWORKS = ("resnet18", "resnet50", "resnext50_32x4d")
STRIDES = ["stride4", "stride8", "stride16", "stride32"]
every_network = pytest.mark.parametrize("name", NETWORKS)
both_forms = pytest.mark.parametrize("deployed", [False, True], ids=["plain form", "deployment form"])
# for what takes seconds: each block, each form, and the grouped one in both
some_networks = pytest.mark.parametrize(
    ("name", "deployed"),
    [("resnet18", False), ("resnet50", True), ("resnext50_32x4d", False), ("resnext50_32x4d", True)],
    ids=["resnet18, plain form", "resnet50, deployment form", "resnext, plain form", "resnext, deployment form"],
)
jit_warnings = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


@pytest.fixture(scope="module")
def build(draw_runs, randomise_bn):
    """`build(name, deployed, wrong, ...)`: a regrouped network with random weights, equal on every call.

    `wrong`: with one dilation changed.
    """

    def build(name, deployed=False, wrong=False, **options):
        with torch.device("meta"):
            plain = timm.create_model(name, **SHALLOW)
        names = [n for n, module in plain.named_modules() if n.startswith("layer") and n.endswith("conv2")]
        convs = {n: draw_runs(plain.get_submodule(n), index) for index, n in enumerate(names)}
        if wrong:
            channels, height, width = convs[names[0]][0]
            convs[names[0]][0] = [channels, height, width + 1]
        torch.manual_seed(0)
        model = timm.create_model(f"nats_{name}", genotype=Genotype(name, convs), **SHALLOW, **options)
        randomise_bn(model, torch.Generator().manual_seed(0)).eval()
        return reparameterize_model(model) if deployed else model

    return build


def features(build, name, deployed=False, wrong=False):
    return build(name, deployed, wrong, features_only=True, out_indices=(1, 2, 3, 4))


# What torch.export can leave open grows with its versions: older ones take multiples of 32 where this one takes any.
IS_OLD = torch.__version__ < "2.14"
STEPS = (1, 32) if IS_OLD else (1,)
NO_OPSET = "can not be exported|can not be written in 9" if IS_OLD else "opset: the network can not be written in 9"


def larger(written):
    """A size that the file was not traced with."""
    return (71, 102) if written.step == 1 else (160, 96)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_same(found, expected, other):
    """Equal outputs; the other network's, with one dilation changed, are not."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * b.abs().max().item())
    assert (other[-1] - expected[-1]).abs().max() > 10 * TOLERANCE * expected[-1].abs().max()


def run_onnx(path, images):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"images": images.numpy()})]


# --- whole networks ---------------------------------------------------------------------------------------------------


@needs_onnx
@torch.no_grad()
@some_networks
def test_onnx_of_any_batch_and_size(name, deployed, build, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = features(build, name, deployed)
    written = export(model, tmp_path / "m.onnx", size=64)
    assert written.shapes == [(2, 3, 64, 64), (1, 3, 96, 128)]
    assert written.step in STEPS
    assert written.difference < TOLERANCE
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]  # the weights are in it
    images = noise(3, 3, *larger(written))
    plain, wrong = features(build, name), features(build, name, wrong=True)
    assert_same(run_onnx(tmp_path / "m.onnx", images), plain(images), wrong(images))
    file = onnx.load(tmp_path / "m.onnx")
    assert [output.name for output in file.graph.output] == STRIDES
    sides = ["height", "width"] if written.step == 1 else ["32*height_32", "32*width_32"]
    assert [dim.dim_param for dim in file.graph.input[0].type.tensor_type.shape.dim] == ["batch", "", *sides]
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert facts["mean"] == list(model.pretrained_cfg["mean"])
    assert facts["outputs"] == STRIDES


@torch.no_grad()
@some_networks
def test_programs_of_torch_export(name, deployed, build, tmp_path):
    model = features(build, name, deployed)
    written = export(model, tmp_path / "m.pt2", "torch", size=64)
    assert written.step in STEPS
    extra = {"nats_zoo.json": ""}
    loaded = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    assert json.loads(extra["nats_zoo.json"])["outputs"] == STRIDES
    plain, wrong = features(build, name), features(build, name, wrong=True)
    for images in (noise(1, 3, 64, 64), noise(3, 3, *larger(written))):
        assert_same(loaded(images), plain(images), wrong(images))


@torch.no_grad()
@jit_warnings
@every_network
@both_forms
def test_torchscript_traces(name, deployed, build, tmp_path):
    export(features(build, name, deployed), tmp_path / "m.pt", "torchscript", size=64)
    loaded = torch.jit.load(tmp_path / "m.pt")
    plain, wrong = features(build, name), features(build, name, wrong=True)
    images = noise(3, 3, 71, 102)
    assert_same(loaded(images), plain(images), wrong(images))


@torch.no_grad()
@jit_warnings
@both_forms
def test_torchscript_scripts(deployed, build):
    images = noise(2, 3, 64, 64)
    scripted = torch.jit.script(build("resnet50", deployed, scriptable=True))
    plain, wrong = build("resnet50"), build("resnet50", wrong=True)
    assert_same([scripted(images)], [plain(images)], [wrong(images)])


@torch.no_grad()
@every_network
@both_forms
def test_compiled_without_a_graph_break(name, deployed, build):
    torch.compiler.reset()
    model, images = features(build, name, deployed), noise(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain, wrong = features(build, name), features(build, name, wrong=True)
    assert_same(compiled(images), plain(images), wrong(images))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_inductor(build):
    torch.compiler.reset()
    model, images = features(build, "resnext50_32x4d", deployed=True), noise(2, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True)
    plain, wrong = features(build, "resnext50_32x4d"), features(build, "resnext50_32x4d", wrong=True)
    assert_same(compiled(images), plain(images), wrong(images))


@torch.no_grad()
@every_network
@both_forms
def test_feature_extraction_by_fx(name, deployed, build):
    images = noise(2, 3, 64, 64)
    names = {f"layer{stage}": stride for stage, stride in enumerate(STRIDES, 1)}
    by_torchvision = create_feature_extractor(build(name, deployed), names)(images)
    plain, wrong = features(build, name), features(build, name, wrong=True)
    assert_same(list(by_torchvision.values()), plain(images), wrong(images))
    if not deployed:  # a copy of timm's graph, of any network, comes back in training mode: none for deployment
        by_timm = build(name, features_only=True, out_indices=(1, 2, 3, 4), feature_cls="fx")
        assert_same(by_timm(images), plain(images), wrong(images))


@needs_onnx
@torch.no_grad()
def test_a_classifier_of_one_size(build, tmp_path):
    pytest.importorskip("onnxscript")
    model = build("resnet50", num_classes=7)
    written = export(model, tmp_path / "m.onnx", size=(64, 96), dynamic=False)
    assert (written.step, written.shapes) == (None, [(1, 3, 64, 96)])
    images = noise(1, 3, 64, 96)
    [logits] = run_onnx(tmp_path / "m.onnx", images)
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-3)
    with pytest.raises(Exception, match=r"images|dimensions"):
        run_onnx(tmp_path / "m.onnx", noise(1, 3, 96, 96))


@needs_onnx
@torch.no_grad()
def test_networks_that_take_multiples_of_32(randomise_bn, tmp_path):
    """Those that pool with ceil_mode: ResNet-D."""
    pytest.importorskip("onnxscript")
    genotype = Genotype("resnet50d", {"layer2.0.conv2": [(64, 1, 1), (64, 2, 3)]})
    options = dict(SHALLOW, features_only=True, out_indices=(1, 2, 3, 4), genotype=genotype)
    model = randomise_bn(timm.create_model("nats_resnet50d", **options), torch.Generator().manual_seed(0)).eval()
    assert export(model, tmp_path / "m.onnx", size=64).step == 32
    images = noise(3, 3, 160, 96)
    for found, expected in zip(run_onnx(tmp_path / "m.onnx", images), model(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())
    with pytest.raises(NatsError, match=r"size: this network needs multiples of 32, found \[80, 80\]"):
        export(model, tmp_path / "m.onnx", size=80)


def test_what_a_file_says_of_its_network(build):
    model = build("resnet18")
    assert output_names(model) == ["logits"]
    assert output_names(features(build, "resnet18")) == STRIDES
    assert describe(model)["genotype_sha256"] == model.genotype.fingerprint()
    assert describe(model)["architecture"] == "nats_resnet18"


# --- small networks: what goes wrong ----------------------------------------------------------------------------------

SMALL = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
FILES = {"onnx": "m.onnx", "torch": "m.pt2", "torchscript": "m.pt"}
every_format = pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "torch", "torchscript"])


CALLS = [0]


class Counting(nn.Module):
    """Gives something else at every call, so that no file can give the same."""

    def forward(self, images):
        CALLS[0] += 1
        return images + CALLS[0]


class Branching(nn.Module):
    """Decides by its input's values, which torch.export can not follow."""

    def forward(self, images):
        return images if images.sum() > 0 else -images


@every_format
def test_modes_stay_and_the_file_is_for_evaluation(format, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval(), nn.Dropout(0.5)).train()
    model[1].eval()
    export(model, tmp_path / FILES[format], format, size=64)
    assert [module.training for module in model] == [True, False, True]


@every_format
def test_a_file_that_gives_something_else_is_not_left_behind(format, tmp_path):
    path = tmp_path / FILES[format]
    path.write_text("old")
    with pytest.raises(NatsError, match=r"m\.\w+: not written: logits of 2x3x64x64 is off by"):
        export(Counting(), path, format, size=64)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=needs_onnx), "torch"])
def test_a_network_that_can_not_be_exported_is_refused_in_one_line(format, tmp_path):
    with pytest.raises(NatsError, match=rf"^format '{format}': the network can not be exported") as caught:
        export(Branching(), tmp_path / FILES[format], format, size=64)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_torch_too_old_for_onnx_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("nats_zoo.networks.export.ONNX_TORCH", "9.1")
    with pytest.raises(NatsError, match=r"^format 'onnx' needs torch 9\.1 or newer, this is \d"):
        export(SMALL, tmp_path / "m.onnx", size=64)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param(
            *("m.onnx", dict(format="tflite"), "format: expected one of onnx, torch, torchscript, found 'tflite'"),
            id="m.onnx-options0-format: expected one of onnx, torch, torchscript, got 'tflite'",
        ),
        pytest.param(
            *("m.onnx", dict(size=32), "size: expected at least 64 pixels on each side, found 32 x 32"),
            id="m.onnx-options1-size: expected at least 64 pixels on each side, got 32 x 32",
        ),
        pytest.param("m.onnx", dict(size=(64, 63)), "found 64 x 63", id="m.onnx-options2-got 64 x 63"),
        pytest.param("m.onnx", dict(opset=9), NO_OPSET, marks=needs_onnx),
        ("m.pt2", dict(format="torch", opset=18), "opset: is for the format 'onnx', not for 'torch'"),
        ("m.bin", dict(format="torch"), r"m\.bin: .* ends in \.pt2"),
        ("m.pt", dict(format="torchscript", dynamic=False), "fixed: a TorchScript trace takes images of any size"),
    ],
)
def test_bad_options_are_refused(name, options, words, tmp_path):
    with pytest.raises(NatsError, match=words):
        export(SMALL, tmp_path / name, **{"size": 64, **options})
    assert not list(tmp_path.iterdir())


@needs_onnx
def test_an_opset_is_what_was_asked_for(tmp_path):
    onnx = pytest.importorskip("onnx")
    for opset in (18, 20):
        export(SMALL, tmp_path / "m.onnx", size=64, opset=opset)
        assert [entry.version for entry in onnx.load(tmp_path / "m.onnx").opset_import if not entry.domain] == [opset]


@needs_onnx
@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_what_installs_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what makes Python find none
    with pytest.raises(NatsError, match=rf"needs the package {package}: pip install 'nats-zoo\[export\]'"):
        export(SMALL, tmp_path / "m.onnx", size=64)
    assert export(SMALL, tmp_path / "m.pt2", "torch", size=64) == Written(1, [(2, 3, 64, 64), (1, 3, 96, 128)], 0.0)


@needs_onnx
def test_without_onnxruntime_the_file_is_written_unchecked(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(SMALL, tmp_path / "m.onnx", size=64).shapes == []
    monkeypatch.undo()
    images = noise(1, 3, 64, 64)
    torch.testing.assert_close(run_onnx(tmp_path / "m.onnx", images)[0], SMALL.eval()(images).detach())
