"""Genotypes alone, in folders and on the Hub: `genotype.json`, a card and a chart; no weights.

`timm.create_model("nats_resnet50", genotype="hf-hub:org/name")` runs one after `import nats_zoo`.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm

from ..base.errors import NatsError
from ..base.files import read_json, write_text
from ..base.names import CARD_NAME, CHART_NAME, GENOTYPE_NAME, LOG_NAME, NATS_ANY, RUN_NAME, VARIANT_PREFIX
from ..base.run_facts import RunFacts
from ..base.run_log import Record, read_log
from ..folders.find_genotype import is_genotype_folder
from ..folders.model_folder import leads_out, write_folder_atomically
from ..genotype.genotype import Genotype
from ..genotype.provenance import SEARCH_METHODS
from ..pictures import save_chart
from .card import NOT_STATED, Licences, card_metadata, render_card

GENOTYPE_FILES = (GENOTYPE_NAME, CARD_NAME, CHART_NAME)


def save_genotype_folder(genotype: Genotype, folder: str | os.PathLike, run: RunFacts | None = None) -> Path:
    """Write a genotype with its card and chart, whole or not at all.

    Args:
        genotype: what is published.
        folder: is created; an empty one or one that holds nothing but such files is replaced.
        run: the search that found it, for the card.

    Returns:
        The folder.

    Raises:
        NatsError: another folder in the way, or it can not be written.

    Example:
        >>> folder = save_genotype_folder(Genotype.load("mine.json"), "mine")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'genotype.json', 'genotype.png']
    """

    def is_own(old: Path) -> bool:
        return is_genotype_folder(old) and {path.name for path in old.iterdir()} <= set(GENOTYPE_FILES)

    def write(new: Path) -> None:
        genotype.save(new / GENOTYPE_NAME)
        save_chart(genotype, new / CHART_NAME)
        write_text(new / CARD_NAME, genotype_card(genotype, run))

    return write_folder_atomically(folder, write, is_own)


def genotype_files(source: Path, scratch: Path) -> dict[str, Path]:
    """Collect the files of a genotype's repository, by name.

    Args:
        source: a folder that `save_genotype_folder` wrote, that of a search, or a genotype file.
        scratch: where card and chart are written if they are not there.

    Raises:
        NatsError: a genotype that can not be read.

    Example:
        >>> sorted(genotype_files(Path("mine.json"), Path(tempfile.mkdtemp())))
        ['README.md', 'genotype.json', 'genotype.png']
    """
    if source.is_dir():
        files = {name: source / name for name in GENOTYPE_FILES if (source / name).is_file()}
        # The genotype is parsed below; of a card or chart that is a link to elsewhere a new one is made.
        files = {name: path for name, path in files.items() if name == GENOTYPE_NAME or not leads_out(path)}
    else:
        files = {GENOTYPE_NAME: source}
    genotype = Genotype.load(files[GENOTYPE_NAME])
    if CHART_NAME not in files:
        files[CHART_NAME] = scratch / CHART_NAME
        save_chart(genotype, files[CHART_NAME])
    if CARD_NAME not in files:
        files[CARD_NAME] = scratch / CARD_NAME
        write_text(files[CARD_NAME], genotype_card(genotype, _search_facts(source, genotype)))
    return files


def _search_facts(folder: Path, genotype: Genotype) -> RunFacts | None:
    """Read what a search's folder says of it; the genotype's provenance says the rest."""
    if not (folder / RUN_NAME).is_file():
        return None
    settings = read_json(folder / RUN_NAME)
    if not isinstance(settings, dict):
        raise NatsError(f"{folder / RUN_NAME}: expected an object with the run's options")
    log = read_log(folder / LOG_NAME) if (folder / LOG_NAME).is_file() else []
    command = genotype.provenance.get("command")
    return RunFacts(
        command=command if isinstance(command, str) else None,
        settings=settings,
        data={split: _data_line(counts) for split, counts in _logged(log, "data").items()},
        hardware=_logged(log, "hardware"),
    )


def _logged(log: Iterable[Record], key: str) -> dict[str, Any]:
    """Find what the first record with a key holds, if that is an object."""
    found = next((record[key] for record in log if key in record), None)
    return found if isinstance(found, dict) else {}


def _data_line(counts: Any) -> str:
    counts = counts if isinstance(counts, dict) else {}
    return ", ".join(f"{counts[key]} {key}" for key in ("images", "boxes") if key in counts) or NOT_STATED


def genotype_card(genotype: Genotype, run: RunFacts | None = None) -> str:
    """Render the card of a genotype's repository.

    Args:
        genotype: what it is about.
        run: the search that found it.

    Example:
        >>> print(genotype_card(Genotype.load("mine.json")))
    """
    architecture, variant = genotype.architecture, VARIANT_PREFIX + genotype.architecture
    licences = Licences(weights="none: a genotype holds no weights")
    tags = ["timm", architecture, "neural-architecture-search", "dilated-convolution"]
    return render_card(
        "genotype",
        card_metadata("genotype", architecture, licences, library_name="nats-zoo", tags=tags),
        genotype,
        licences,
        architecture=architecture,
        creation=f'"{variant}"' if timm.is_model(variant) else f'"{NATS_ANY}", architecture="{architecture}"',
        is_searched=genotype.provenance.get("method") in SEARCH_METHODS,
        run=run,
        task="Search",
    )
