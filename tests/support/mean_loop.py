"""The smallest loop: a network whose loss is a mean over images, so that any split of a batch has the same gradient.

As a script it is what tests start in several processes: `mean_loop.py JSON`, a list of [function, arguments].
"""

import json
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import save_file
from torch import nn

from nats_zoo.cli import commands as cli
from nats_zoo.detection import TrainConfig, Trainer
from nats_zoo.detection.data.dataset import CocoDataset
from nats_zoo.detection.data.formats.coco import find_split
from nats_zoo.detection.runs import processes
from nats_zoo.detection.runs.folder import RunFolder
from nats_zoo.detection.runs.loop import EpochLoader, ResumableLoop


class MeanLoss(nn.Module):
    """Two losses, each the mean over the images of a squared error per image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, images: list[torch.Tensor], targets: list[dict]) -> dict[str, torch.Tensor]:
        found = torch.stack([self.conv(image[None]).square().mean((0, 2, 3)) for image in images])
        wanted = torch.stack([target["boxes"].mean() / 64 for target in targets])
        errors = (found - wanted[:, None]).square()
        return {"one": errors[:, 0].mean(), "two": errors[:, 1].mean()}


class MeanLoop(ResumableLoop):
    """Plain gradient descent on MeanLoss; keeps the losses and the image ids of every step."""

    def __init__(self, accelerator: Accelerator, output: str, data: str, options: dict):
        options = {"batch_size": 1, "accumulate": 1, "epochs": 2, "resume": False, "clip_grad": None, **options}
        folder = RunFolder(output, options, options["resume"], accelerator.is_main_process)
        loader = EpochLoader(CocoDataset(*find_split(data, "train")), accelerator, options["batch_size"], 0, seed=0)
        super().__init__(accelerator, folder, [loader], options["epochs"], 0, None, "mean", options["accumulate"])
        detector = MeanLoss()
        self.optimizer = torch.optim.SGD(detector.parameters(), lr=0.1)
        self.detector, self.optimizer = accelerator.prepare(detector, self.optimizer)
        self.clip_grad = options["clip_grad"]
        self.losses: list[dict[str, float]] = []
        self.images: list[list[list[int]]] = []

    def train_step(self, batches):
        self.images.append([[target["image_id"] for target in targets] for _, targets in batches])
        record = self.backward(batches)
        self.clip(self.detector.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(record)
        return record

    def state(self):
        return {"model": self.plain_detector.state_dict()}, {}

    def load_state(self, tensors, data):
        self.plain_detector.load_state_dict(tensors["model"])


class SilentLoop(MeanLoop):
    """Its second process never comes to its second step."""

    def train_step(self, batches):
        if self.step == 1:
            Path(f"{self.folder.path}.at_{self.accelerator.process_index}").touch()
            if self.accelerator.process_index == 1:
                time.sleep(600)
        return super().train_step(batches)


def mean_run(output: str, data: str, options: dict) -> None:
    """Run it; each process writes its network, losses, images, and how often gradients were exchanged."""
    accelerator = Accelerator()
    loop = MeanLoop(accelerator, output, data, options)
    exchanges = Counter()

    def count(counter: Counter, bucket):
        counter["all"] += 1
        work = torch.distributed.all_reduce(bucket.buffer() / accelerator.num_processes, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    loop.detector.register_comm_hook(exchanges, count)
    loop.run()
    found = {"losses": loop.losses, "images": loop.images, "exchanges": exchanges["all"]}
    Path(f"{output}.{accelerator.process_index}.json").write_text(json.dumps(found))
    save_file(loop.plain_detector.state_dict(), f"{output}.{accelerator.process_index}.safetensors")


def train_run(options: dict) -> None:
    """`nats train`, and that DDP needs no `find_unused_parameters`."""
    trainer = Trainer(TrainConfig(**options))
    assert trainer.detector.find_unused_parameters is False
    trainer.run()


def search_run(options: dict) -> None:
    """`nats search`, and the same."""
    from nats_zoo.search import SearchConfig, Searcher

    searcher = Searcher(SearchConfig(**options))
    assert searcher.detector.find_unused_parameters is False
    searcher.run()


def silent_run(output: str, data: str, group_timeout: float | None, patience: float) -> None:
    """A run whose second process falls silent, begun as the command begins its runs."""
    processes.LAUNCHER_PATIENCE = patience
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=group_timeout))] if group_timeout else []
    loop = SilentLoop(Accelerator(kwargs_handlers=handlers), output, data, {})
    cli.COMMANDS["silent"] = SimpleNamespace(summary="", build=lambda parser: lambda options: loop.run())
    sys.exit(cli.main(["silent"]))


if __name__ == "__main__":
    for name, arguments in json.loads(sys.argv[1]):
        globals()[name](*arguments)
    processes.end_process(0)
