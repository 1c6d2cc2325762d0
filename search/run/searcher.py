"""The search run: weights and alpha in turn, or weights and then trials of changes; resumable, on accelerate."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...detection.data.augment import train_transforms
from ...detection.evaluation.evaluate import evaluate_detector, log_record
from ...detection.models.create import resized_batches
from ...detection.runs.facts import log_data
from ...detection.runs.folder import RunError, pack_optimizer, unpack_optimizer
from ...detection.runs.loop import EpochLoader, ResumableLoop, StopRequest, cosine, set_lr
from ...detection.runs.setup import (
    calibration_batches,
    create_accelerator,
    load_scaler_state,
    open_run_folder,
    scaler_state,
)
from ...genotype.genotype import Genotype
from ...networks.transform import architecture_of
from ..choosing.choose import choose
from ..choosing.cost import CostTable
from ..choosing.gains import calibrate_gains
from ..config import SearchConfig, annealed
from ..report.page import write_report
from ..space import SearchSpace, find_space, genotype_names, searched_convs
from ..supernet.build import (
    MODES,
    alpha_dict,
    build_supernet,
    calibrate,
    draw_pairs,
    entropy,
    mean_entropy,
    share_changed,
)
from ..supernet.decode import decode, decode_network
from ..supernet.searched_conv import SearchedConv2d, SensitivityConv2d
from .provenance import SearchFacts, describe_search
from .start import create_search_detector, held_back, open_search_split, seeded_order, split_for_search
from .trials import Trials

# What pairs of candidates are drawn for; each has random numbers of its own.
FOR_WEIGHTS, FOR_ALPHA, FOR_CALIBRATION = range(3)


class Searcher(ResumableLoop):
    """Searches one genotype; `run()` begins or resumes.

    Args:
        config: see SearchConfig.
        accelerator: None: one of the config's precision.
        command: how the run was started, for the genotype's provenance.

    Attributes:
        searched: the supernet's searched convolutions, by the genotype's names.
        warnings: after `run`, one line for each reason to distrust the result.

    Raises:
        NatsError: anything wrong with the data, the options or the output folder, before any work is done.

    Example:
        >>> searcher = Searcher(SearchConfig(data="my_data", output="runs/search"))
        >>> print(searcher.run(), *searcher.warnings, sep="\n")
    """

    def __init__(self, config: SearchConfig, accelerator: Accelerator | None = None, command: str = ""):
        self.config, self.command = config, command
        accelerator = accelerator or create_accelerator(config.precision)
        space = find_space(config.space)
        self.costs = CostTable.load(config.costs) if config.costs else None
        self.data = open_search_split(config, config.train_split, train_transforms(config.flip))
        self.val_data = open_search_split(config, config.val_split) if config.val_split else None
        parts = split_for_search(self.data, config)
        folder = open_run_folder(config, accelerator)
        assert config.epochs is not None, "SearchConfig fills it in"
        loaders = [
            EpochLoader(part, accelerator, config.batch_size, config.workers, config.seed + index)
            for index, part in enumerate(parts)
        ]
        super().__init__(
            accelerator, folder, loaders, config.epochs, config.seed, config.checkpoint_every, "search",
            config.accumulate,
        )  # fmt: skip
        detector = create_search_detector(config, self.data, accelerator)
        self._build_supernet(detector.backbone.body, space)
        self.weights, alphas = split_parameters(detector)
        self.detector, self.weight_optimizer, self.alpha_optimizer = accelerator.prepare(
            detector, create_weight_optimizer(config, self.weights), create_alpha_optimizer(config, alphas)
        )
        self.trials = self._create_trials() if config.mode == "sensitivity" else None
        self.warnings: list[str] = []

    def _build_supernet(self, body: nn.Module, space: SearchSpace) -> None:
        config = self.config
        architecture = architecture_of(body)
        assert architecture is not None, "timm made it"
        self.architecture = architecture
        convs = searched_convs(body, space, config.convs, config.basic_block)
        names = genotype_names(body, list(convs))
        if self.costs is not None:
            self.costs.check(self.architecture, {names[name]: found for name, found in convs.items()})
        searched = build_supernet(
            body, convs, config.groups, config.channels_per_group, config.mode, config.kernels, config.norm
        )
        self.searched = {names[name]: conv for name, conv in searched.items()}

    def _create_trials(self) -> Trials:
        config, drawn = self.config, self.loaders[0].dataset
        plain = open_search_split(config, config.train_split)  # not mirrored: their losses are compared with each other
        order = seeded_order(len(drawn), config.seed)
        return Trials(
            self.plain_detector,
            {name: conv for name, conv in self.searched.items() if isinstance(conv, SensitivityConv2d)},
            drawn.select(sorted(order[: config.score_images])),
            held_back(plain, config),
            self.accelerator,
            batch_size=config.batch_size,
            seed=config.seed,
            calibrate=self.calibrate if config.norm == "calibrated" else None,
            max_dilations=config.max_dilations,
            max_rounds=config.max_rounds,
        )

    @property
    def body(self) -> nn.Module:
        """The supernet."""
        return self.plain_detector.backbone.body

    def finish(self) -> Genotype:
        """Choose each group's candidate; write the genotype, its provenance and the report."""
        self._set_temperature()
        if self.trials is not None:
            self._run_trials(self.trials)
        chosen = {name: self._choose(name, conv) for name, conv in self.searched.items()}
        genotype = decode(self.searched, self.architecture, {}, chosen)
        if self.config.calibrate_gains:
            genotype = self._with_gains(genotype)
        metrics = None
        if self.val_data is not None:
            decode_network(self.body, self.searched, chosen)
            metrics = evaluate_detector(self.plain_detector, self.val_data, self.accelerator, self.config)
            self.log(log_record(metrics))
        provenance = {**genotype.provenance, **describe_search(self._facts(), genotype, metrics)}
        genotype = replace(genotype, provenance=provenance)
        if self.accelerator.is_main_process:
            genotype.save(self.folder.path / "genotype.json")
            candidates = {name: conv.candidates for name, conv in self.searched.items()}
            self.warnings = write_report(self.folder.path, genotype, candidates)
        self.accelerator.wait_for_everyone()
        return genotype

    def _run_trials(self, trials: Trials) -> None:
        """A trial counts as a step, with a checkpoint behind it."""
        with StopRequest() as stop, closing(trials.records()) as records:
            for record in records:
                self.step += "trial" in record
                self.log(record)
                if "trial" in record:
                    self.checkpoint()
                    self.stop_if_asked(stop)

    def epoch_loaders(self) -> list[EpochLoader]:
        """While alpha is frozen, its half of the images is not needed."""
        return self.loaders if self._alpha_moves() else self.loaders[:1]

    def begin(self) -> None:
        """Say what the search runs on."""
        data = {self.config.train_split: self.data}
        if self.config.val_split and self.val_data is not None:
            data[self.config.val_split] = self.val_data
        log_data(self.folder, self.accelerator, data)

    def begin_epoch(self) -> None:
        """Remeasure every candidate's statistics: the kernels have drifted."""
        if self.config.norm == "calibrated":
            self.calibrate()

    def calibrate(self) -> None:
        """Measure the candidates' statistics on training images; the same ones on every process and at every time."""
        batches = resized_batches(self.plain_detector, calibration_batches(self.data, self.config))
        count = iter(range(self.config.calibration_images + 1))
        calibrate(self.body, self.searched.values(), batches, lambda: self._draw(FOR_CALIBRATION, next(count)))

    def train_step(self, *batches: list[tuple]) -> dict[str, float]:
        config, alpha_moves = self.config, self._alpha_moves()
        lr = self._lr()
        set_lr(self.weight_optimizer, lr)
        self._set_temperature()
        self.detector.train()
        is_single = config.level == "single"
        record = {"loss": self._backward(batches[0], FOR_WEIGHTS, moves_alpha=alpha_moves and is_single), "lr": lr}
        if alpha_moves and is_single:
            # Before clipping: in fp16 that unscales alpha's gradient too, and alpha's step would do it again.
            self.alpha_optimizer.step()
        self.clip(self.weights, config.clip_grad)
        self.weight_optimizer.step()
        if alpha_moves and not is_single:
            self._zero_grad()
            record["alpha_loss"] = self._backward(batches[1], FOR_ALPHA, moves_alpha=True)
            self.alpha_optimizer.step()
        self._zero_grad()
        return record | self._alpha_record()

    def _alpha_record(self) -> dict[str, float]:
        if self.trials is not None:
            return {}
        for name, conv in self.searched.items():
            if not conv.alpha.isfinite().all():
                raise RunError(f"{self.folder.path}: alpha of {name} is not finite at step {self.step};"
                               " the last checkpoint is kept. A lower alpha_lr may help")  # fmt: skip
        searched = self.searched.values()
        return {"entropy": entropy(searched), "share_changed": share_changed(searched)}

    def end_epoch(self) -> None:
        if self.trials is None:
            self.log(
                {"alpha": alpha_dict(self.searched), "temperature": next(iter(self.searched.values())).temperature}
            )

    def _alpha_moves(self) -> bool:
        return self.trials is None and self.epoch >= self.config.alpha_start

    def _backward(self, batches: list[tuple], purpose: int, moves_alpha: bool) -> float:
        # Both levels go through the same wrapped forward, so that alpha's gradient is averaged over processes too.
        self._draw(purpose)
        return self.backward(batches, self._alpha_terms if moves_alpha else None)["loss"]

    def _draw(self, purpose: int, number: int = 0) -> None:
        """The same pairs on every process."""
        draw_pairs(self.searched.values(), self.seed, self.step, purpose, number)

    def _alpha_terms(self) -> Tensor | float:
        """What the loss holds beside the detector's: the probabilities' entropy and the expected time, as asked for."""
        config = self.config
        terms: Tensor | float = 0.0
        if config.entropy_weight:
            terms += config.entropy_weight * mean_entropy(self.searched.values())
        if config.cost_loss:
            assert self.costs is not None, "SearchConfig refuses this without costs"
            probabilities = {name: conv.log_probabilities().exp() for name, conv in self.searched.items()}
            candidates = {name: conv.candidates for name, conv in self.searched.items()}
            terms += config.cost_loss * self.costs.expected_total(probabilities, candidates)
        return terms

    def _zero_grad(self) -> None:
        self.weight_optimizer.zero_grad()
        self.alpha_optimizer.zero_grad()

    def _lr(self) -> float:
        config = self.config
        per_image = cosine(self.step, self.total_steps, config.lr_per_image, config.final_lr_per_image)
        return per_image * self.images_per_step

    def _set_temperature(self) -> None:
        config = self.config
        first, last = config.temperature, config.final_temperature
        start = config.alpha_start * self.steps_per_epoch
        for conv in self.searched.values():
            conv.temperature = annealed(first, first if last is None else last, self.step, start, self.total_steps)

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        momentum, weight_data = pack_optimizer(self.weight_optimizer)
        moments, alpha_data = pack_optimizer(self.alpha_optimizer)
        tensors = {
            "model": self.plain_detector.state_dict(),
            "weight_optimizer": momentum,
            "alpha_optimizer": moments,
        }
        data = {
            "weight_optimizer": weight_data,
            "alpha_optimizer": alpha_data,
            "scaler": scaler_state(self.accelerator),
            "trials": self.trials.state() if self.trials else None,
        }
        return tensors, data

    def load_state(self, tensors: dict[str, dict[str, Tensor]], data: dict[str, Any]) -> None:
        self.plain_detector.load_state_dict(tensors["model"])
        unpack_optimizer(self.weight_optimizer, tensors["weight_optimizer"], data["weight_optimizer"])
        unpack_optimizer(self.alpha_optimizer, tensors["alpha_optimizer"], data["alpha_optimizer"])
        load_scaler_state(self.accelerator, data["scaler"])
        if self.trials:
            self.trials.load_state(data["trials"])

    def _facts(self) -> SearchFacts:
        return SearchFacts(
            config=self.config,
            command=self.command,
            detector=self.plain_detector.config,
            tag=self.body.pretrained_cfg.get("tag"),
            images=len(self.data),
            images_per_step=self.images_per_step,
            entropy=None if self.trials else entropy(self.searched.values()),
            trials=self.trials.describe() if self.trials else {},
        )

    def _choose(self, name: str, conv: SearchedConv2d) -> Tensor:
        if self.trials is not None:
            return conv.chosen()
        config, cost = self.config, None
        if config.cost_weight and self.costs is not None:
            cost = self.costs.of_groups(name, conv.candidates, conv.num_groups)
        return choose(conv.log_probabilities(), config.max_dilations, cost, config.cost_weight)

    def _with_gains(self, genotype: Genotype) -> Genotype:
        """Gains fit the weights that retraining starts from, not the supernet's."""
        detector = create_search_detector(self.config, self.data, self.accelerator)
        detector.to(self.accelerator.device)
        batches = resized_batches(detector, calibration_batches(self.data, self.config))
        return calibrate_gains(detector.backbone.body, genotype, batches)


def create_weight_optimizer(config: SearchConfig, weights: list[nn.Parameter]) -> torch.optim.SGD:
    """The paper's optimiser of the weights; its learning rate is set at each step."""
    return torch.optim.SGD(weights, lr=config.lr_per_image, momentum=config.momentum, weight_decay=config.weight_decay)


def create_alpha_optimizer(config: SearchConfig, alphas: list[nn.Parameter]) -> torch.optim.Adam:
    """The paper's optimiser of alpha, with the momentum that suits the mode."""
    betas = MODES[config.mode].alpha_betas
    return torch.optim.Adam(alphas, lr=config.alpha_lr, betas=betas, weight_decay=config.alpha_weight_decay)


def split_parameters(detector: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(trainable weights, alpha): no parameter is in both, so that alpha never takes the weights' decay."""
    alphas = [module.alpha for module in detector.modules() if isinstance(module, SearchedConv2d)]
    known = {id(alpha) for alpha in alphas}
    weights = [p for p in detector.parameters() if p.requires_grad and id(p) not in known]
    return weights, alphas
