"""Which versions of Python, nnU-Net and PyTorch work with this package: one fresh environment after the other.

    nice -n 10 python benchmarks/install_matrix_versions.py [--out DIR] [--python PATH ...] [--uv PATH] [--resume]

Each row makes a virtual environment, installs what is committed with plain ``pip install '.[test]'`` and the row's
pins, calls ``nnunet-multimodal doctor`` and runs the tests that touch where nnU-Net, PyTorch and Python come in: the
start-up hook, nnU-Net's search for classes, every backbone with every head, one training with nnU-Net's commands. The
tests see the installed package, not the checkout. Pythons are looked for on the path and among those of pyenv. A
nnU-Net outside our requirement is put in afterwards with ``--no-deps``: such a row says what would happen and need not
pass. The environment (up to 7 GB) is deleted after its row, and the row written to ``install_matrix_versions.json``;
``--resume`` keeps the rows there and runs again what did not pass. With ``--uv`` the same is installed by uv, which
unpacks a package once for all rows (up to 20 GB until the end); a row says what installed it. Exit status 1 if a row
fails that has to pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _common import ROOT, parser, write
from tqdm import tqdm

NAME = "install_matrix_versions"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OLDEST_NNUNET, BEFORE_OURS = "2.8.0", "2.7.0"
OLDEST_TORCH = "2.3.1"  # what we require; nnU-Net 2.8 allows BEFORE_TORCH
BEFORE_TORCH = "2.1.2"
SHOWN = ("nnunetv2", "torch", "torchvision", "numpy", "captum")
TESTS = (
    "tests/unit/test_startup.py",
    "tests/unit/test_lookup.py",
    "tests/unit/test_network.py",
    "tests/integration/test_early_fusion_trainer.py::TestEarlyFusionTrainer::test_one_modality_is_enough",
)
SECONDS = 1800  # of a step
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}


@dataclass(frozen=True)
class Case:
    """What is asked for; None is what pip chooses, which is the newest that fits."""

    python: str
    nnunetv2: str | None = None
    torch: str | None = None
    pins: tuple[str, ...] = ()
    outside: bool = False

    @property
    def name(self) -> str:
        """The row in words."""
        asked = [f"Python {self.python}", f"nnunetv2 {self.nnunetv2 or 'newest'}", f"torch {self.torch or 'newest'}"]
        return ", ".join((*asked, *self.pins)) + (", outside our requirement" if self.outside else "")

    def requirements(self) -> list[str]:
        """The pins of the first installation."""
        nnunet = [] if self.outside or self.nnunetv2 is None else [f"nnunetv2=={self.nnunetv2}"]
        return [*nnunet, *([f"torch=={self.torch}"] if self.torch else []), *self.pins]


def cases(released: list[str]) -> Iterator[Case]:
    """All rows: every Python with the newest, both nnU-Nets, older PyTorch, what lies outside our requirement."""
    for python in PYTHONS:
        yield Case(python)
    yield Case("3.10", OLDEST_NNUNET, OLDEST_TORCH, ("numpy<2",))
    yield Case("3.12", OLDEST_NNUNET)
    yield Case("3.11", torch="2.5.1")
    yield Case("3.10", OLDEST_NNUNET, BEFORE_TORCH, ("numpy<2",), outside=True)
    for version in (BEFORE_OURS, *released[:1]):
        if not version.startswith("2.8."):
            yield Case("3.12", version, outside=True)


def released_nnunets() -> list[str]:
    """Versions 2.x of nnU-Net that pip can install here, newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "nnunetv2"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("Available versions:"))
    return [version for version in line.split(":", 1)[1].replace(" ", "").split(",") if version.startswith("2.")]


def interpreters(given: list[str]) -> dict[str, str]:
    """The wanted Pythons that are there, by minor version; what was given goes first."""
    on_path = [path for path in (shutil.which(f"python{version}") for version in PYTHONS) if path]
    pyenv = map(str, sorted(Path.home().glob(".pyenv/versions/*/bin/python")))
    found: dict[str, str] = {}
    for path in (*given, *on_path, *pyenv):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True)  # pyenv has names that do not run
        if done.returncode == 0 and done.stdout.strip() in PYTHONS:
            found.setdefault(done.stdout.strip(), path)
    return found


