"""The supernet: what it computes, what it decodes to, how its gradients and statistics come about.

All in float64. Batch norms have random statistics: with timm's fresh ones several of these tests could not fail.
"""

import copy
import os
import runpy
import socket
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from torch import nn

from nats_zoo import Genotype
from nats_zoo.search import (
    SPACES,
    MixtureConv2d,
    SearchError,
    SearchSpace,
    build_supernet,
    calibrate,
    decode,
    decode_network,
)
from nats_zoo.search.space import searched_convs
from nats_zoo.search.supernet.build import alpha_dict, entropy, share_changed
from nats_zoo.search.supernet.searched_conv import Moments

CHANNELS = (8, 16, 24, 32)  # a slim resnet18
GROUPS = 4
MAPS = {"features_only": True, "out_indices": (1, 2, 3, 4)}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
ON = 1e4  # alpha of a one-hot group: the softmax of the others is exactly zero


def generator(seed):
    return torch.Generator().manual_seed(seed)


def images(number=2, side=160, seed=5):
    return torch.randn(number, 3, side, side, dtype=torch.float64, generator=generator(seed))


@pytest.fixture(scope="module")
def plain(randomise_bn):
    """A slim ResNet-18 as pretrained and not yet frozen: do not change."""
    torch.manual_seed(0)
    body = timm.create_model("resnet18", channels=CHANNELS, zero_init_last=False, **MAPS)
    return randomise_bn(body, generator(1)).double().eval()


def frozen(body):
    return freeze_batch_norm_2d(copy.deepcopy(body))


def supernet(plain, space="C", groups=GROUPS):
    body = frozen(plain)
    return body, build_supernet(body, searched_convs(body, SPACES[space]), groups)


@torch.no_grad()
def drift(mixtures, seed=2):
    """Move every candidate's kernel its own way, as a search does."""
    rng = generator(seed)
    for mixture in mixtures.values():
        noise = torch.randn(mixture.kernels.shape, generator=rng, dtype=torch.float64)
        mixture.kernels += 0.3 * mixture.kernels.std() * noise


@torch.no_grad()
def decide(mixtures, seed=3):
    """One-hot alpha, drawn at random: the chosen candidate of each group, by convolution."""
    rng, chosen = generator(seed), {}
    for name, mixture in mixtures.items():
        chosen[name] = torch.randint(len(mixture.candidates), (mixture.num_groups,), generator=rng)
        mixture.alpha.copy_(ON * F.one_hot(chosen[name], len(mixture.candidates)))
    return chosen


@pytest.fixture(scope="module")
def decided(plain):
    """A searched supernet: drifted kernels, calibrated statistics, one-hot alpha; and which candidates those are."""
    body, mixtures = supernet(plain)
    drift(mixtures)
    calibrate(body, mixtures.values(), [images(seed=8), images(seed=9)])
    return body, mixtures, decide(mixtures)


def outputs(body, x):
    with torch.no_grad():
        return body(x)


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# --- one-hot alpha ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
def test_before_calibration_the_plain_candidate_alone_is_the_plain_network(plain, space):
    body, mixtures = supernet(plain, space)
    for mixture in mixtures.values():
        mixture.alpha.data[:, 0] = ON
    x = images()
    torch.testing.assert_close(outputs(body, x), outputs(plain, x), **CLOSE)
    mixtures["layer3.0.conv2"].alpha.data[1, 1] = 2 * ON  # one group at another dilation: another network
    assert largest_difference(outputs(body, x), outputs(plain, x)) > 1e-3


def test_a_decoded_network_computes_what_its_supernet_does_at_one_hot_alpha(decided):
    body, mixtures, _ = decided
    x = images(seed=6)
    expected = outputs(body, x)
    network, twins = copy.deepcopy((body, mixtures))
    assert decode_network(network, twins) is network
    assert not any(isinstance(module, MixtureConv2d) for module in network.modules())
    torch.testing.assert_close(outputs(network, x), expected, **CLOSE)


