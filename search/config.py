"""Options of a search."""

from dataclasses import dataclass
from typing import Literal

from ..base.names import VARIANT_PREFIX
from ..detection.runs.config import RunConfig, check_at_least
from .space import SearchError

DEFAULT_GROUPS = 16
PAPER_EPOCHS = 25


def annealed(first: float, last: float, step: float, start: float, total: float) -> float:
    """The temperature at a step: geometric from `first` until step `start` to `last` at the step before `total`."""
    done = min(1.0, max(0.0, step - start) / max(1.0, total - 1 - start))
    return first * (last / first) ** done


@dataclass(frozen=True, kw_only=True)
class SearchConfig(RunConfig):
    """Search a genotype for a detector's backbone.

    The defaults are the paper's recipe, its learning rate scaled to the images of a step. The output folder receives
    genotype.json, report/ (one page with pictures), log.jsonl (with alpha after every epoch) and checkpoints/.

    Args:
        mode: 'mixture': all candidates at full width, weighed by alpha (the paper); 'sampled': each group runs two
            candidates, drawn anew at every step, at about the cost of plain training; 'sensitivity': first-order
            scores from a trained detector, in minutes.
        space: the paper's candidate dilations A, B or C, or a YAML file of your own.
        groups: groups of output channels per convolution; null: 16, or what channels_per_group says. 1 is a path-level
            search.
        channels_per_group: size of the groups instead of their number.
        convs: names of the searched convolutions, or patterns with * and ?; empty: one 3x3 per residual block of a
            ResNet, all convolutions in the space's stages of another network.
        basic_block: which convolutions of a ResNet's BasicBlocks: 'conv2' or 'both'.
        kernels: 'tied': candidates share their kernel; 'untied': each has a copy; null: untied in mixture, else tied.
        norm: whose statistics normalise the candidates. 'calibrated': each its own, remeasured every epoch and frozen
            in between; 'live': those of the batch, for 8 or more images per step; 'frozen': those of the weights.
        level: 'bilevel': one half of the images updates the weights, the other alpha, in turn; 'single': every image
            updates both, for small data sets.
        epochs: times through the images that update the weights; null: 25; in sensitivity mode, where they come before
            the scoring, 1, or 0 with a detector.
        alpha_start: epochs during which alpha is frozen.
        lr_per_image: first learning rate of the weights, multiplied by the images of a step (over all processes).
        final_lr_per_image: the last one; cosine in between.
        momentum: of the weights' SGD.
        weight_decay: of the weights' SGD.
        alpha_lr: learning rate of alpha's Adam.
        alpha_weight_decay: of alpha's Adam.
        temperature: probabilities are softmax(alpha / temperature).
        final_temperature: the last one, reached geometrically while alpha moves; null: it stays.
        entropy_weight: of the probabilities' mean entropy in the loss; above 0 groups decide sooner, below later.
        max_dilations: most different dilations in a convolution; the best set is found exactly. null: any number.
        costs: file of measured costs, from `nats profile` on the machine that the network is for.
        cost_weight: of a convolution's time, relative to the plain one's, against the log probabilities when its
            candidates are chosen.
        cost_loss: weight of the expected time, relative to the plain network's, in the loss.
        calibrate_gains: give runs gains with which the weights' batch norm statistics fit other dilations.
        detector: folder or Hub repository of a trained detector to start from, its heads included; the backbone,
            framework, sizes and anchors are then its own.
        score_images: images on which candidates are scored, in sensitivity mode.
        held_back_images: training images, used for nothing else, whose loss decides whether changes are kept, in
            sensitivity mode.
        max_rounds: of scoring, in sensitivity mode.
        flip: probability of mirroring an image left and right.
        note: free text for the genotype's provenance.

    Example:
        >>> config = SearchConfig(data="my_data", output="runs/search", mode="sampled", groups=4, epochs=12)
        >>> genotype = Searcher(config).run()
    """

    backbone: str = "resnet50"
    mode: Literal["mixture", "sampled", "sensitivity"] = "mixture"
    space: str = "C"
    groups: int | None = None
    channels_per_group: int | None = None
    convs: tuple[str, ...] = ()
    basic_block: Literal["conv2", "both"] = "conv2"
    kernels: Literal["tied", "untied"] | None = None
    norm: Literal["calibrated", "live", "frozen"] = "calibrated"
    level: Literal["bilevel", "single"] = "bilevel"
    epochs: int | None = None
    alpha_start: int = 10
    lr_per_image: float = 0.00125 / 8  # the paper's 0.00125 is for 8 GPUs with one image each
    final_lr_per_image: float = 0.00005 / 8
    momentum: float = 0.9
    weight_decay: float = 1e-4
    alpha_lr: float = 0.01
    alpha_weight_decay: float = 1e-5
    temperature: float = 1.0
    final_temperature: float | None = None
    entropy_weight: float = 0.0
    max_dilations: int | None = None
    costs: str | None = None
    cost_weight: float = 0.0
    cost_loss: float = 0.0
    calibrate_gains: bool = False
    detector: str | None = None
    score_images: int = 64
    held_back_images: int = 64
    max_rounds: int = 10
    flip: float = 0.5
    note: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, lr_per_image=self.lr_per_image, final_lr_per_image=self.final_lr_per_image)
        check_at_least(0, momentum=self.momentum, weight_decay=self.weight_decay)
        check_at_least(0, alpha_lr=self.alpha_lr, alpha_weight_decay=self.alpha_weight_decay)
        check_at_least(0, cost_weight=self.cost_weight, cost_loss=self.cost_loss)
        check_at_least(1, max_dilations=self.max_dilations)
        self._check_schedule()
        self._check_start()
        self._check_costs()
        if self.groups is None and self.channels_per_group is None:
            object.__setattr__(self, "groups", DEFAULT_GROUPS)

    def _check_schedule(self) -> None:
        least = 0 if self.detector else 1  # a sensitivity search scores what has been trained
        if self.epochs is None:
            object.__setattr__(self, "epochs", least if self.mode == "sensitivity" else PAPER_EPOCHS)
        if self.mode == "sensitivity":
            check_at_least(least, epochs=self.epochs)
            check_at_least(1, score_images=self.score_images, held_back_images=self.held_back_images)
            check_at_least(1, max_rounds=self.max_rounds)
            return
        check_at_least(0, alpha_start=self.alpha_start)
        check_at_least(self.alpha_start + 1, epochs=self.epochs)  # else alpha would never move
        for name in ("temperature", "final_temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SearchError(f"{name}: expected more than 0, found {value}")

    def _check_start(self) -> None:
        if self.weights is None and self.detector is None:
            raise SearchError("weights: the search reuses a pretrained backbone, null can not be searched")
        if self.backbone.startswith(VARIANT_PREFIX):
            raise SearchError(f"backbone: the search begins from a plain network, not from {self.backbone}")

    def _check_costs(self) -> None:
        if (self.cost_weight or self.cost_loss) and self.costs is None:
            name = "cost_weight" if self.cost_weight else "cost_loss"
            raise SearchError(f"{name}: needs measured costs: --costs FILE, from nats profile")
        if self.mode != "sensitivity":
            return
        for name in ("cost_weight", "cost_loss", "entropy_weight"):
            if getattr(self, name):
                raise SearchError(f"{name}: is for the modes with an alpha, not for sensitivity")
