"""The doctor names what is wrong and what to do; its exit status says whether anything is."""

import argparse
import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from nnunet_multimodal import doctor, lookup
from nnunet_multimodal.cli import main

NAMES = [name for classes in lookup.CLASSES.values() for name in classes]
# the folders that hold us, nnU-Net and its dependencies, wherever each is installed
IMPORT_PATH = [str(Path(find_spec(name).origin).parents[1]) for name in ("nnunet_multimodal", "nnunetv2", "torch")]


def found(name):
    return {"name": name, "module": "somewhere", "file": "somewhere.py", "error": None}


def healthy():
    return {
        "hook_ran": True,
        "nnunetv2": "nnunetv2",
        "errors": {},
        "devices": [{"device": "cuda:0", "name": "A GPU", "memory_bytes": 8 * 2**30}],
        "trainers": [found(name) for name in lookup.CLASSES[lookup.TRAINERS]],
        "planners": [found(name) for name in lookup.CLASSES[lookup.PLANNING]],
        "preprocessors": [found(name) for name in lookup.CLASSES[lookup.PREPROCESSING]],
    }


def unhooked(probe):
    """The probe of an environment whose Python did not run the hook."""
    probe["hook_ran"] = False
    for entry in [*probe["trainers"], *probe["planners"], *probe["preprocessors"]]:
        entry.update(module=None, file=None, error="not found")


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """nnU-Net's three folders, as they should be."""
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    for variable in doctor.FOLDERS:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


@pytest.fixture
def probe(monkeypatch):
    """What the fresh interpreter reports; a test changes it."""
    report = healthy()
    monkeypatch.setattr(doctor, "run_probe", lambda: (report, None))
    return report


def doctor_says(capsys, *options):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    status = doctor.run(parser.parse_args(options))
    return status, capsys.readouterr().out


def test_nothing_wrong_gives_status_0(folders, probe, capsys):
    status, text = doctor_says(capsys)
    assert status == 0
    assert text.rstrip().endswith("0 problem(s), 0 warning(s)")
    assert "A GPU, 8.0 GiB" in text
    for name in [*NAMES, *doctor.FOLDERS, *doctor.DISTRIBUTIONS]:
        assert name in text


def test_json_holds_the_same(folders, probe, capsys):
    status, text = doctor_says(capsys, "--json")
    report = json.loads(text)
    assert status == 0
    assert report["problems"] == []
    assert report["versions"]["nnunetv2"] == metadata.version("nnunetv2")
    assert [entry["variable"] for entry in report["folders"]] == list(doctor.FOLDERS)
    assert {entry["name"] for entry in report["classes"]} == set(NAMES)


@pytest.mark.parametrize("variable", doctor.FOLDERS)
@pytest.mark.parametrize("value", [None, ""])
def test_unset_variable_is_a_problem_with_its_export_line(variable, value, folders, probe, monkeypatch, capsys):
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    status, text = doctor_says(capsys)
    assert status == 1
    assert "1 problem(s)" in text
    assert f'Remedy: mkdir -p "$HOME/nnUNet/{variable}" && export {variable}="$HOME/nnUNet/{variable}"' in text


def test_missing_folder_is_a_problem_with_its_mkdir_line(folders, probe, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(folders / "with space"))
    status, text = doctor_says(capsys)
    assert status == 1
    assert f"mkdir -p '{folders / 'with space'}'" in text


def test_file_in_place_of_a_folder_is_a_problem(folders, probe, monkeypatch, capsys):
    (folders / "file").touch()
    monkeypatch.setenv("nnUNet_results", str(folders / "file"))
    status, text = doctor_says(capsys)
    assert status == 1
    assert "is not a folder" in text
    assert "export nnUNet_results=" in text


def test_unwritable_folder_is_a_problem(folders, probe, monkeypatch, capsys):
    unwritable = folders / "nnUNet_preprocessed"
    # root may write anywhere, so chmod would prove nothing where the tests run as root
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: Path(path) != unwritable)
    status, text = doctor_says(capsys)
    assert status == 1
    assert f"nnUNet_preprocessed={unwritable} is not writable" in text
    assert f"chmod u+rwx {unwritable}" in text
    assert "1 problem(s)" in text


def test_missing_nnunet_is_a_problem(folders, probe, capsys):
    probe["nnunetv2"] = None
    del probe["trainers"], probe["planners"], probe["preprocessors"]
    status, text = doctor_says(capsys)
    assert status == 1
    assert "nnunetv2 is not installed" in text
    assert f"pip install '{doctor.required_nnunet()}'" in text


@pytest.mark.parametrize(("version", "problems"), [("2.7.9", 1), ("2.8.0", 0), ("2.8.99", 0), ("2.9.0", 1), ("3", 1)])
def test_nnunet_version_is_checked_against_the_package_metadata(version, problems, folders, probe, monkeypatch, capsys):
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: ["tqdm", "nnunetv2<2.9,>=2.8", "pytest; extra == 't'"]
    )
    installed = {**dict.fromkeys(doctor.DISTRIBUTIONS, "1.0"), "nnunetv2": version}
    monkeypatch.setattr(doctor, "installed_version", installed.get)
    status, text = doctor_says(capsys)
    assert status == problems
    assert (f"nnunetv2 {version} is installed and nnunetv2<2.9,>=2.8 is needed" in text) == bool(problems)


