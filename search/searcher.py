"""The search run: mixture mode as the paper has it, bilevel or single-level, resumable, on accelerate."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..detection.augment import train_transforms
from ..detection.coco_eval import Metrics
from ..detection.config import RunConfig, check_at_least
from ..detection.datasets import CocoDataset
from ..detection.detectors import resized_batches
from ..detection.loop import EpochLoader, ResumableLoop, cosine, set_lr
from ..detection.run_folder import RunFolder, pack_optimizer, unpack_optimizer
from ..detection.trainer import (
    calibration_batches,
    clip,
    create_accelerator,
    create_run_detector,
    evaluate_detector,
    load_scaler_state,
    open_split,
    scaler_state,
)
from ..figures import alpha_heatmaps, genotype_chart, search_curves
from ..genotype import Genotype
from ..transform import VARIANT_PREFIX, architecture_of
from ..version import __version__
from .decode import decode, decode_network
from .space import SPACES, SearchError, searched_convs
from .supernet import MixtureConv2d, alpha_dict, build_supernet, calibrate, entropy, share_changed

DEFAULT_GROUPS = 16


@dataclass(kw_only=True)
class SearchConfig(RunConfig):
    """Search a genotype for a detector's backbone on a COCO-layout data set.

    The defaults are the paper's recipe, its learning rate scaled to the images of a step. The output folder receives
    genotype.json, genotype.png, search.png, alpha.png, log.jsonl (with alpha after every epoch) and checkpoints/.

    Args:
        space: the paper's space of candidate dilations.
        groups: groups of output channels per convolution; null: 16, or what channels_per_group says.
        channels_per_group: size of the groups instead of their number.
        level: 'bilevel': one half of the images updates the weights, the other alpha, in turn; 'single': every image
            updates both, for small data sets.
        epochs: times through the images that update the weights.
        alpha_start: epochs during which alpha is frozen.
        lr_per_image: first learning rate of the weights, multiplied by the images of a step (over all processes).
        final_lr_per_image: the last one; cosine in between.
        momentum: of the weights' SGD.
        weight_decay: of the weights' SGD.
        alpha_lr: learning rate of alpha's Adam.
        alpha_weight_decay: of alpha's Adam.
        flip: probability of mirroring an image left and right.
        note: free text for the genotype's provenance.
    """

    backbone: str = "resnet50"
    space: Literal["A", "B", "C"] = "C"
    groups: int | None = None
    channels_per_group: int | None = None
    level: Literal["bilevel", "single"] = "bilevel"
    epochs: int = 25
    alpha_start: int = 10
    lr_per_image: float = 0.00125 / 8  # the paper's 0.00125 is for 8 GPUs with one image each
    final_lr_per_image: float = 0.00005 / 8
    momentum: float = 0.9
    weight_decay: float = 1e-4
    alpha_lr: float = 0.01
    alpha_weight_decay: float = 1e-5
    flip: float = 0.5
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, alpha_start=self.alpha_start)
        check_at_least(self.alpha_start + 1, epochs=self.epochs)  # else alpha would never move
        check_at_least(0, lr_per_image=self.lr_per_image, final_lr_per_image=self.final_lr_per_image)
        check_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)
        check_at_least(0, alpha_lr=self.alpha_lr, alpha_weight_decay=self.alpha_weight_decay)
        if self.weights is None:
            raise SearchError("weights: the search reuses a pretrained backbone, null can not be searched")
        if self.backbone.startswith(VARIANT_PREFIX):
            raise SearchError(f"backbone: the search begins from a plain network, not from {self.backbone}")
        if self.groups is None and self.channels_per_group is None:
            self.groups = DEFAULT_GROUPS


class Searcher(ResumableLoop):
    """Searches one genotype; `run()` begins or resumes.

    Args:
        config: see SearchConfig.
        accelerator: None: one of the config's precision.
        command: how the run was started, for the genotype's provenance.

    Raises:
        NatsError: anything wrong with the data, the options or the output folder, before any work is done.
    """

    def __init__(self, config: SearchConfig, accelerator: Accelerator | None = None, command: str = ""):
        self.config, self.command = config, command
        accelerator = accelerator or create_accelerator(config.precision)
        self.data = open_split(config, config.train_split, train_transforms(config.flip))
        self.val_data = open_split(config, config.val_split) if config.val_split else None
        folder = RunFolder(config.output, config.to_dict(), config.resume, accelerator.is_main_process)
        loaders = [
            EpochLoader(part, accelerator, config.batch_size, config.workers, config.seed + index)
            for index, part in enumerate(split_for_search(self.data, config.level, config.seed))
        ]
        super().__init__(accelerator, folder, loaders, config.epochs, config.seed, config.checkpoint_every, "search")
        detector = create_run_detector(config, self.data, accelerator)
        body = detector.backbone.body
        self.architecture = architecture_of(body)
        convs = searched_convs(body, SPACES[config.space])
        self.mixtures = build_supernet(body, convs, config.groups, config.channels_per_group)
        self.weights, alphas = split_parameters(detector)
        weight_optimizer = torch.optim.SGD(
            self.weights, lr=config.lr_per_image, momentum=config.momentum, weight_decay=config.weight_decay
        )
        alpha_optimizer = torch.optim.Adam(alphas, lr=config.alpha_lr, weight_decay=config.alpha_weight_decay)
        self.detector, self.weight_optimizer, self.alpha_optimizer = accelerator.prepare(
            detector, weight_optimizer, alpha_optimizer
        )

    @property
    def body(self) -> nn.Module:
        """The supernet."""
        return self.plain_detector.backbone.body

    def run(self) -> Genotype:
        """Search to the end and write the genotype, its pictures and its provenance."""
        super().run()
        return self._finish()

    def epoch_loaders(self) -> list[EpochLoader]:
        """While alpha is frozen, its half of the images is not needed."""
        return self.loaders if self._alpha_moves() else self.loaders[:1]

    def begin_epoch(self) -> None:
        """Remeasure every candidate's statistics: the kernels have drifted."""
        batches = calibration_batches(self.data, self.config)
        calibrate(self.body, self.mixtures.values(), resized_batches(self.plain_detector, batches))

    def train_step(self, *batches: tuple) -> dict[str, float]:
        lr = self._lr()
        set_lr(self.weight_optimizer, lr)
        self.detector.train()
        record = {"loss": self._backward(batches[0]), "lr": lr}
        if self._alpha_moves() and self.config.level == "single":
            # Before clipping: in fp16 that unscales alpha's gradient too, and alpha's step would do it again.
            self.alpha_optimizer.step()
        clip(self.accelerator, self.weights, self.config.clip_grad)
        self.weight_optimizer.step()
        if self._alpha_moves() and self.config.level == "bilevel":
            self._zero_grad()
            record["alpha_loss"] = self._backward(batches[1])
            self.alpha_optimizer.step()
        self._zero_grad()
        mixtures = self.mixtures.values()
        return {**record, "entropy": entropy(mixtures), "share_changed": share_changed(mixtures)}

    def end_epoch(self) -> None:
        self.log({"alpha": alpha_dict(self.mixtures)})

    def _alpha_moves(self) -> bool:
        return self.epoch >= self.config.alpha_start

    def _backward(self, batch: tuple) -> float:
        # Both levels go through the same wrapped forward, so that alpha's gradient is averaged over processes too.
        loss = sum(self.detector(*batch).values())
        self.accelerator.backward(loss)
        return loss.item()

    def _zero_grad(self) -> None:
        self.weight_optimizer.zero_grad()
        self.alpha_optimizer.zero_grad()

    def _lr(self) -> float:
        config = self.config
        per_image = cosine(self.step, self.total_steps, config.lr_per_image, config.final_lr_per_image)
        return per_image * config.batch_size * self.accelerator.num_processes

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        momentum, weight_data = pack_optimizer(self.weight_optimizer)
        moments, alpha_data = pack_optimizer(self.alpha_optimizer)
        tensors = {
            "model": self.plain_detector.state_dict(),
            "weight_optimizer": momentum,
            "alpha_optimizer": moments,
        }
        scaler = scaler_state(self.accelerator)
        return tensors, {"weight_optimizer": weight_data, "alpha_optimizer": alpha_data, "scaler": scaler}

    def load_state(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any]) -> None:
        self.plain_detector.load_state_dict(tensors["model"])
        unpack_optimizer(self.weight_optimizer, tensors["weight_optimizer"], data["weight_optimizer"])
        unpack_optimizer(self.alpha_optimizer, tensors["alpha_optimizer"], data["alpha_optimizer"])
        load_scaler_state(self.accelerator, data["scaler"])

    def _finish(self) -> Genotype:
        genotype = decode(self.mixtures, self.architecture, self._provenance())
        candidates = {name: mixture.candidates for name, mixture in self.mixtures.items()}
        metrics = self._evaluate_decoded()
        if metrics is not None:
            genotype.provenance["metrics"][f"AP on {self.config.val_split} before retraining"] = metrics.ap
        if self.accelerator.is_main_process:
            path = self.folder.path
            genotype.save(path / "genotype.json")
            genotype_chart(genotype, path / "genotype.png")
            search_curves(self.folder.log_path, path / "search.png")
            alpha_heatmaps(list(self._alpha_history()), candidates, path / "alpha.png")
        self.accelerator.wait_for_everyone()
        return genotype

    def _evaluate_decoded(self) -> Metrics | None:
        if self.val_data is None:
            return None
        decode_network(self.body, self.mixtures)
        metrics = evaluate_detector(self.plain_detector, self.val_data, self.accelerator, self.config)
        self.log({"AP": metrics.ap, "AP50": metrics.ap50, "AP75": metrics.ap75})
        return metrics

    def _alpha_history(self) -> Iterator[dict[str, Any]]:
        return (record for record in self.folder.read_log() if "alpha" in record)

    def _provenance(self) -> dict[str, Any]:
        config = self.config
        pretrained = self.body.pretrained_cfg
        weights = pretrained.get("tag") if config.weights == "pretrained" else Path(config.weights).name
        size = {"groups": config.groups} if config.groups else {"channels_per_group": config.channels_per_group}
        mixtures = self.mixtures.values()
        return {
            "method": "mixture",
            "space": config.space,
            **size,
            "level": config.level,
            "dataset": f"{Path(config.data).name} {config.train_split}, {len(self.data)} images",
            "weights": weights,
            "detector": f"{config.framework}, short side {config.min_size}, fpn {config.fpn_channels}",
            "epochs": config.epochs,
            "alpha_start": config.alpha_start,
            "images_per_step": config.batch_size * self.accelerator.num_processes,
            "seed": config.seed,
            "version": __version__,
            "command": self.command,
            "metrics": {"entropy": round(entropy(mixtures), 4), "share_changed": round(share_changed(mixtures), 4)},
            "note": config.note,
        }


def split_for_search(data: CocoDataset, level: str, seed: int) -> list[CocoDataset]:
    """The images for the weights and, in a bilevel search, those for alpha: two halves drawn by the seed.

    Each keeps an epoch of its own, so that calibration on `data` sees the same mirrored images in every epoch, also
    after a resume.
    """
    if level == "single":
        return [data.select(range(len(data)))]
    if len(data) < 2:
        raise SearchError(f"{data.annotations}: a bilevel search needs at least two images")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    half = len(data) // 2
    return [data.select(order[:half]), data.select(order[half:])]


def split_parameters(detector: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(trainable weights, alpha): no parameter is in both, so that alpha never takes the weights' decay."""
    alphas = [module.alpha for module in detector.modules() if isinstance(module, MixtureConv2d)]
    known = {id(alpha) for alpha in alphas}
    weights = [p for p in detector.parameters() if p.requires_grad and id(p) not in known]
    return weights, alphas
