"""A convolution during search: what it computes for a given alpha, in each of the three modes.

Probabilities, mixing weights and normalisations are factors per output channel, so they are multiplied into kernels:
no candidate's output has to be kept for the backward pass.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...genotype.runs import Dilation
from ...networks.geometry import split_channels
from ...networks.regrouped_conv import RegroupedConv2d


def log_probabilities(alpha: Tensor, temperature: float | Tensor) -> Tensor:
    """log softmax(alpha / temperature) over the last axis, that of the candidates."""
    return (alpha / temperature).log_softmax(-1)


def relative_entropy(log_p: Tensor) -> Tensor:
    """Entropy of probabilities over the last axis, relative to uniform: 1 at the start, 0 when decided.

    Args:
        log_p: their logarithms, (..., candidates).

    Example:
        >>> relative_entropy(log_probabilities(torch.zeros(16, 9), temperature=1.0))  # 16 ones
    """
    return -(log_p.exp() * log_p).sum(-1) / math.log(max(log_p.shape[-1], 2))  # of one candidate: 0 / log 2


class SearchedConv2d(nn.Module):
    """One searched convolution: candidate dilations, kernels, alpha, and each candidate's own statistics.

    Args:
        conv: the pretrained convolution; every candidate starts with its kernel.
        candidates: dilations (height, width); they multiply the convolution's own.
        num_groups: groups of output channels, equal slices in order, each with a row of alpha.
        tied: whether all candidates share one kernel, or each has a copy that is trained on its own.
        eps: of the following batch norm, whose statistics the candidates take over (BN mode `calibrated`: candidate
            g's output is (conv(x, w_g, dilation g) - mean_g) / sqrt(var_g + eps)); None: the batch norm keeps them,
            and one for all candidates.
        name: what error messages call it.

    Attributes:
        alpha: architecture parameters, (groups, candidates).
        temperature: p = softmax(alpha / temperature).
        kernels: the candidates' kernels below one another, (out_channels times 1 or candidates, in_channels /
            cardinality, kh, kw): of four axes, so that any memory format suits it.
        mean, var: (candidates, out_channels), or None.
        norms: the batch norm that gave its statistics away, if one did (in a tuple, so that it is no child of this).

    Shape:
        as the convolution.

    Example:
        >>> conv = MixtureConv2d(nn.Conv2d(8, 8, 3, padding=1), ((1, 1), (1, 3)), num_groups=2, tied=True, eps=None)
        >>> conv.log_probabilities().exp()  # (2, 2), each 1/2
    """

    alpha_betas = (0.9, 0.999)  # of alpha's Adam

    def __init__(
        self,
        conv: nn.Conv2d,
        candidates: tuple[Dilation, ...],
        num_groups: int,
        *,
        tied: bool,
        eps: float | None,
        name: str = "convolution",
    ):
        super().__init__()
        self.candidates, self.num_groups, self.tied, self.eps = candidates, num_groups, tied, eps
        self.out_channels, self.cardinality = conv.out_channels, conv.groups
        self.temperature = 1.0
        self._plans = [_plan(conv, dilation, name) for dilation in candidates]
        copies = 1 if tied else len(candidates)
        self.kernels = nn.Parameter(conv.weight.detach().repeat(copies, 1, 1, 1), conv.weight.requires_grad)
        self.bias = conv.bias
        self.alpha = nn.Parameter(conv.weight.new_zeros(num_groups, len(candidates)))
        shape = (len(candidates), conv.out_channels)
        self.register_buffer("mean", None if eps is None else conv.weight.new_zeros(shape))
        self.register_buffer("var", None if eps is None else conv.weight.new_ones(shape))
        self.moments: list[Moments] | None = None
        self.norms: tuple[nn.Module, ...] = ()

    @property
    def group_size(self) -> int:
        """Output channels of a group."""
        return self.out_channels // self.num_groups

    def log_probabilities(self) -> Tensor:
        """log softmax(alpha / temperature): (groups, candidates)."""
        return log_probabilities(self.alpha, self.temperature)

    def per_channel(self, per_group: Tensor) -> Tensor:
        """(groups, ...) -> (out_channels, ...)."""
        return per_group.repeat_interleave(self.group_size, 0)

    def kernel(self, candidate: int) -> Tensor:
        """A candidate's kernel, not normalised."""
        return self.kernels if self.tied else self.kernels[candidate * self.out_channels :][: self.out_channels]

    def kernel_rows(self, channels: Tensor) -> Tensor:
        """The kernel whose row c is that of candidate channels[c]."""
        return self.kernels if self.tied else self.kernels[channels * self.out_channels + self._rows(channels)]

    def normalised(self, candidate: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Kernel and bias that give a candidate's normalised output, each row times `scale` (out_channels,)."""
        return self._scaled(self.kernel(candidate), self._statistics(candidate), scale)

    def chosen_kernel(self, chosen: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `normalised`, for one candidate per group: (groups,) of indices."""
        channels = self.per_channel(chosen)
        return self._scaled(self.kernel_rows(channels), self._statistics(channels), scale)

    def statistics_rows(self, channels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, (out_channels,), of candidate channels[c] for channel c."""
        rows = channels, self._rows(channels)
        return self.mean[rows], self.var[rows]

    def _rows(self, channels: Tensor) -> Tensor:
        return torch.arange(len(channels), device=channels.device)

    def _statistics(self, which: int | Tensor) -> tuple[Tensor, Tensor] | None:
        if self.eps is None:
            return None
        if isinstance(which, int):
            return self.mean[which], self.var[which]
        return self.statistics_rows(which)

    def _scaled(
        self, kernel: Tensor, statistics: tuple[Tensor, Tensor] | None, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        bias = self.bias
        if statistics is not None and self.eps is not None:
            mean, var = statistics
            factor = (var + self.eps).rsqrt()
            scale = factor if scale is None else scale * factor
            bias = -mean if bias is None else bias - mean
        if scale is None:
            return kernel, bias
        return kernel * scale.view(-1, 1, 1, 1), None if bias is None else bias * scale

    def convolve_all(self, x: Tensor, candidate: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        """All output channels at one candidate's dilation."""
        return self._plans[candidate].convolve(x, weight, bias)

    def convolve_chosen(
        self, x: Tensor, choices: Sequence[Sequence[int]], kernels: Sequence[tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        """The sum of several convolutions in each of which every group runs at one candidate's dilation.

        All that runs at one dilation is one convolution.

        Args:
            x: input.
            choices: for each summand, the candidate of each group.
            kernels: for each summand, weight and bias of all output channels.
        """
        weights, biases = self._by_group([w for w, _ in kernels]), self._by_group([b for _, b in kernels])
        inputs = self._group_inputs(x)
        pieces: dict[tuple[int, int], Tensor] = {}
        for candidate, plan in enumerate(self._plans):
            own = [(i, group) for i, choice in enumerate(choices) for group, c in enumerate(choice) if c == candidate]
            if own:
                weight = _joined([weights[i][group] for i, group in own], 0)
                bias = _joined([biases[i][group] for i, group in own], 0) if biases else None
                own_x = _joined([inputs[group] for _, group in own], 1) if inputs else x
                cardinality = self.cardinality * len(own) // self.num_groups if inputs else 1
                output = plan.convolve_part(own_x, weight, bias, cardinality)
                pieces |= zip(own, split_channels(output, [self.group_size] * len(own)), strict=True)
        groups = range(self.num_groups)
        summands = [_joined([pieces[i, group] for group in groups], 1) for i in range(len(choices))]
        return sum(summands[1:], summands[0])

    def _by_group(self, tensors: Sequence[Tensor | None]) -> list[list[Tensor]]:
        """Each tensor's rows, group by group; nothing for biases that are not there."""
        sizes = [self.group_size] * self.num_groups
        return [split_channels(tensor, sizes, 0) for tensor in tensors if tensor is not None]

    def _group_inputs(self, x: Tensor) -> list[Tensor]:
        """Input channels of each group in a grouped convolution; nothing where all groups read all of them."""
        if self.cardinality == 1:
            return []
        return split_channels(x, [x.shape[1] // self.num_groups] * self.num_groups)

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Take each candidate's statistics on this input, and normalise by what was measured so far."""
        for candidate, moments in enumerate(self.moments or ()):
            moments.update(self.convolve_all(x, candidate, self.kernel(candidate), self.bias))
            self.mean[candidate], self.var[candidate] = moments.mean, moments.var

    def to_plain(self) -> nn.Conv2d:
        """The plain convolution, without a kernel."""
        plain = self._plans[0].to_plain()
        plain.bias = self.bias
        return plain.train(self.training)

    def chosen(self) -> Tensor:
        """Index of each group's candidate as it stands, (groups,): ind_i = argmax_g alpha_i^g, on a tie the first."""
        return self.alpha.argmax(1)

    def extra_repr(self) -> str:
        dilations = ", ".join(str(Dilation(*d)) for d in self.candidates)
        return f"{self.out_channels} channels, {self.num_groups} groups, candidates {dilations}, tied={self.tied}"


class MixtureConv2d(SearchedConv2d):
    """Mixture mode, the paper's: y_i = sum_g softmax_g(alpha_i)^g y_i^g, all candidates at full width.

    Example:
        >>> conv = MixtureConv2d(nn.Conv2d(8, 8, 3, padding=1), ((1, 1), (1, 3)), num_groups=2, tied=False, eps=None)
        >>> conv(torch.rand(1, 8, 32, 32)).mean().backward()  # conv.alpha.grad: (2, 2)
    """

    def forward(self, x: Tensor) -> Tensor:
        self.measure(x)
        probabilities = self.per_channel(self.log_probabilities().exp())
        outputs = (
            self.convolve_all(x, candidate, *self.normalised(candidate, probabilities[:, candidate]))
            for candidate in range(len(self.candidates))
        )
        return functools.reduce(torch.add, outputs)


class SampledConv2d(SearchedConv2d):
    """Sampled mode: each group runs two candidates a, b, drawn in proportion to p = softmax(alpha / temperature).

    Forward: y = q y_a + (1 - q) y_b with q = p_a / (p_a + p_b). (Its expectation is not the mixture.)
    Backward: q's derivative by s = alpha_a - alpha_b, q (1 - q), is replaced by
    w = (1 - p_a)(1 - p_b) / (2 - p_a - p_b). The probability of the pair, drawn without replacement, is
    p_a p_b (2 - p_a - p_b) / ((1 - p_a)(1 - p_b)); so the expectation of alpha's gradient over all pairs is
    sum_b p_a p_b <dL/dy, y_a - y_b>: the mixture's, for a loss that is linear in y.

    Example:
        >>> conv = SampledConv2d(nn.Conv2d(8, 8, 3, padding=1), ((1, 1), (1, 3)), num_groups=2, tied=True, eps=None)
        >>> conv.draw(torch.Generator().manual_seed(0))
        >>> y = conv(torch.rand(1, 8, 32, 32))
    """

    alpha_betas = (0.0, 0.999)  # stale momentum would move candidates that were not drawn
    pair: Tensor | None = None

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Draw each group's two candidates, by Gumbel noise on log p; the same on every process for equal generators.

        Args:
            generator: on the CPU.
        """
        log_p = self.log_probabilities().double().cpu()
        uniform = torch.rand(log_p.shape, dtype=torch.float64, generator=generator).clamp_min(1e-300)
        noisy = log_p - (-uniform.log()).log()
        self.pair = noisy.topk(min(2, log_p.shape[1]), 1).indices

    def mixing_weights(self) -> Tensor:
        """q of each group, (groups,), with the corrected gradient."""
        assert self.pair is not None, "nothing was drawn"
        pair = self.pair.to(self.alpha.device)
        pa, pb = self.log_probabilities().detach().exp().gather(1, pair).unbind(1)
        scores = (self.alpha / self.temperature).gather(1, pair)
        difference = scores[:, 0] - scores[:, 1]
        slope = (1 - pa) * (1 - pb) / (2 - pa - pb)
        return difference.detach().sigmoid() + slope * (difference - difference.detach())

    def forward(self, x: Tensor) -> Tensor:
        self.measure(x)
        if self.pair is None:
            raise RuntimeError("SampledConv2d: draw() was not called before the forward pass")
        if self.pair.shape[1] == 1:
            return self.convolve_all(x, 0, *self.normalised(0))
        q = self.per_channel(self.mixing_weights())
        first, second = self.pair.to(self.alpha.device).unbind(1)
        kernels = [self.chosen_kernel(first, q), self.chosen_kernel(second, 1 - q)]
        return self.convolve_chosen(x, self.pair.T.tolist(), kernels)


class SensitivityConv2d(SearchedConv2d):
    """Sensitivity mode: runs at the current genotype; scores, on request, what each candidate would do to the loss.

    S_{i,g} = mean over images of <dL/dy_i, y_i^g - y_i^current>, the first-order estimate of the change of the loss L
    if group i took candidate g, for normalised outputs y. The candidates' outputs are computed forward only.

    Attributes:
        current: index of each group's candidate, (groups,); part of the state dict.
        scores: sum of the scores of all batches since `begin_scoring`, (groups, candidates), in float64.
        measures_all: whether calibration measures all candidates, or the current ones only, which is all that a pass
            without scoring needs.

    Example:
        >>> conv = SensitivityConv2d(nn.Conv2d(8, 8, 3, padding=1), ((1, 1), (1, 3)), num_groups=2, tied=True, eps=None)
        >>> scores = score(conv, {"conv": conv}, [lambda: conv(torch.rand(1, 8, 32, 32)).square().mean()])
        >>> scores["conv"]  # (2, 2): what each change would do to the loss
    """

    measures_all = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.alpha.requires_grad_(False)  # not what is searched with here
        self.register_buffer("current", torch.zeros(self.num_groups, dtype=torch.long))
        self.scores: Tensor | None = None

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        if self.moments is None or self.measures_all:
            return super().measure(x)
        channels, moments = self.per_channel(self.current), self.moments[0]
        kernel = self.kernel_rows(channels)
        moments.update(self.convolve_chosen(x, [self.current.tolist()], [(kernel, self.bias)]))
        rows = channels, self._rows(channels)
        self.mean[rows], self.var[rows] = moments.mean.to(self.mean), moments.var.to(self.var)

    def begin_scoring(self) -> None:
        """From now on every backward pass adds to `scores`; `end_scoring` stops it."""
        self.scores = torch.zeros(self.num_groups, len(self.candidates), dtype=torch.float64)

    def end_scoring(self) -> Tensor:
        """Stop scoring; returns the scores, (groups, candidates), summed over the batches seen."""
        assert self.scores is not None, "begin_scoring comes first"
        scores, self.scores = self.scores, None
        return scores

    def chosen(self) -> Tensor:
        return self.current

    def forward(self, x: Tensor) -> Tensor:
        self.measure(x)
        y = self.convolve_chosen(x, [self.current.tolist()], [self.chosen_kernel(self.current)])
        if self.scores is not None:
            y = y if y.requires_grad else y.requires_grad_()
            kept, output = x.detach(), y.detach()
            y.register_hook(lambda gradient: self._score(kept, output, gradient))
        return y

    @torch.no_grad()
    def _score(self, x: Tensor, y: Tensor, gradient: Tensor) -> None:
        assert self.scores is not None
        current = self._products(gradient, y)
        for candidate in range(len(self.candidates)):
            weight, bias = self.normalised(candidate)
            # Backward passes run outside of autocast: in the precision that the input has.
            bias = None if bias is None else bias.to(x.dtype)
            other = self.convolve_all(x, candidate, weight.to(x.dtype), bias)
            self.scores[:, candidate] += self._products(gradient, other) - current

    def _products(self, gradient: Tensor, y: Tensor) -> Tensor:
        """<gradient, y> of each group, (groups,)."""
        per_channel = (gradient.float() * y).sum((0, 2, 3), dtype=torch.float64)
        return per_channel.view(self.num_groups, -1).sum(1).cpu()


class Moments:
    """Mean and variance per channel of all that it was shown, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = torch.zeros((), dtype=torch.float64)
        self.sum_of_squares = torch.zeros((), dtype=torch.float64)

    def update(self, y: Tensor) -> None:
        """Add a batch (N, C, H, W)."""
        y = y.double()
        self.count += y.numel() // y.shape[1]
        self.sum = self.sum + y.sum((0, 2, 3))
        self.sum_of_squares = self.sum_of_squares + y.square().sum((0, 2, 3))

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def var(self) -> Tensor:
        return (self.sum_of_squares / self.count - self.mean**2).clamp_min(0)


def _plan(conv: nn.Conv2d, dilation: Dilation, name: str) -> RegroupedConv2d:
    """Stride, padding growth and Conv2dSame are a RegroupedConv2d's business; this one has no kernel of its own."""
    plan = RegroupedConv2d.from_conv(conv, [(conv.out_channels, *dilation)], name=name)
    plan.register_parameter("weight", None)
    plan.register_parameter("bias", None)
    return plan


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)