@pytest.mark.parametrize("version", ["2", "2.7.9", "2.8", "2.8.0", "2.8.1", "2.8.10", "2.9", "2.9.1", "3"])
@pytest.mark.parametrize("required", ["nnunetv2<2.9,>=2.8", "nnunetv2>2.8.0", "nnunetv2!=2.8.1,<=2.9", "nnunetv2==2.8"])
def test_range_is_read_as_packaging_reads_it(version, required):
    packaging = pytest.importorskip("packaging.requirements")
    assert doctor.satisfies(version, required) == packaging.Requirement(required).specifier.contains(version)


def test_our_metadata_requires_a_range_of_nnunet():
    required = doctor.required_nnunet()
    assert required.startswith("nnunetv2")
    assert doctor.satisfies("2.8.1", required)
    assert not doctor.satisfies("2.7", required)
    assert not doctor.satisfies("2.9", required)
    assert doctor.release("2.8.1.post1+local") == (2, 8, 1)


def test_hook_that_did_not_run_is_a_problem_with_both_remedies(folders, probe, monkeypatch, capsys):
    unhooked(probe)
    monkeypatch.setattr(doctor, "hook_file", lambda: None)
    status, text = doctor_says(capsys)
    assert status == 1
    assert "1 problem(s)" in text  # one cause, one problem
    assert "nnunet_multimodal.pth is in none of this Python's site-packages" in text
    assert "pip install ." in text
    assert f"export nnUNet_extTrainer={doctor.trainers_folder()}" in text


def test_ext_trainer_that_is_set_already_is_not_proposed_again(folders, probe, monkeypatch, capsys):
    unhooked(probe)
    monkeypatch.setenv("nnUNet_extTrainer", os.pathsep.join([str(folders), doctor.trainers_folder() + os.sep]))
    status, text = doctor_says(capsys)
    assert status == 1
    assert "export nnUNet_extTrainer" not in text
    assert "planners need that installation" in text


def test_class_that_fails_to_import_is_a_problem_with_its_error(folders, probe, capsys):
    probe["planners"][0].update(module=None, file=None, error="ImportError: no such thing")
    status, text = doctor_says(capsys)
    assert status == 1
    assert f"nnU-Net does not find {probe['planners'][0]['name']}: ImportError: no such thing" in text


def test_broken_torchvision_and_missing_gpu_are_warnings_only(folders, probe, capsys):
    probe["errors"]["torchvision"] = "RuntimeError: operator torchvision::nms does not exist"
    probe["devices"] = []
    status, text = doctor_says(capsys)
    assert status == 0
    assert "0 problem(s), 2 warning(s)" in text
    assert "nnUNetTrainer_5epochs" in text
    assert "-device cpu" in text


def test_fresh_interpreter_that_fails_is_a_problem(folders, monkeypatch, capsys):
    monkeypatch.setattr(doctor.sys, "executable", "false")
    monkeypatch.setattr(doctor, "hook_file", lambda: None)
    status, text = doctor_says(capsys)
    assert status == 1
    assert "could not look for nnU-Net's classes (exit status 1): no output" in text


def test_installed_plugin_is_found_by_the_real_probe(documented, folders, capsys):
    statuses = []
    documented.run(lambda command: statuses.append(main([*command[1:], "--json"])))
    report = json.loads(capsys.readouterr().out)
    assert (statuses, report["problems"]) == ([0], [])
    assert report["start_up"]["ran"]
    expected = {name: module for classes in lookup.CLASSES.values() for name, module in classes.items()}
    seen = {entry["name"]: entry["module"] for entry in report["classes"]}
    suffixed = {name for name in seen if name.endswith("_7epochs")}
    assert {name: module for name, module in seen.items() if name not in suffixed} == expected
    assert len(suffixed) == 1
    assert all(Path(entry["file"]).is_file() for entry in report["classes"])


def test_python_without_site_packages_is_told_why_nothing_is_found(folders):
    """``-S`` is a Python that does not read ``.pth`` files, as with ``pip install --target``."""
    code = "import sys; from nnunet_multimodal import doctor; sys.exit(doctor.run(type('', (), {'json': True})))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORT_PATH)}
    command = [sys.executable, "-S", "-c", code]
    # not in the checkout, which "-c" would put in front of an installed package
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folders, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert not report["start_up"]["ran"]
    assert len(report["problems"]) == 1
    assert "started with -S" in report["problems"][0]["message"]
    assert "nnUNetPlannerCPU" in report["problems"][0]["message"]
    assert f"export nnUNet_extTrainer={doctor.trainers_folder()}" in report["problems"][0]["remedy"]
