"""Commands about the zoo itself: what it holds, and pictures of it."""

from typing import Any

from .command import Command


def list_zoo(json: bool = False) -> None:
    """List the variants, their default genotypes with how those were found, and the tags of pretrained weights.

    Args:
        json: print JSON instead of a table, with the whole provenance.
    """
    from ..models.zoo import list_zoo as list_entries
    from ..models.zoo import zoo_table

    entries = list_entries()
    if json:
        from json import dumps

        print(dumps([entry.to_dict() for entry in entries], indent=2))
    else:
        print(zoo_table(entries))


def show(genotype: str, output: str | None = None) -> None:
    """Print a genotype's table and provenance, and draw its chart.

    Args:
        genotype: a published genotype's name, a variant's (its default), a genotype file, the folder of a search or
            model, or the Hub repository of a genotype or model (org/name, org/name@revision).
        output: PNG file for the chart; default: the genotype's name in the working folder.
    """
    from ..base.files import output_file
    from ..folders.find_genotype import find_genotype
    from ..genotype.provenance import provenance_lines
    from ..models.named import genotype_name

    found = find_genotype(genotype)
    target = output_file(output or f"{genotype_name(found)}.png")
    from ..pictures.genotype_chart import genotype_chart

    print(found, "", *provenance_lines(found.provenance), sep="\n")
    genotype_chart(found, target)
    print(f"\nchart: {target}")


def erf(
    model: str,
    genotype: str | None = None,
    weights: str | None = None,
    size: int = 768,
    stage: int = 4,
    output: str = "erf.png",
    seed: int = 0,
) -> None:
    """Draw the effective receptive fields of the plain and of the NATS network side by side, with their radii.

    Args:
        model: a variant or timm network, or the folder or Hub repository (org/name, org/name@revision) of a backbone
            or detector.
        genotype: a genotype's name or file; default: the model's own, else the architecture's default one.
        weights: random, pretrained (timm's, downloaded unless cached), or the folder, safetensors file or Hub
            repository of a model; default: the model folder's own, for a name random ones.
        size: height and width of the input, in pixels.
        stage: whose map's centre neuron is looked at; stage 4 has stride 32.
        output: PNG file.
        seed: of random weights.
    """
    import torch

    from ..base.files import output_file
    from ..models.named import RANDOM, find_nats_network, genotype_name
    from ..networks.erf import erf_radius, plain_and_nats_fields

    target = output_file(output)
    named = find_nats_network(model, genotype)
    weights = weights or (str(named.folder) if named.folder else RANDOM)
    index = named.stage_index(stage)
    torch.manual_seed(seed)
    network = named.create(weights, features_only=True, out_indices=(index,))
    fields = plain_and_nats_fields(network, size, named.in_channels)
    from ..pictures.erf_picture import erf_picture

    used = f"{named.weights_name(weights)}{f', seed {seed}' if weights == RANDOM else ''}"
    title = f"Effective receptive field of {named.architecture}, stage {stage}, in {size} x {size} pixels"
    assert named.genotype is not None, "find_nats_network sees to it"
    name = f"NATS: {genotype_name(named.genotype)}"
    erf_picture(*fields, target, f"{title}\nweights: {used}", name)
    print(f"{title}; weights: {used}")
    for label, field in zip(("plain", name), fields, strict=True):
        print(f"{label}: {erf_radius(field)}")
    print(f"picture: {target}")


def transfer(genotype: str, architecture: str, output: str | None = None) -> None:
    """Take a genotype over to another network, by stage, relative depth and relative channel position.

    Args:
        genotype: whatever nats show takes.
        architecture: timm name of the network that is to have it.
        output: JSON file; default: the network's name with the suffix _transfer.json, in the working folder.
    """
    from ..folders.find_genotype import find_genotype

    save_genotype(find_genotype(genotype).transfer(architecture), output or f"{architecture}_transfer.json")


def merge(genotype: str, max_dilations: int, output: str | None = None) -> None:
    """Find the nearest genotype with at most so many different dilations in each convolution.

    Args:
        genotype: whatever nats show takes.
        max_dilations: in a convolution; those that move its channels least are kept.
        output: JSON file; default: the genotype's name with the number, in the working folder.
    """
    from ..folders.find_genotype import find_genotype
    from ..models.named import genotype_name

    found = find_genotype(genotype)
    save_genotype(found.merge(max_dilations), output or f"{genotype_name(found)}_k{max_dilations}.json")


def save_genotype(genotype: Any, output: str) -> None:
    """Write a genotype's file and print its table."""
    from ..base.files import output_file

    target = output_file(output)
    genotype.save(target)
    print(f"{genotype}\n\ngenotype: {target}")


MOST = "of a convolution; those that move its channels least are kept."
COMMANDS = {
    "list": Command("the variants, their genotypes and their pretrained weights", "cli.zoo:list_zoo"),
    "show": Command("a genotype's table, provenance and chart", "cli.zoo:show"),
    "erf": Command("receptive fields of the plain and the NATS network, side by side", "cli.zoo:erf"),
    "transfer": Command("a genotype on another network", "cli.zoo:transfer"),
    "merge": Command(
        "a genotype with fewer dilations",
        "cli.zoo:merge",
        skip=("max_dilations",),
        more={"-k --max_dilations": {"type": int, "required": True, "help": MOST}},  # for the short -k
    ),
}
