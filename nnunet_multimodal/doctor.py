"""Checks the installation and says what is wrong with it, each time with the remedy.

Prints versions, devices, nnU-Net's three folders and where nnU-Net's own search finds each trainer and planner of this
package. That search runs in a fresh interpreter, as nnU-Net's commands do, so it tells whether the start-up hook works.
Exit status 0 if nothing is wrong (a warning is not), else 1.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import re
import shlex
import site
import subprocess
import sys
import textwrap
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from nnunet_multimodal import _probe, lookup

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
DISTRIBUTIONS = ("nnunet-multimodal", "nnunetv2", "torch", "torchvision", "dynamic-network-architectures")
HOOK_FILES = ("nnunet_multimodal.pth", "nnunet_multimodal.start")
EXT_TRAINER = "nnUNet_extTrainer"
OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
INSTALL = "pip install . (in the checkout of nnunet_multimodal)"
PROBE_SECONDS = 300  # a first import of torch from a network drive is slow


@dataclass(frozen=True)
class Finding:
    """Something wrong, or worth a warning, and what to do about it."""

    message: str
    remedy: str


@dataclass
class Report:
    """All that the doctor found out, as ``--json`` prints it."""

    versions: dict[str, str | None] = field(default_factory=dict)
    devices: list[dict[str, Any]] = field(default_factory=list)
    folders: list[dict[str, Any]] = field(default_factory=list)
    start_up: dict[str, Any] = field(default_factory=dict)
    ext_trainer: dict[str, Any] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``nnunet-multimodal doctor``."""
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 if nothing is wrong, else 1."""
    report = examine()
    print(json.dumps(asdict(report), indent=2) if args.json else as_text(report))
    return 1 if report.problems else 0


def examine() -> Report:
    """Look at everything."""
    report = Report(versions={"Python": sys.version.split()[0]})
    report.versions.update((name, installed_version(name)) for name in DISTRIBUTIONS)
    for variable in FOLDERS:
        state, problem = check_folder(variable)
        report.folders.append(state)
        report.problems.extend([problem] if problem else [])
    probe, error = run_probe()
    report.devices = [
        *probe.get("devices", []),
        {"device": "cpu", "name": f"{cpu_cores()} cores", "memory_bytes": None},
    ]
    report.start_up = {"ran": probe.get("hook_ran", False), "file": hook_file()}
    report.ext_trainer = {"value": os.environ.get(EXT_TRAINER), "ours": ext_trainer_is_ours()}
    report.classes = [entry for kind in ("trainers", "planners", "preprocessors") for entry in probe.get(kind, [])]
    report.problems.extend(check_nnunet(report, probe))
    if error is not None:
        report.problems.append(error)
    elif report.classes:
        report.problems.extend(check_classes(report, probe))
    report.warnings.extend(check_torch(report, probe))
    return report


def installed_version(distribution: str) -> str | None:
    """The version that the metadata of this environment gives; None where there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_folder(variable: str) -> tuple[dict[str, Any], Finding | None]:
    """The state of the folder that one of nnU-Net's environment variables names, and what is wrong with it."""
    value = os.environ.get(variable)
    state: dict[str, Any] = {"variable": variable, "path": value or None}
    state.update(exists=False, is_folder=False, writable=False)
    if not value:
        default = f'"$HOME/nnUNet/{variable}"'
        remedy = f"mkdir -p {default} && export {variable}={default}"
        return state, Finding(f"{variable} is {'not set' if value is None else 'empty'}; any folder will do", remedy)
    path = Path(value)
    state.update(exists=path.exists(), is_folder=path.is_dir())
    state["writable"] = state["is_folder"] and os.access(path, os.W_OK | os.X_OK)
    quoted = shlex.quote(value)
    if not state["exists"]:
        return state, Finding(f"{variable}={value} does not exist", f"mkdir -p {quoted}")
    if not state["is_folder"]:
        other = shlex.quote(f"{value}_folder")
        return state, Finding(f"{variable}={value} is not a folder", f"mkdir -p {other} && export {variable}={other}")
    if not state["writable"]:
        other = f'"$HOME/nnUNet/{variable}"'
        remedy = f"chmod u+rwx {quoted}, or another folder: mkdir -p {other} && export {variable}={other}"
        return state, Finding(f"{variable}={value} is not writable", remedy)
    return state, None


