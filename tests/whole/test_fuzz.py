"""Thousands of damaged configs, genotypes and safetensors headers: clean errors only, in bounded memory and time.

The items are made and read in one child process, whose memory the system limits, and which writes a report: what a
library does to a process that gets no memory would end the tests too. Everything is drawn from a seed.
"""

import contextlib
import copy
import json
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

SEED = 20240611
MEMORY = 2**30  # bytes that a reader may take beyond what the process has after importing everything
SECONDS = 10.0  # of CPU, for one item; half a second would do, but machines differ
LONGEST_MESSAGE = 1000  # characters, without the path
DEEP = "@deep@"
CONFIG = "config.json"

COUNTS = {
    "detector config": 1500,
    "backbone config": 1300,
    "genotype": 1100,
    "safetensors": 1100,
    "detector folder": 80,
    "backbone folder": 160,
    "YAML": 100,
    "VOC XML": 80,
    "run": 200,
}


# --- damage -----------------------------------------------------------------------------------------------------------

NUMBERS = [0, -1, 1, 2, 3.5, 255, 2**20, 10**9, 10**12, 2**63, -(10**30), 1e308, -1e-300, 10**400]
SPECIAL = [None, True, False, float("nan"), float("inf"), float("-inf"), [], {}, [[]], {"": None}]
STRINGS = ["", " ", "x" * 5000, "a\nb", "\x1b[31m", "\u202e", "\ud800", "\0", "é" * 300, "1", "null", "resnet50"]
NAMES = ["../../../etc/passwd", "/etc/passwd", "hf-hub:org/name", "local-dir:/", "vit_giant_patch14_224", "nats_any"]
ARGUMENTS = [
    {"layers": [10**9] * 4},
    {"layers": [4000] * 200},
    {"num_classes": 10**9},
    {"in_chans": 10**9},
    {"base_width": 4096, "cardinality": 4096},
    {"stem_width": 4000, "stem_type": "deep"},
    {"block_args": {"attn_layer": "se", "rd_ratio": 4000}},
    {"output_stride": 3},
    {"checkpoint_path": "/etc/passwd"},
    {"pretrained_cfg_overlay": {"url": "http://localhost:1/x.bin"}},
    {"cache_dir": "/elsewhere"},
    {"features_only": True, "out_indices": [99]},
    {"norm_layer": "groupnorm"},
    {"act_layer": "no_such_activation"},
    {"block": "Bottleneck"},
    {"device": "cuda:77"},
]