def load_by_hand(genotype, plain, mixtures, chosen):
    """timm's own variant of the genotype, each channel with the kernel and statistics of its chosen candidate."""
    network = timm.create_model("nats_resnet18", genotype=genotype, channels=CHANNELS, **MAPS).double().eval()
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    for name, mixture in mixtures.items():
        norm = name.replace("conv2", "bn2")
        for c in range(mixture.out_channels):
            g = chosen[name][c * GROUPS // mixture.out_channels]
            state[f"{name}.weight"][c] = mixture.kernel(g)[c].detach()
            state[f"{norm}.running_mean"][c] = mixture.mean[g, c]
            state[f"{norm}.running_var"][c] = mixture.var[g, c]
    network.load_state_dict(state)
    return network


def test_timm_rebuilds_the_decoded_network_from_its_genotype(decided, plain, tmp_path):
    body, mixtures, chosen = decided
    decode(mixtures, "resnet18", {"method": "mixture"}).save(tmp_path / "genotype.json")
    genotype = Genotype.load(tmp_path / "genotype.json")
    x = images(seed=7)
    expected = outputs(body, x)
    torch.testing.assert_close(outputs(load_by_hand(genotype, plain, mixtures, chosen), x), expected, **CLOSE)

    perturbed = genotype.to_dict()
    perturbed["convs"]["layer3.0.conv2"][0][1] += 1
    twin = load_by_hand(perturbed, plain, mixtures, chosen)
    assert largest_difference(outputs(twin, x), expected) > 1e-3


def test_a_genotype_names_the_chosen_dilation_of_each_channel_in_place(decided):
    _, mixtures, chosen = decided
    genotype = decode(mixtures, "resnet18", {"seed": 3})
    assert genotype.provenance == {"seed": 3}
    assert list(genotype.convs) == list(mixtures)
    for name, runs in genotype.convs.items():
        dilations = [run.dilation for run in runs for _ in range(run.channels)]
        per_group = len(dilations) // GROUPS
        assert dilations == [mixtures[name].candidates[g] for g in chosen[name] for _ in range(per_group)]


def test_frozen_kernels_stay_frozen_when_decoded(plain):
    body, mixtures = supernet(plain, "A")
    mixtures["layer2.0.conv2"].kernels.requires_grad_(False)
    decode_network(body, mixtures)
    trained = {name for name in mixtures if body.get_submodule(name).weight.requires_grad}
    assert trained == set(mixtures) - {"layer2.0.conv2"}


def test_on_a_tie_the_plain_dilation_wins(plain):
    _, mixtures = supernet(plain)
    genotype = decode(mixtures, "resnet18", {})
    assert genotype.share_changed() == share_changed(mixtures.values()) == 0


# --- the mixture ------------------------------------------------------------------------------------------------------

CONVS = {
    "stride 1": lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False),
    "stride 2": lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    "bias": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "cardinality": lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False),
}


def random_mixture(conv, num_groups=4, candidates=((1, 1), (2, 2), (1, 3), (3, 1))):
    """Random alpha, kernels and statistics."""
    mixture = MixtureConv2d(conv.double(), candidates, num_groups, tied=False, eps=1e-5)
    rng = generator(4)
    with torch.no_grad():
        for tensor in (mixture.alpha, mixture.mean, mixture.kernels):
            tensor.normal_(generator=rng)
        mixture.var.uniform_(0.5, 2, generator=rng)
    return mixture


@pytest.mark.parametrize("kind", CONVS)
def test_each_group_is_the_sum_of_its_normalised_candidates_weighed_by_softmax(kind, convolve_per_channel):
    conv = CONVS[kind]()
    mixture = random_mixture(conv)
    x = torch.randn(2, conv.in_channels, 14, 17, dtype=torch.float64, generator=generator(6))
    expected = torch.zeros_like(conv(x))
    per_group = conv.out_channels // 4
    for i in range(4):
        channels = slice(i * per_group, (i + 1) * per_group)
        weights = mixture.alpha[i].exp() / mixture.alpha[i].exp().sum()
        for g, dilation in enumerate(mixture.candidates):
            conv.weight.data = mixture.kernel(g).detach()
            y = convolve_per_channel(conv, x, [[conv.out_channels, *dilation]])[:, channels]
            mean, var = (stat[g, channels].view(-1, 1, 1) for stat in (mixture.mean, mixture.var))
            expected[:, channels] += weights[g] * (y - mean) / (var + 1e-5).sqrt()
    torch.testing.assert_close(mixture(x), expected, **CLOSE)


@pytest.mark.parametrize("kind", CONVS)
def test_gradients_of_alpha_and_kernels_are_the_numerical_ones(kind):
    mixture = random_mixture(CONVS[kind]())
    x = torch.randn(1, mixture.to_plain().in_channels, 5, 6, dtype=torch.float64, generator=generator(6))
    names = ["alpha", "kernels"]
    tensors = [mixture.get_parameter(name) for name in names]

    def function(*values):
        return torch.func.functional_call(mixture, dict(zip(names, values, strict=True)), x).square()

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


