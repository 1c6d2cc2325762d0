"""The faces of the packages: every public name is there, and is imported when it is asked for."""

import importlib
import subprocess
import sys

import pytest

FACES = ("nats_zoo", "nats_zoo.detection", "nats_zoo.search")


@pytest.mark.parametrize("face", FACES)
def test_every_name_of_a_face_is_there_and_listed(face):
    module = importlib.import_module(face)
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match=rf"module '{face}' has no attribute 'nonsense'"):
        module.nonsense  # noqa: B018


@pytest.mark.parametrize("face", FACES)
def test_a_star_imports_all_of_them_in_a_fresh_process(face):
    code = f"from {face} import *; import {face} as face; print(*(n in globals() for n in face.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert set(done.stdout.split()) == {"True"}


def test_importing_the_faces_imports_nothing_dear():
    code = "import sys, nats_zoo.detection, nats_zoo.search; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert not {"accelerate", "pycocotools", "matplotlib", "nats_zoo.publishing.publish"} & set(done.stdout.split())