def run_probe() -> tuple[dict[str, Any], Finding | None]:
    """Run ``_probe`` in a fresh interpreter under this one's options; its report, or what went wrong with it."""
    trainers = list(lookup.CLASSES[lookup.TRAINERS])
    asked = {
        "trainers": [*trainers, f"{trainers[0]}_7epochs"],
        "planners": list(lookup.CLASSES[lookup.PLANNING]),
        "preprocessors": list(lookup.CLASSES[lookup.PREPROCESSING]),
    }
    flags = {"-S": sys.flags.no_site, "-s": sys.flags.no_user_site, "-E": sys.flags.ignore_environment}
    options = [option for option, is_set in flags.items() if is_set]
    source = Path(_probe.__file__).read_text(encoding="utf-8")
    command = [sys.executable, *options, "-c", source, json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        message = f"importing nnU-Net in a fresh interpreter took more than {PROBE_SECONDS} s"
        return {}, Finding(message, "run it once more: the first import is the slowest")
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        message = f"a fresh interpreter could not look for nnU-Net's classes (exit status {done.returncode}): {last}"
        return {}, Finding(message, f"pip install --force-reinstall torch nnunetv2, then {INSTALL}")
    return json.loads(lines[-1]), None


def hook_file() -> str | None:
    """The file in a site folder that calls the start-up hook; None if there is none that Python would read."""
    name = HOOK_FILES[1] if sys.version_info >= (3, 15) else HOOK_FILES[0]
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return next((str(path) for folder in folders if (path := Path(folder, name)).is_file()), None)


def trainers_folder() -> str:
    """The folder of our trainers, as ``nnUNet_extTrainer`` takes it."""
    return next(iter(import_module("nnunet_multimodal.trainers").__path__))


def ext_trainer_is_ours() -> bool:
    """Whether ``nnUNet_extTrainer`` names our trainers, alone or among others."""
    ours = os.path.realpath(trainers_folder())
    folders = os.environ.get(EXT_TRAINER, "").split(os.pathsep)
    return any(os.path.realpath(folder) == ours for folder in folders if folder.strip())


def required_nnunet() -> str | None:
    """The range of nnunetv2 that our metadata requires, such as ``nnunetv2<2.9,>=2.8``."""
    try:
        requirements = metadata.requires("nnunet-multimodal") or []
    except metadata.PackageNotFoundError:
        return None
    return next((line for line in requirements if line.startswith("nnunetv2")), None)


def satisfies(version: str, required: str) -> bool:
    """Whether a release is in a range such as ``nnunetv2<2.9,>=2.8``; ``packaging`` may be missing where we run."""
    clauses = re.findall(r"(>=|<=|==|!=|<|>)\s*([\d.]+)", required.split(";")[0])
    return all(OPERATORS[sign](release(version), release(bound)) for sign, bound in clauses)


def release(version: str) -> tuple[int, ...]:
    """``2.8.1.post1`` -> (2, 8, 1); no zeros at the end, so that 2.8 equals 2.8.0."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_nnunet(report: Report, probe: dict[str, Any]) -> list[Finding]:
    """Is nnU-Net there, and in the version that our hook was written for?"""
    required = required_nnunet()
    remedy = f"pip install '{required or 'nnunetv2'}'"
    version = report.versions["nnunetv2"]
    if probe and probe["nnunetv2"] is None:
        return [Finding(f"nnunetv2 is not installed for {sys.executable}", remedy)]
    if version is None or required is None:  # run from a folder without metadata: nothing to compare
        return []
    if satisfies(version, required):
        return []
    return [Finding(f"nnunetv2 {version} is installed and {required} is needed", remedy)]


def check_classes(report: Report, probe: dict[str, Any]) -> list[Finding]:
    """Did nnU-Net find all of ours, and did the hook run?"""
    findings = []
    if "torch" in probe["errors"]:
        findings.append(
            Finding(f"torch does not import: {probe['errors']['torch']}", "pip install --force-reinstall torch")
        )
    if not report.start_up["ran"]:
        findings.append(missing_hook(report, probe))
    missing = [entry for entry in report.classes if entry["module"] is None]
    for error in dict.fromkeys(entry["error"] for entry in missing if report.start_up["ran"]):
        names = ", ".join(entry["name"] for entry in missing if entry["error"] == error)
        findings.append(Finding(f"nnU-Net does not find {names}: {error}", f"reinstall: {INSTALL}"))
    return findings


def missing_hook(report: Report, probe: dict[str, Any]) -> Finding:
    """The start-up hook did not run: why, what nnU-Net therefore misses, and what helps."""
    if sys.flags.no_site:
        why = "this Python was started with -S"
    elif report.start_up["file"] is None:
        why = f"{HOOK_FILES[0]} is in none of this Python's site-packages (--target or PYTHONPATH?)"
    else:
        why = f"Python did not run {report.start_up['file']}; see what python -v says about it"
    missing = [entry["name"] for entry in report.classes if entry["module"] is None]
    effect = f"nnU-Net does not find {', '.join(missing)}" if missing else "nnU-Net finds our classes all the same"
    remedy = f"install with pip into this environment, without --target: {sys.executable} -m {INSTALL}"
    if report.ext_trainer["ours"]:
        remedy += "; nnUNet_extTrainer already makes the trainers found, planners need that installation"
    else:
        export = f"export nnUNet_extTrainer={shlex.quote(trainers_folder())}"
        remedy += f"; or, for the trainers alone (planners need that installation): {export}"
    if "torchvision" in probe["errors"]:
        remedy += "; nnUNet_extTrainer works only where torchvision imports, see the warning"
    return Finding(f"the start-up hook did not run: {why}; {effect}", remedy)


def check_torch(report: Report, probe: dict[str, Any]) -> list[Finding]:
    """What works, but less than it could."""
    findings = []
    errors = probe.get("errors", {})
    if "torchvision" in errors and "torch" not in errors:
        message = (
            f"torchvision does not import ({errors['torchvision']}): nnU-Net's search then fails at its primus folder "
            "and hides every trainer after it, such as nnUNetTrainer_5epochs (ours are found before)"
        )
        findings.append(Finding(message, f"pip install a torchvision built for torch {report.versions['torch']}"))
    if probe and not any(entry["device"] != "cpu" for entry in report.devices):
        remedy = "train with -device cpu, or install a torch for this machine's GPU and driver"
        findings.append(Finding("torch sees no GPU (no CUDA, no MPS)", remedy))
    return findings


def as_text(report: Report) -> str:
    """The report as the terminal shows it."""
    lines = ["Versions", *rows((name, version or "not installed") for name, version in report.versions.items())]
    lines += ["", "Devices", *rows((entry["device"], device_text(entry)) for entry in report.devices)]
    lines += ["", "nnU-Net's folders", *rows((entry["variable"], folder_text(entry)) for entry in report.folders)]
    start_up = "ran" if report.start_up["ran"] else "did not run"
    hook = f"{start_up} ({report.start_up['file'] or 'no start-up file'})"
    ext_trainer = report.ext_trainer["value"] or "not set"
    ext_trainer += " (our trainers)" if report.ext_trainer["ours"] else ""
    lines += ["", "Found by nnU-Net", *rows([("start-up hook", hook), ("nnUNet_extTrainer", ext_trainer)])]
    for place in dict.fromkeys(map(class_text, report.classes)):
        names = [entry["name"] for entry in report.classes if class_text(entry) == place]
        lines += [f"  {place}", *textwrap.wrap(", ".join(names), 100, initial_indent="    ", subsequent_indent="    ")]
    for title, findings in (("Warning", report.warnings), ("Problem", report.problems)):
        for number, finding in enumerate(findings, 1):
            lines += ["", f"{title} {number}: {finding.message}", f"  Remedy: {finding.remedy}"]
    return "\n".join([*lines, "", f"{len(report.problems)} problem(s), {len(report.warnings)} warning(s)"])


def rows(pairs: Any) -> list[str]:
    """Indented lines of two columns."""
    return [f"  {name:<29} {text}" for name, text in pairs]


def device_text(entry: dict[str, Any]) -> str:
    """One device in words."""
    memory = entry["memory_bytes"]
    return entry["name"] + ("" if memory is None else f", {memory / 2**30:.1f} GiB")


def folder_text(entry: dict[str, Any]) -> str:
    """One of nnU-Net's folders in words."""
    if entry["path"] is None:
        return "not set"
    states = (("exists", "does not exist"), ("is_folder", "not a folder"), ("writable", "not writable"))
    return f"{entry['path']} ({next((text for key, text in states if not entry[key]), 'writable')})"


def class_text(entry: dict[str, Any]) -> str:
    """Where one class was found, in words."""
    if entry["module"] is None:
        return "not found"
    return f"{entry['module']} ({entry['file'] or 'through nnUNet_extTrainer'})"
