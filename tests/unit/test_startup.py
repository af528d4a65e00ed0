"""The start-up hook: it costs nothing, waits for nnU-Net, breaks nothing, and has a substitute where it cannot run."""

import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import nnunetv2.utilities
import pytest

import nnunet_multimodal
from nnunet_multimodal import _startup, doctor

START_UP = Path(__file__).parents[2] / "startup"
OUR_PARENT = str(Path(nnunet_multimodal.__file__).parents[1])


def run_python(*arguments, path=(), **variables):
    """A fresh interpreter; ``path`` is its PYTHONPATH, whose folders Python does not search for ``.pth`` files."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "nnUNet"))}
    environment.update(variables, PYTHONPATH=os.pathsep.join(path))
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done


def printed(code, *options, **keywords):
    return json.loads(run_python(*options, "-c", code, **keywords).stdout.splitlines()[-1])


def fake_lookup_module(name=_startup.TARGET):
    module = types.ModuleType(name)

    def recursive_find_python_class(folder, class_name, current_module, base_folder=None, verbose=False):
        """Stock search."""
        return ("stock", folder, class_name, current_module, base_folder, verbose)

    module.recursive_find_python_class = recursive_find_python_class
    return module


@pytest.fixture
def no_hook(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not _startup.LookupFinder])
    monkeypatch.delitem(sys.modules, _startup.TARGET, raising=False)


def test_package_import_needs_only_the_standard_library_and_little_of_it():
    code = (
        "import sys, json; before = set(sys.modules); import nnunet_multimodal._startup; "
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    # -I -S: as bare as Python starts; os is there from site in every normal start
    code = f"import os, sys; sys.path.insert(0, {OUR_PARENT!r}); {code}"
    assert printed(code, "-I", "-S") == ["nnunet_multimodal", "nnunet_multimodal._startup"]


def test_hook_ran_when_this_interpreter_started():
    code = "import sys, json; print(json.dumps([name for name in sys.modules if name.startswith('nnunet')]))"
    assert sorted(printed(code, "-I")) == ["nnunet_multimodal", "nnunet_multimodal._startup"]


def test_start_of_python_prints_nothing():
    done = run_python("-I", "-c", "")
    assert (done.stdout, done.stderr) == ("", "")


def test_entry_point_of_pep_829_is_found_and_idempotent(monkeypatch, no_hook):
    monkeypatch.syspath_prepend(str(START_UP))
    lines = (START_UP / "nnunet_multimodal.start").read_text(encoding="utf-8").split()
    assert len(lines) == 1
    entry_point = pkgutil.resolve_name(lines[0])
    for _ in range(3):
        entry_point()
    assert sys.meta_path.count(_startup.LookupFinder) == 1
    assert sys.meta_path[0] is _startup.LookupFinder


def test_entry_point_is_silent_where_the_package_is_gone():
    """As after an editable installation whose checkout was deleted."""
    line = (START_UP / "nnunet_multimodal.start").read_text(encoding="utf-8").strip()
    code = f"import pkgutil, sys; sys.path.insert(0, {str(START_UP)!r}); pkgutil.resolve_name({line!r})()"
    done = run_python("-I", "-S", "-c", code)
    assert (done.stdout, done.stderr) == ("", "")


def test_pth_line_is_silent_where_the_package_is_gone():
    lines = (START_UP / "nnunet_multimodal.pth").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1  # one line that starts with "import" is what Python executes
    assert lines[0].startswith("import ")
    done = run_python("-I", "-S", "-c", lines[0])
    assert (done.stdout, done.stderr) == ("", "")


def test_install_waits_for_nnunet_and_wraps_it_once(no_hook, monkeypatch):
    monkeypatch.setattr(nnunetv2.utilities, "find_class_by_name", None, raising=False)  # restores it afterwards
    _startup.install()
    module = importlib.import_module(_startup.TARGET)
    wrapper = module.recursive_find_python_class
    assert hasattr(wrapper, "__wrapped__")
    assert not hasattr(wrapper.__wrapped__, "__wrapped__")
    _startup.install()
    assert module.recursive_find_python_class is wrapper


def test_finder_answers_for_no_other_module():
    assert _startup.LookupFinder.find_spec("json") is None
    assert _startup.LookupFinder.find_spec("nnunetv2.utilities") is None


def test_nnunet_imported_before_us_is_wrapped_in_every_module_that_holds_the_search(no_hook, monkeypatch):
    target, holder, other = fake_lookup_module(), fake_lookup_module("nnunetv2.holder"), types.ModuleType("unrelated")
    stock = target.recursive_find_python_class
    holder.recursive_find_python_class = other.recursive_find_python_class = stock
    for module in (target, holder, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _startup.install()
    assert target.recursive_find_python_class.__wrapped__ is stock
    assert holder.recursive_find_python_class is target.recursive_find_python_class
    assert other.recursive_find_python_class is stock  # not nnU-Net's: not ours to change
    assert _startup.LookupFinder in sys.meta_path  # the other module of nnU-Net may still come


def test_wrapper_hands_every_argument_on_and_looks_like_the_stock_search():
    module = fake_lookup_module()
    stock = module.recursive_find_python_class
    _startup.wrap(module)
    search = module.recursive_find_python_class
    assert (search.__name__, search.__doc__) == (stock.__name__, stock.__doc__)
    assert search("folder", "Name", "package", "base", verbose=True) == stock("folder", "Name", "package", "base", True)
    assert search(folder="f", class_name="N", current_module=None) == stock("f", "N", None)


def test_nnunet_without_the_function_still_imports():
    """A later nnU-Net that was forced in beside us: ours are not found then, but nnU-Net works."""
    module = types.ModuleType(_startup.TARGET)
    _startup.wrap(module)
    assert not hasattr(module, "recursive_find_python_class")


SEARCH = """
import contextlib, json, sys
hook = "nnunet_multimodal" in sys.modules
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
# where torchvision does not import, nnU-Net's scan of its own folder ends at primus and never gets to ours
sys.modules["nnunetv2.training.nnUNetTrainer.primus.primus_trainers"] = type(sys)("primus_trainers")
with contextlib.redirect_stdout(sys.stderr):
    found = [recursive_find_trainer_class_by_name(name) for name in ("CRNPTrainer_5epochs", "CRNPTrainer")]
print(json.dumps([hook, [[cls.__name__, cls.__mro__[-2].__name__] for cls in found]]))
"""


def test_ext_trainer_finds_our_trainers_where_the_hook_did_not_run():
    path = [
        OUR_PARENT,
        *(str(Path(importlib.util.find_spec(name).origin).parents[1]) for name in ("nnunetv2", "torch")),
    ]
    hook, found = printed(SEARCH, "-S", path=path, nnUNet_extTrainer=doctor.trainers_folder())
    assert not hook
    assert found == [["CRNPTrainer_5epochs", "nnUNetTrainer"], ["CRNPTrainer", "nnUNetTrainer"]]