def strange(rng: random.Random) -> Any:
    """A value that does not belong where it is put."""
    made = [
        rng.choice(SPECIAL),
        rng.choice(STRINGS),
        rng.choice(NAMES),
        [rng.choice(NUMBERS)] * rng.choice([1, 3, 5, 2000]),
        {rng.choice(STRINGS): rng.choice(NUMBERS) for _ in range(3)},
        rng.choice([DEEP, [[[[[[[[[[[[1]]]]]]]]]]]], rng.choice(ARGUMENTS)]),
        rng.choice(NUMBERS),
        rng.choice(NUMBERS),
    ]
    return copy.deepcopy(rng.choice(made))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def damage(rng: random.Random, value: Any) -> Any:
    """Change one to three places of a JSON value: other values, types, keys and sizes."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        if not found:
            return strange(rng)
        shallow = [place for place in found if place[0] is value]
        container, key = rng.choice(shallow if rng.random() < 0.4 and shallow else found)
        operation = rng.randrange(8)
        if operation == 0:
            del container[key]
        elif operation == 1 and isinstance(container, dict):
            container[rng.choice([*STRINGS, "format", "architecture", "genotype", "device"])] = container.pop(key)
        elif operation == 2 and isinstance(container, dict):
            container[rng.choice(STRINGS)] = strange(rng)
        elif operation == 3 and isinstance(container[key], dict):
            container[key].update(copy.deepcopy(rng.choice(ARGUMENTS)))
        elif operation == 4 and isinstance(container[key], list):
            container[key] = container[key] * rng.choice([0, 2, 500])
        elif operation == 5:
            container[key] = [container[key]]
        elif operation == 6 and type(container[key]) in (int, float):
            container[key] = container[key] * rng.choice([-1, 2, 1000, 10**6, 10**15, 0.5])
        else:
            container[key] = strange(rng)
    return value


def to_text(rng: random.Random, value: Any) -> bytes:
    """JSON, with nesting far beyond what json itself would write, and damaged as text in one of four."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8, indent=rng.choice([None, 2]))
    levels = rng.choice([20, 90, 900, 100_000])
    text = text.replace(json.dumps(DEEP), "[" * levels + "]" * levels)
    content = text.encode("utf-8", "surrogatepass")
    return damage_bytes(rng, content) if rng.random() < 0.25 else content


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, overwritten, doubled, in another encoding, or with a key twice."""
    cut = rng.randrange(len(content) + 1)
    changed = bytearray(content)
    for _ in range(rng.choice([1, 4, 40])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    other_encoding = content.decode("utf-8", "replace").encode("utf-16")
    number = rng.choice([b"9" * 5000, b"1e999", b"NaN ", b"-", b"[[" * 3000])
    made = [
        content[:cut],
        bytes(changed),
        content[:cut] + rng.randbytes(rng.choice([1, 30])) + content[cut:],
        content + content[:cut],
        rng.choice([b"\xef\xbb\xbf" + content, other_encoding, b"", b" \n"]),
        content.replace(b": ", b": " + number, 1),
        content.replace(b"{", b'{"format": 1, "format": 1, ', 1),
    ]
    return rng.choice(made)


# --- what is read -----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """One kind of items: where they are written, what writes a damaged one, and what reads it."""

    folder: Path
    write: Callable[[random.Random], Any]
    read: Callable[[], Any]


def json_kind(folder: Path, name: str, value: Any, read: Callable[[], Any]) -> Kind:
    folder.mkdir(exist_ok=True)

    def write(rng: random.Random) -> None:
        (folder / name).write_bytes(to_text(rng, damage(rng, value)))

    return Kind(folder, write, read)


ENTRIES = [
    {"shape": [2**40, 2**40]},
    {"shape": [2**63 - 1, 3]},
    {"shape": [0, 2**60]},
    {"shape": [1] * 100},
    {"shape": [-1]},
    {"shape": []},
    *({"dtype": dtype} for dtype in ("F4", "F8_E8M0", "C64", "object", "I64", "BOOL", "", "F6_E2M3")),
    {"data_offsets": [0, 56]},
    {"data_offsets": [10, 2]},
    {"data_offsets": [-8, 8]},
    {"data_offsets": [2**62, 2**63]},
]


def damaged_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A file with a damaged header, or damaged as a whole."""
    length = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + length], content[8 + length :]
    padding = b" " * (5 * 2**20)
    lies = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1]
    made = [
        struct.pack("<Q", rng.choice(lies)) + content[8:],
        damage_bytes(rng, content),
        content[: rng.choice([0, 1, 7, 8, 9, 8 + length, len(content) - 1])],
        content + rng.randbytes(rng.choice([1, 8, 1000])),
        struct.pack("<Q", length + len(padding)) + header + padding + rest,
    ]
    if rng.random() < 0.4:
        return rng.choice(made)
    text = to_text(rng, damage_header(rng, json.loads(header)))
    if rng.random() < 0.1:
        text = text.replace(b"{", b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1, ', 1)
    return struct.pack("<Q", len(text)) + text + rest


def damage_header(rng: random.Random, header: dict[str, Any]) -> Any:
    kind = rng.randrange(4)
    if kind == 0:  # the shape, the type or the place of a tensor
        name = rng.choice([name for name in header if name != "__metadata__"])
        return {**header, name: {**header[name], **rng.choice(ENTRIES)}}
    if kind == 1:
        return {**header, "__metadata__": strange(rng)}
    if kind == 2:
        return {rng.choice([*STRINGS, "n" * 10_000]): value for value in header.values()}
    return damage(rng, header)


SPACE = "2: [1, 2, [1, 3], [3, 1]]\n3: [1, 2, 3]\n4: [1, 2, 3, 5]\n"
DATA_YAML = (
    "path: .\ntrain: images/train\nval: [images/val, list.txt]\nnc: 2\nnames: {0: cat, 1: dog}\nkpt_shape: [17, 3]\n"
)
YAML_BITS = [
    "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a]\nnames: [*b, *b, *b]\n",
    "names: " + "[" * 3000,
    "? " * 3000,
    "names: !!python/object/apply:os.system ['true']\n",
    "2: 1" + ":59" * 2000 + "\n",
    "names: " + "9" * 6000 + "\n",
    "names: [" + "{}, " * 60_000 + "]\n",
    "2: [1]\n2: [1, 2]\n",
    "[1, 2]: 3\n",
    "2: 2001-99-99\n",
    "<<: {2: [1]}\n",
    "- " * 40 + "1\n",
]
VOC = """<annotation><folder>x</folder><filename>a.jpg</filename><source><database>The VOC2007 Data</database></source>
<size><width>64</width><height>48</height><depth>3</depth></size><object><name>cat</name><difficult>0</difficult>
<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object></annotation>"""
XML_BITS = [
    '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><annotation>&b;</annotation>',
    '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]><annotation>&a;</annotation>',
    '<!DOCTYPE x SYSTEM "http://localhost:1/x.dtd"><annotation/>',
    "<a>" * 200_000,
    "<annotation>" + "<a/>" * 500_000 + "</annotation>",
    "<annotation " + " ".join(f'a{i}="1"' for i in range(20_000)) + "/>",
    '<?xml version="1.0" encoding="zip"?><annotation/>',
    '<?xml version="1.0" encoding="utf-7"?><annotation/>',
    "<annotation>&undefined;</annotation>",
    "<annotation>" + "x" * 2_000_000 + "</annotation>",
]


def damaged_text(rng: random.Random, text: str, bits: list[str]) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(bits).encode()
    if kind == 1:
        return text.encode() + rng.choice(bits).encode()
    if kind == 2:
        numbers = [str(rng.choice(NUMBERS)), "nan", "-inf", "1_0", "0x10", "", "é", "x" * 3000]
        words = text.split(" ") if " " in text else list(text)
        words[rng.randrange(len(words))] = rng.choice(numbers)
        return " ".join(words).encode()
    return damage_bytes(rng, text.encode())


class Models(NamedTuple):
    """A tiny backbone and a tiny detector in folders, with the same genotype."""

    genotype: Any
    backbone: Path
    detector: Path


def make_models(root: Path) -> Models:
    import timm
    import torch

    import nats_zoo
    from nats_zoo import Genotype
    from nats_zoo.detection import create_detector, save_detector

    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = ("layer2.0.conv2", "layer3.0.conv2")
    with torch.device("meta"):
        modules = dict(timm.create_model("test_resnet").named_modules())
    convs = {name: [[modules[name].out_channels - 4, 1, 1], [4, 2, 3]] for name in names}
    provenance = {"method": "sampled", "metrics": {"AP": 41.5}, "note": "n"}
    genotype = Genotype("test_resnet", convs, {name: [1.0, 0.9] for name in names}, provenance)
    model = timm.create_model("nats_any", architecture="test_resnet", genotype=genotype, num_classes=3)
    options = {"fpn_channels": 8, "head_size": 8, "min_size": 32, "max_size": 48, "weights": None}
    options |= {"classes": ("cat", "dog"), "category_ids": (1, 7)}
    detector = create_detector("fasterrcnn", "test_resnet", 3, genotype=genotype, **options)
    return Models(
        genotype, nats_zoo.save_backbone(model, root / "backbone"), save_detector(detector, root / "detector")
    )


def json_kinds(root: Path, models: Models) -> dict[str, Kind]:
    import nats_zoo
    from nats_zoo import Genotype
    from nats_zoo.detection import from_pretrained
    from nats_zoo.detection.models.folder import read_detector_config
    from nats_zoo.folders.model_folder import ModelFolder

    backbone, detector = models.backbone, models.detector
    of_backbone, of_detector = (json.loads((folder / CONFIG).read_text()) for folder in (backbone, detector))
    one, two, three = root / "detector configs", root / "backbone configs", root / "genotypes"

    def read_backbone() -> None:
        str(ModelFolder.open(two).genotype)

    def load_genotype() -> None:
        str(Genotype.load(three / "g.json"))

    return {
        "detector config": json_kind(one, CONFIG, of_detector, lambda: read_detector_config(one)),
        "backbone config": json_kind(two, CONFIG, of_backbone, read_backbone),
        "genotype": json_kind(three, "g.json", models.genotype.to_dict(), load_genotype),
        "detector folder": json_kind(detector, CONFIG, of_detector, lambda: from_pretrained(detector)),
        "backbone folder": json_kind(backbone, CONFIG, of_backbone, lambda: nats_zoo.from_pretrained(backbone)),
    }


def safetensors_kind(folder: Path, genotype: Any) -> Kind:
    import torch

    from nats_zoo.folders import weights_file

    folder.mkdir()
    path = folder / "w.safetensors"
    weights_file.save_weights({"a.weight": torch.ones(4, 3), "b": torch.ones(2)}, path, genotype)
    good = path.read_bytes()

    def read() -> None:
        weights_file.WeightsFile(path)
        weights_file.load_weights(path)

    return Kind(folder, lambda rng: path.write_bytes(damaged_safetensors(rng, good)), read)


def text_kinds(folder: Path) -> dict[str, Kind]:
    from nats_zoo import NatsError
    from nats_zoo.detection.data.formats.voc import parse_voc
    from nats_zoo.detection.data.formats.yolo import read_yolo_config
    from nats_zoo.search.space import find_space

    folder.mkdir()

    def write_yaml(rng: random.Random) -> None:
        (folder / "data.yaml").write_bytes(damaged_text(rng, rng.choice([SPACE, DATA_YAML]), YAML_BITS))

    def read_yaml() -> None:
        try:  # of the two, one refuses what the other takes
            find_space(folder / "data.yaml")
        except NatsError:
            read_yolo_config(folder / "data.yaml")

    def write_xml(rng: random.Random) -> None:
        (folder / "a.xml").write_bytes(damaged_text(rng, VOC, XML_BITS))

    return {
        "YAML": Kind(folder, write_yaml, read_yaml),
        "VOC XML": Kind(folder, write_xml, lambda: parse_voc(folder / "a.xml")),
    }


def run_kind(folder: Path) -> Kind:
    import torch

    from nats_zoo.base.run_log import read_log
    from nats_zoo.detection.runs.folder import Checkpoint, RunFolder

    options = {"seed": 1}
    state = {"optimizer": {"numbers": {"0.step": 3}, "param_groups": [{"lr": 0.1, "params": [0]}]}}
    records = [{"step": n, "epoch": n / 2, "loss": 1.5, "data": {"train": "x"}} for n in range(9)]
    log = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    checkpoint = folder / "checkpoints" / "step_000003"

    def write(rng: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        run = RunFolder(folder, options, resume=False)
        run.begin()
        run.save_checkpoint(Checkpoint(3, {"model": {"w": torch.ones(2)}}, state))
        (folder / "log.jsonl").write_bytes(damage_bytes(rng, log) if rng.random() < 0.3 else log)
        path = rng.choice([folder / "run.json", checkpoint / "state.json", checkpoint / "model.safetensors"])
        content = path.read_bytes()
        is_json = path.suffix == ".json"
        damaged = to_text(rng, damage(rng, json.loads(content))) if is_json else damaged_safetensors(rng, content)
        path.write_bytes(damaged)

    def read() -> None:
        run = RunFolder(folder, options, resume=True)
        run.latest_checkpoint()
        read_log(folder / "log.jsonl")
        run.rewind_log(2)

    return Kind(folder, write, read)


def make_kinds(root: Path) -> dict[str, Kind]:
    """All kinds of items, each in a folder of its own below root."""
    models = make_models(root)
    kinds = {**json_kinds(root, models), **text_kinds(root / "texts")}
    return {
        **kinds,
        "safetensors": safetensors_kind(root / "weights", models.genotype),
        "run": run_kind(root / "run"),
    }


# --- the child process ------------------------------------------------------------------------------------------------


def fuzz(kind: Kind, name: str, number: int) -> dict[str, Any]:
    """Read so many items; the report has what went otherwise than well or in a NatsError of one line."""
    from nats_zoo import NatsError

    outcomes: Counter[str] = Counter()
    failures, slowest = [], 0.0
    for index in range(number):
        rng = random.Random(f"{SEED} {name} {index}")
        kind.write(rng)
        began = time.process_time()
        try:
            kind.read()
            outcomes["read"] += 1
        except NatsError as error:
            outcomes["refused"] += 1
            message = str(error).replace(str(kind.folder), "")
            if "\n" in message or not message.strip() or len(message) > LONGEST_MESSAGE:
                failures.append(f"{index}: message of {len(message)} characters: {message[:300]!r}")
        except BaseException as error:  # whatever it is, it is not clean
            failures.append(f"{index}: {type(error).__name__}: {str(error)[:300]}")
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        if seconds > SECONDS:
            failures.append(f"{index}: took {seconds:.1f} s")
    return {"outcomes": dict(outcomes), "failures": failures, "slowest": slowest}


def limit_memory() -> None:
    """From now on the process gets no more than MEMORY beyond the address space that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))


def main(folder: Path, share: float) -> None:
    kinds = make_kinds(folder)
    for name in ("detector folder", "backbone folder"):  # imports and pools of threads come with the first use
        kinds[name].read()
    limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = {name: fuzz(kind, name, round(COUNTS[name] * share)) for name, kind in kinds.items()}
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"kinds": report, "grown": grown, "cpu": time.process_time()}))


# --- the tests --------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("fuzz"))]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", COUNTS)
def test_damaged_input_is_read_or_refused_in_one_line(report, name):
    found = report["kinds"][name]
    assert found["failures"] == []
    assert sum(found["outcomes"].values()) == COUNTS[name]
    # Nearly all damage must be noticed, and some must not: else the reader, or the damage, does nothing.
    assert found["outcomes"]["refused"] > COUNTS[name] / 4
    assert found["outcomes"].get("read", 0) > 0


def test_there_are_five_thousand_configs_genotypes_and_headers():
    assert sum(COUNTS[name] for name in ("detector config", "backbone config", "genotype", "safetensors")) >= 5000


def test_reading_them_takes_little_memory(report):
    assert report["grown"] < 700  # MB at the peak; the system's own limit is MEMORY


if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()), float((sys.argv[2:] or ["1"])[0]))