def test_alpha_of_every_searched_convolution_gets_the_numerical_gradient(plain):
    body, mixtures = supernet(plain)
    drift(mixtures)
    calibrate(body, mixtures.values(), [images(seed=8)])
    x = images(1, 96)
    torch.manual_seed(0)
    weights = [torch.randn_like(output) for output in outputs(body, x)]

    def loss():
        return sum((w * y).mean() for w, y in zip(weights, body(x), strict=True))

    loss().backward()
    step = 1e-5
    for name, mixture in mixtures.items():
        assert (mixture.alpha.grad != 0).all(), name
        direction = torch.randn_like(mixture.alpha)
        ends = []
        for sign in (1, -1):
            mixture.alpha.data += sign * step * direction
            with torch.no_grad():
                ends.append(loss())
            mixture.alpha.data -= sign * step * direction
        numerical = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((mixture.alpha.grad * direction).sum(), numerical, rtol=1e-4, atol=1e-10)


def test_alpha_is_trained_where_weights_are_frozen(plain):
    body = frozen(plain).requires_grad_(False)
    mixtures = build_supernet(body, searched_convs(body, SPACES["A"]), GROUPS)
    sum(y.square().mean() for y in body(images(1, 96))).backward()
    trained = {name for name, p in body.named_parameters() if p.grad is not None}
    assert trained == {f"{name}.alpha" for name in mixtures}


def test_candidates_start_as_copies_of_the_pretrained_kernel_that_share_no_memory(plain):
    body, mixtures = supernet(plain)
    for name, mixture in mixtures.items():
        assert body.get_submodule(name) is mixture
        kernels = mixture.kernels.chunk(len(mixture.candidates))
        assert all(torch.equal(kernel, plain.get_submodule(name).weight) for kernel in kernels)
        assert mixture.alpha.shape == (GROUPS, len(mixture.candidates))
        assert not mixture.alpha.any()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_unknown_convolution_is_refused(plain):
    with pytest.raises(SearchError, match=r"layer9\.0\.conv2: the network has no convolution"):
        build_supernet(frozen(plain), {"layer9.0.conv2": ((1, 1), (2, 2))}, GROUPS)


def test_a_split_that_does_not_fit_is_refused_and_leaves_the_network_as_it_was(plain):
    body = frozen(plain)
    before = body.state_dict()
    with pytest.raises(SearchError, match=r"layer2\.0\.conv2: its 16 output channels can not be split into 5 groups"):
        build_supernet(body, searched_convs(body, SPACES["C"]), 5)
    assert body.state_dict().keys() == before.keys()


def test_a_convolution_without_batch_norm_behind_it_is_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    with pytest.raises(SearchError, match=r"^0: no batch norm takes its output"):
        build_supernet(net.eval(), {"0": ((1, 1), (2, 2)), "2": ((1, 1), (2, 2))}, 2)


