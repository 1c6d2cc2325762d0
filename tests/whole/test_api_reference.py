"""The API reference: every public name has a docstring, and pdoc makes pages of them."""

import inspect
import subprocess
import sys

import pytest

import nats_zoo
from nats_zoo import detection, search
from tests.support.paths import ROOT

PACKAGES = (nats_zoo, detection, search)
PUBLIC = [(package, name) for package in PACKAGES for name in package.__all__ if name != "__version__"]


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC])
def test_what_is_public_is_documented(package, name):
    public = getattr(package, name)
    assert inspect.getdoc(public), f"{package.__name__}.{name}"


def test_the_reference_is_built(tmp_path):
    pytest.importorskip("pdoc")
    script = ROOT / "scripts" / "api_reference.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    for package, name in PUBLIC:
        page, public = tmp_path / (package.__name__.replace(".", "/") + ".html"), getattr(package, name)
        module = tmp_path / (public.__name__.replace(".", "/") + ".html") if inspect.ismodule(public) else None
        assert f'id="{name}"' in page.read_text(encoding="utf-8") if module is None else module.exists()
