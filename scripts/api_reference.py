#!/usr/bin/env python3
"""Build the API reference: python scripts/api_reference.py FOLDER

pdoc sees what lies in a package, not what it imports on first use: every public name is asked for before.
"""

import importlib
import inspect
import sys
from pathlib import Path

import pdoc

PACKAGES = ("nats_zoo", "nats_zoo.detection", "nats_zoo.search")

if __name__ == "__main__":
    pages = list(PACKAGES)
    for package in map(importlib.import_module, PACKAGES):
        vars(package).update({name: getattr(package, name) for name in package.__all__})
        pages += [
            value.__name__ for name, value in inspect.getmembers(package, inspect.ismodule) if name in package.__all__
        ]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(*pages, output_directory=Path(sys.argv[1]))