# --- statistics -------------------------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4),
    channels=st.integers(1, 4),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-10, 10),
    seed=st.integers(0, 10_000),
)
def test_moments_are_those_of_all_batches_together(shapes, channels, scale, offset, seed):
    rng = generator(seed)
    batches = [scale * (torch.randn(n, channels, h, w, generator=rng) + offset) for n, h, w in shapes]
    moments = Moments()
    for batch in batches:
        moments.update(batch)
    together = torch.cat([batch.double().transpose(0, 1).flatten(1) for batch in batches], 1)
    square = scale**2 * (1 + offset**2)
    torch.testing.assert_close(moments.mean, together.mean(1), rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(moments.var, together.var(1, unbiased=False), rtol=1e-9, atol=1e-12 * square)


def watch_inputs(mixtures):
    """What comes to each mixture from now on, by name."""
    seen = {name: [] for name in mixtures}
    for name, mixture in mixtures.items():
        mixture.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
    return seen


def normalised(mixture, g, inputs):
    """Candidate g's outputs as the mixture sees them: (channels, positions of all inputs)."""
    y = torch.cat(
        [mixture.convolve_all(x, g, mixture.kernel(g), None).detach().transpose(0, 1).flatten(1) for x in inputs], 1
    )
    return (y - mixture.mean[g, :, None]) / mixture.var[g, :, None].sqrt()


def assert_standard(values):
    torch.testing.assert_close(values.mean(1), torch.zeros(len(values), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        values.var(1, unbiased=False), torch.ones(len(values), dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_calibration_gives_every_candidate_its_own_statistics(plain):
    body, mixtures = supernet(plain)
    drift(mixtures)
    batch = images(3, 96)
    calibrate(body, mixtures.values(), [batch])
    seen = watch_inputs(mixtures)
    outputs(body, batch)
    for name, mixture in mixtures.items():
        for g in range(len(mixture.candidates)):
            assert_standard(normalised(mixture, g, seen[name]))
        assert len({tuple(row.tolist()) for row in mixture.var}) == len(mixture.candidates)


def test_calibration_counts_every_batch_also_of_other_sizes(plain):
    body, mixtures = supernet(plain)
    batches = [images(3, 96, seed=1), images(1, 128, seed=2), images(2, 64, seed=3)]
    calibrate(body, mixtures.values(), iter(batches))
    name, mixture = next(iter(mixtures.items()))  # nothing in front of the first one depends on statistics
    seen = watch_inputs({name: mixture})
    for batch in batches:
        outputs(body, batch)
    for g in range(len(mixture.candidates)):
        assert_standard(normalised(mixture, g, seen[name]))


def test_calibration_measures_anew_and_changes_nothing_but_statistics(plain):
    body, mixtures = supernet(plain)
    calibrate(body, mixtures.values(), [images(seed=8)])
    first = {key: tensor.clone() for key, tensor in body.state_dict().items()}
    modes = [module.training for module in body.train().modules()]
    calibrate(body, mixtures.values(), [images(seed=9)])
    second = body.state_dict()
    statistics = {f"{name}.{stat}" for name in mixtures for stat in ("mean", "var")}
    assert {key for key in second if not torch.equal(first[key], second[key])} == statistics
    assert [module.training for module in body.modules()] == modes
    calibrate(body, mixtures.values(), [images(seed=8)])
    assert all(torch.equal(first[key], tensor) for key, tensor in body.state_dict().items())


# --- how far it is decided --------------------------------------------------------------------------------------------


def test_entropy_is_one_at_the_start_and_zero_when_decided(plain):
    _, mixtures = supernet(plain)
    assert entropy(mixtures.values()) == pytest.approx(1)
    decide(mixtures)
    assert entropy(mixtures.values()) == pytest.approx(0, abs=1e-9)


def test_entropy_of_half_decided_groups(plain):
    _, mixtures = supernet(plain, "A")
    some = {"layer2.0.conv2": mixtures["layer2.0.conv2"]}
    some["layer2.0.conv2"].alpha.data[:2, 0] = ON  # two of four groups
    assert entropy(some.values()) == pytest.approx(0.5)


def test_a_stage_with_one_candidate_has_nothing_left_to_decide(plain):
    body = frozen(plain)
    space = SearchSpace("late", {3: ((1, 1),), 4: ((1, 1), (2, 2))})
    mixtures = build_supernet(body, searched_convs(body, space), GROUPS)
    assert entropy(mixtures.values()) == pytest.approx(0.5)  # two of four convolutions are open


def test_share_changed_counts_channels(plain):
    _, mixtures = supernet(plain)
    mixtures["layer4.0.conv2"].alpha.data[:3, 2] = 1  # 24 of its 32 channels; all searched ones: 144
    assert share_changed(mixtures.values()) == pytest.approx(24 / 144)
    assert decode(mixtures, "resnet18", {}).share_changed() == pytest.approx(24 / 144)


def test_alpha_dict_is_alpha(plain):
    _, mixtures = supernet(plain)
    mixtures["layer4.0.conv2"].alpha.data[1, 2] = 0.5
    logged = alpha_dict(mixtures)
    assert list(logged) == list(mixtures)
    assert torch.equal(torch.tensor(logged["layer4.0.conv2"]), mixtures["layer4.0.conv2"].alpha.float())


# --- several processes ------------------------------------------------------------------------------------------------

GRADIENTS = """
import sys

import timm
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d

from nats_zoo.search import SPACES, build_supernet
from nats_zoo.search.space import searched_convs


class PerImageLoss(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        return sum(features.square().mean((1, 2, 3)) for features in self.body(images)).mean()


def build(weights):
    body = timm.create_model("resnet18", channels=(8, 16, 24, 32), features_only=True, out_indices=(1, 2, 3, 4))
    body.double().load_state_dict(load_file(weights))
    body = freeze_batch_norm_2d(body)
    mixtures = build_supernet(body, searched_convs(body, SPACES["C"]), 4)
    for seed, mixture in enumerate(mixtures.values()):
        mixture.alpha.data.normal_(generator=torch.Generator().manual_seed(seed))
    return PerImageLoss(body)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def main(weights, images, output):
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = accelerator.prepare(build(weights))
    mine = load_file(images)["images"].chunk(2)[accelerator.process_index]
    accelerator.backward(model(mine))
    save_file(gradients(accelerator.unwrap_model(model)), f"{output}/{accelerator.process_index}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def run_two(script, arguments, timeout=300):
    """Run a script as two CPU processes of one job, as a launcher would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
        return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(plain, tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    batch = images(4, 64)
    save_file({"images": batch}, tmp_path / "images.safetensors")
    arguments = [tmp_path / "weights.safetensors", tmp_path / "images.safetensors", tmp_path]
    for code, errors in run_two(script, arguments):
        assert code == 0, errors

    alone = runpy.run_path(str(script))
    model = alone["build"](arguments[0])
    model(batch).backward()
    expected = alone["gradients"](model)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    for rank in (0, 1):
        torch.testing.assert_close(load_file(tmp_path / f"{rank}.safetensors"), expected, **CLOSE)