class Workspace:
    """What the rows share: what is committed, a folder that has only the tests, pip's cache."""

    def __init__(self, root: Path, uv: Path | None) -> None:
        self.root, self.checkout, self.tests = root, root / "checkout", root / "tests"
        self.uv = uv
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
        self.checkout.mkdir()
        subprocess.run(["tar", "-x", "-C", self.checkout], input=archive, check=True)
        head = ["git", "rev-parse", "--short", "HEAD"]
        self.commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for name in ("tests", "startup"):
            shutil.copytree(self.checkout / name, self.tests / name)
        shutil.copy(self.checkout / "pyproject.toml", self.tests)

    def run(self, command: list[Any], cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside this environment's influence."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "nnUNet"))}
        caches = {f"{installer}_CACHE_DIR": str(self.root / installer.lower()) for installer in ("PIP", "UV")}
        environment = kept | QUIET | caches | variables
        return subprocess.run(
            list(map(str, command)), cwd=cwd or self.root, env=environment, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip

    def install(self, python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``pip install`` into an environment, or uv's."""
        if self.uv is None:
            return self.run([python, "-m", "pip", "install", "-q", *arguments])
        return self.run([self.uv, "pip", "install", "-q", "--python", python, *arguments])

    def tail(self, done: subprocess.CompletedProcess[str]) -> str:
        """The last that a command said, without folders and addresses of this machine."""
        lines = [line for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if "WARNING" not in line]
        text = "\n".join(lines[-12:]).replace(str(self.root), "").replace(str(Path.home()), "~")
        return re.sub(r"(https?|file)://\S+", "(address)", text)[-1200:]


def run_row(workspace: Workspace, case: Case, interpreter: str) -> dict[str, Any]:
    """One row: install, doctor, tests; the first that fails ends it."""
    row: dict[str, Any] = {"asked": asdict(case), "commit": workspace.commit}
    folder = workspace.root / "row"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        subprocess.run([interpreter, "-m", "venv", folder / "venv"], check=True)
        for name, step in (("install", install), ("doctor", doctor), ("tests", run_tests)):
            started = time.perf_counter()
            row[name] = step(workspace, case, folder, row)
            row[name]["seconds"] = round(time.perf_counter() - started)
            if not row[name]["passed"]:
                return row | {"outcome": f"{name} failed"}
        return row | {"outcome": "passed"}
    except subprocess.TimeoutExpired as error:
        return row | {"outcome": f"took longer than {error.timeout:.0f} s"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(workspace: Workspace, case: Case, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """``pip install '.[test]'`` with pins; adds the versions that came, and what installed them, to the row."""
    python = folder / "venv" / "bin" / "python"
    done = workspace.install(python, f"{workspace.checkout}[test]", *case.requirements())
    if done.returncode == 0 and case.outside:
        done = workspace.install(python, "--no-deps", f"nnunetv2=={case.nnunetv2}")
    listed = json.loads(workspace.run([python, "-m", "pip", "list", "--format", "json"]).stdout)
    versions = {package["name"].lower(): package["version"] for package in listed}
    version = workspace.run([python, "-c", "import platform; print(platform.python_version())"]).stdout.strip()
    row["versions"] = {"python": version} | {name: versions[name] for name in SHOWN if name in versions}
    uv = workspace.run([workspace.uv, "--version"]).stdout.split()[1] if workspace.uv else None
    row["installer"] = f"uv {uv}" if uv else f"pip {versions['pip']}"
    return {"passed": True} if done.returncode == 0 else {"passed": False, "error": workspace.tail(done)}


def doctor(workspace: Workspace, case: Case, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The doctor's verdict, with the problems it names."""
    folders = {name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for path in folders.values():
        Path(path).mkdir()
    done = workspace.run([folder / "venv" / "bin" / "nnunet-multimodal", "doctor", "--json"], **folders)
    try:
        problems = [problem["message"] for problem in json.loads(done.stdout)["problems"]]
    except ValueError:
        return {"passed": False, "error": workspace.tail(done)}
    home = str(workspace.root)
    verdict = {"passed": done.returncode == 0, "problems": [problem.replace(home, "") for problem in problems]}
    return verdict | ({"passed": True} if case.outside else {})  # it is to complain of the version; the tests say more


def run_tests(workspace: Workspace, case: Case, folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """How many tests passed, and which did not."""
    report = folder / "report.xml"
    options = ["-n", "0", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = workspace.run([folder / "venv" / "bin" / "python", "-m", "pytest", *options, *TESTS], cwd=workspace.tests)
    if not report.exists():
        return {"passed": False, "error": workspace.tail(done)}
    tests = list(ElementTree.parse(report).iter("testcase"))
    failures = {
        f"{test.get('classname', '').removeprefix('tests.')}::{test.get('name')}": _said(bad)
        for test in tests for bad in (*test.findall("failure"), *test.findall("error"))
    }  # fmt: skip
    home, names = str(workspace.root), list(failures)
    shown = {name: failures[name].replace(home, "")[:300] for name in names[:5]}
    figures = {"passed": done.returncode == 0, "tests": len(tests), "failed": len(failures)}
    return figures | ({"failures": shown} if failures else {})


def _said(failure: ElementTree.Element) -> str:
    """The message of a failed test; of one that could not be read, its last line."""
    message, lines = (failure.get("message") or "").strip(), (failure.text or "").strip().splitlines()
    return lines[-1] if message == "collection failure" and lines else message


def describe(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    asked = Case(**{**row["asked"], "pins": tuple(row["asked"]["pins"])})
    versions = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
    seconds = sum(row.get(step, {}).get("seconds", 0) for step in ("install", "doctor", "tests"))
    detail = {
        name: row[name] for name in ("install", "doctor", "tests") if not row.get(name, {"passed": True})["passed"]
    }
    return f"{asked.name}: {row['outcome']} after {seconds} s ({versions}) {detail or ''}"


def kept(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows that there are."""
    file = args.out / f"{NAME}.json"
    if not args.resume or not file.exists():
        return []
    return json.loads(file.read_text())["rows"]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--python", nargs="*", default=[], help="Pythons to use beside those that are found")
    options.add_argument("--resume", action="store_true", help=f"keep the rows of {NAME}.json; run what did not pass")
    options.add_argument("--uv", type=Path, metavar="PATH", help="install with this uv instead of each Python's pip")
    options.add_argument("--rows", type=int, nargs="+", help="numbers of the rows to run, from 1; all if not given")
    args = options.parse_args()
    pythons, released = interpreters(args.python), released_nnunets()
    wanted = list(cases(released))
    order = [json.loads(json.dumps(asdict(case))) for case in wanted]
    rows = [row for row in kept(args) if row["asked"] in order]
    named = argparse.Namespace(out=args.out, device=args.device, resume=args.resume)
    with tempfile.TemporaryDirectory(prefix="install_matrix_") as folder:
        workspace = Workspace(Path(folder).resolve(), args.uv and args.uv.resolve())
        chosen = [number - 1 for number in args.rows or range(1, len(wanted) + 1)]
        for case, asked in tqdm([(wanted[index], order[index]) for index in chosen], unit="row"):
            if any(row["asked"] == asked and row["outcome"] == "passed" for row in rows):
                continue
            if case.python in pythons:
                row = run_row(workspace, case, pythons[case.python])
            else:
                row = {"asked": asked, "outcome": "not tried: this Python is not there"}
            row = json.loads(json.dumps(row))
            tqdm.write(describe(row))
            rows = [row, *(other for other in rows if other["asked"] != asked)]
            rows.sort(key=lambda own: order.index(own["asked"]))
            write(named, NAME, {"tests": TESTS, "newest_nnunetv2": released[0], "rows": rows})
    bad = [row for row in rows if not row["asked"]["outside"] and "failed" in row["outcome"]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
