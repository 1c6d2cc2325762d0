"""Commands that search: for a genotype, for controls of it, and for what dilations cost."""

from typing import Any

from .command import Command, print_once, print_with_file, typed_command


def _search(config: type, options: dict[str, Any]) -> None:
    from ..search import Searcher
    from ..search.report.page import PAGE, REPORT

    searcher = Searcher(config(**options), command=typed_command())
    print_once(f"{searcher.run()}\n")
    folder = searcher.folder.path
    print_once(f"genotype: {folder / 'genotype.json'}\nreport: {folder / REPORT / PAGE}")
    for warning in searcher.warnings:
        print_once(f"warning: {warning}")


COMMANDS = {
    "profile": Command(
        "what each dilation costs on this machine, for search --costs",
        "search.choosing.profile:profile_network",
        print_with_file("costs"),
    ),
    "search": Command("find a genotype for a detector's backbone", "search.config:SearchConfig", _search),
    "control": Command(
        "a genotype that was not searched, to compare with", "search.controls:make_control", print_with_file("genotype")
    ),
}
