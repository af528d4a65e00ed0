"""Installs this package and nnU-Net in every way that users do and checks each time what nnU-Net then finds.

    python benchmarks/install_matrix.py [--out DIR] [--base PYTHON] [--python PATH ...] [--jobs N] [--resume]

Each row is a fresh virtual environment. nnU-Net's dependencies are shared: one environment holds them (``--base``, or
one made here, which downloads gigabytes), and the others see all of it but nnU-Net through a ``.pth`` file; nnU-Net and
this package go in with ``--no-deps``. What is checked runs in fresh interpreters. On the other Pythons (``--python``)
the heavy dependencies are not installed: a stub of nnU-Net with its real ``find_class_by_name.py`` shows that the
start-up hook works there. Writes ``install_matrix.json``; exit status 1 if a row fails. ``--resume`` keeps
the rows that passed there and runs the others.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from _common import parser, write
from nnunetv2.utilities import find_class_by_name
from tqdm import tqdm

from nnunet_multimodal import lookup

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).resolve().parent / "install_matrix_checks"
NNUNET, OLDER_NNUNET = "2.8.1", "2.8.0"
SOURCES = ("nnunet_multimodal", "trainers", "plans", "startup", "pyproject.toml", "README.md", "LICENSE")
HIDDEN = ("nnunet", "_nnunet", "__editable__", "pip", "__pycache__")  # what an environment does not see of the base
STUB = "stub with nnU-Net's find_class_by_name.py"
WITH_US, STOCK_ONLY, NO_HOOK = "all found", "stock only", "trainers by nnUNet_extTrainer"


@dataclass(frozen=True)
class Case:
    """One row: steps that are carried out in a fresh environment, and what nnU-Net is to find after them."""

    installer: str
    ours: str
    nnunet: str
    steps: tuple[str, ...]
    expect: str = WITH_US
    place: str = "venv"
    doctor: bool = False

    @property
    def name(self) -> str:
        """The row in words."""
        return f"{self.installer}, ours {self.ours}, nnunetv2 {self.nnunet}, {self.place}: {' > '.join(self.steps)}"

    def row(self, python: str) -> dict:
        """The row's head."""
        head = {"installer": self.installer, "ours": self.ours, "nnunetv2": self.nnunet, "place": self.place}
        return head | {"steps": list(self.steps), "expect": self.expect, "python": python}


def cases() -> Iterator[Case]:
    """All rows that run on this Python."""
    for installer, ours, nnunet in product(("pip", "uv"), ("normal", "editable"), ("normal", "editable")):
        yield Case(installer, ours, nnunet, ("nnunetv2", "ours"), doctor=ours == nnunet)
        yield Case(installer, ours, nnunet, ("ours", "nnunetv2"))
    for installer, ours in product(("pip", "uv"), ("normal", "editable")):
        yield Case(installer, ours, "normal", ("nnunetv2", "ours", "nnunetv2 again", "ours again"))
        yield Case(installer, ours, "normal", ("older nnunetv2", "ours", "nnunetv2 again"))
        for nnunet in ("normal", "editable") if ours == "normal" else ("normal",):
            yield Case(installer, ours, nnunet, ("nnunetv2", "ours", "ours removed"), STOCK_ONLY)
    yield Case("pip", "normal", "editable", ("nnunetv2 from a wheel", "ours", "nnunetv2 again"))
    yield Case("pip", "editable", "normal", ("nnunetv2", "ours", "checkout deleted"), STOCK_ONLY)
    yield Case("pip", "normal", "normal", ("nnunetv2", "ours"), place="user site")
    yield Case("pip", "normal", "normal", ("nnunetv2", "ours with --target"), NO_HOOK, doctor=True)


@dataclass
class Workspace:
    """What all rows share: tools, dependencies, wheels, sources. ``deps`` is a folder of links into the base."""

    root: Path
    tools: Path = field(init=False)
    deps: Path = field(init=False)

    def __post_init__(self) -> None:
        self.tools = self.root / "tools" / "bin"
        self.deps = self.root / "deps"

    def prepare(self, base: str | None) -> None:
        """Make all of it."""
        subprocess.run([sys.executable, "-m", "venv", self.root / "tools"], check=True)
        self.run([self.tools / "python", "-m", "pip", "install", "-q", "--upgrade", "pip", "uv"])
        if base is None:
            subprocess.run([sys.executable, "-m", "venv", self.root / "base"], check=True)
            base = str(self.root / "base" / "bin" / "python")
            self.run([base, "-m", "pip", "install", "-q", f"nnunetv2=={NNUNET}"])
        self.link_dependencies(base)
        for name in SOURCES:
            source, target = CHECKOUT / name, self.root / "checkout" / name
            target.parent.mkdir(exist_ok=True)
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        pip = [self.tools / "python", "-m", "pip"]
        for version in (NNUNET, OLDER_NNUNET):
            self.run([*pip, "wheel", "-q", "--no-deps", "-w", self.root / "wheels", f"nnunetv2=={version}"])
        sources = ["--no-binary", "nnunetv2", "--no-deps", f"nnunetv2=={NNUNET}"]
        self.run([*pip, "download", "-q", "-d", self.root / "sdist", *sources])
        shutil.unpack_archive(next((self.root / "sdist").glob("*.tar.gz")), self.root / "sdist")

    def link_dependencies(self, base: str) -> None:
        """Fill ``deps`` with links to all that the base has, except nnU-Net, us and pip."""
        code = "import sysconfig; p = sysconfig.get_paths(); print(p['purelib'], p['platlib'], sep='\\n')"
        folders = self.run([base, "-c", code]).stdout.split("\n")
        self.deps.mkdir()
        for folder in dict.fromkeys(line for line in folders if line):
            for entry in Path(folder).iterdir():
                if not entry.name.startswith(HIDDEN) and entry.suffix != ".pth":
                    (self.deps / entry.name).symlink_to(entry)

    def wheel(self, version: str) -> Path:
        """nnU-Net's wheel."""
        return next((self.root / "wheels").glob(f"nnunetv2-{version}-*.whl"))

    def run(self, command: list, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command outside this environment's influence; raises a RuntimeError with its last lines if it fails."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "nnUNet"))}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "UV_CACHE_DIR": str(self.root / "uv"), **variables}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=self.root)
        if done.returncode != 0:
            tail = (done.stderr.strip() or done.stdout.strip() or "no output")[-400:]
            raise RuntimeError(f"{Path(str(command[0])).name} ended with status {done.returncode}: {tail}")
        return done


class Environment:
    """A fresh environment; every method is a step that :class:`Case` names."""

    def __init__(self, workspace: Workspace, case: Case, python: str = sys.executable, link: bool = True):
        self.workspace, self.case = workspace, case
        self.folder = Path(tempfile.mkdtemp(dir=workspace.root, prefix="row_"))
        self.python = self.folder / "venv" / "bin" / "python"
        self.variables: dict[str, str] = {}
        if case.place == "user site":
            self.python = Path(getattr(sys, "_base_executable", sys.executable))
            self.variables["PYTHONUSERBASE"] = str(self.folder / "venv")
        else:
            workspace.run([python, "-m", "venv", "--without-pip", self.folder / "venv"])
        code = "import site, sysconfig; print(sysconfig.get_path('purelib'), site.getusersitepackages(), sep='\\n')"
        paths = self.run("-c", code).stdout.split("\n")
        self.site_packages = Path(paths[1] if case.place == "user site" else paths[0])
        self.site_packages.mkdir(parents=True, exist_ok=True)
        if link:
            (self.site_packages / "shared_dependencies.pth").write_text(f"{workspace.deps}\n")
        self.before_us: set[str] = set()

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python."""
        return self.workspace.run([self.python, *arguments], **self.variables, **variables)

    def starts_silently(self) -> bool:
        """Whether the start of Python prints nothing."""
        done = self.run("-c", "")
        return not done.stdout and not done.stderr

    def step(self, name: str) -> None:
        """Carry out one step of a case."""
        workspace, editable = self.workspace, self.case.nnunet == "editable"
        checkout = self.folder / "checkout"
        again = ["--force-reinstall"] if name.endswith("again") else []
        if name == "older nnunetv2":
            self.install(workspace.wheel(OLDER_NNUNET))
        elif name == "nnunetv2 from a wheel" or (name.startswith("nnunetv2") and not editable):
            self.install(*again, workspace.wheel(NNUNET))
        elif name.startswith("nnunetv2"):
            clone = self.folder / "clone"
            shutil.copytree(workspace.root / "sdist" / f"nnunetv2-{NNUNET}", clone, dirs_exist_ok=True)
            self.install(*again, "-e", clone)
        elif name == "ours removed":
            self.uninstall()
        elif name == "checkout deleted":
            shutil.rmtree(checkout)
        elif name.startswith("ours"):
            shutil.copytree(workspace.root / "checkout", checkout, dirs_exist_ok=True)
            self.before_us = self.before_us or self.files()
            target: list = ["--target", self.target] if name.endswith("--target") else []
            self.install(*again, *target, *(["-e"] if self.case.ours == "editable" else []), checkout)
        else:
            raise ValueError(f"unknown step {name!r} in {self.case.name}")

    @property
    def target(self) -> Path:
        """The folder of ``pip install --target``."""
        return self.folder / "target"

    def install(self, *arguments: str | Path) -> None:
        """Install with the case's installer and without dependencies."""
        if self.case.installer == "uv":
            arguments = tuple("--reinstall" if part == "--force-reinstall" else part for part in arguments)
            command: list = [self.workspace.tools / "uv", "pip", "install", "--python", self.python]
        else:
            command = [self.workspace.tools / "python", "-m", "pip", "--python", self.python, "install"]
            command += ["--user", "--break-system-packages"] if self.case.place == "user site" else []
        self.workspace.run([*command, "--no-deps", *arguments], **self.variables)

    def uninstall(self) -> None:
        """Uninstall this package with the case's installer."""
        if self.case.installer == "uv":
            command: list = [self.workspace.tools / "uv", "pip", "uninstall", "--python", self.python]
        else:
            command = [self.workspace.tools / "python", "-m", "pip", "--python", self.python, "uninstall", "-y"]
        self.workspace.run([*command, "nnunet-multimodal"], **self.variables)

    def files(self) -> set[str]:
        """Every file and folder of the environment, except the lock that uv keeps in each that it changes."""
        root = self.folder / "venv"
        return {str(path.relative_to(root)) for path in root.rglob("*")} - {".lock"}


def check(environment: Environment) -> tuple[dict[str, bool], dict]:
    """What nnU-Net finds in the environment, as named facts, and the versions that were installed."""
    case, variables = environment.case, {}
    if case.expect == NO_HOOK:
        trainers = environment.target / "nnunet_multimodal" / "trainers"
        variables = {"PYTHONPATH": str(environment.target), "nnUNet_extTrainer": str(trainers)}
    ours = lookup.CLASSES if case.expect != STOCK_ONLY else {}
    trainers, planners = list(ours.get(lookup.TRAINERS, {})), list(ours.get(lookup.PLANNING, {}))
    asked = json.dumps({"trainers": [*trainers, *(f"{name}_7epochs" for name in trainers)], "planners": planners})
    seen = json.loads(environment.run(SCRIPTS / "find_classes.py", asked, **variables).stdout.splitlines()[-1])
    found = {name: module is not None for name, module in {**seen["trainers"], **seen["planners"]}.items()}
    facts = {"start silent": environment.starts_silently(), "stock found": seen["stock"]}
    if case.expect == STOCK_ONLY:
        facts["hook gone"] = not seen["hook"]
        facts["worker"] = seen["worker"]["stock"]
        if "ours removed" in case.steps:
            facts["nothing left"] = environment.files() == environment.before_us
        return facts, seen["versions"]
    with_planners = case.expect == WITH_US
    facts["hook ran as expected"] = seen["hook"] == with_planners
    facts["trainers"] = all(found[name] for name in trainers)
    facts["length suffix"] = all(found[f"{name}_7epochs"] for name in trainers)
    facts["planners" if with_planners else "planners need the hook"] = all(
        found[name] == with_planners for name in planners
    )
    facts["worker"] = seen["worker"]["trainer"] and seen["worker"]["planner"] == with_planners
    if case.doctor:
        facts.update(check_doctor(environment, variables))
    return facts, seen["versions"]


def check_doctor(environment: Environment, variables: dict[str, str]) -> dict[str, bool]:
    """Does the doctor agree? With ``--target`` it is to name the hook as the one problem, and both remedies."""
    folders = {name: str(environment.folder) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    working = environment.case.expect == WITH_US
    variables = {key: value for key, value in variables.items() if key != "nnUNet_extTrainer"}
    output = environment.run(SCRIPTS / "call_doctor.py", **variables, **folders)
    status, report = json.loads(output.stdout.splitlines()[-1])
    messages = [finding["message"] + finding["remedy"] for finding in report["problems"]]
    if working:
        return {"doctor": status == 0 and not messages}
    said = len(messages) == 1 and "export nnUNet_extTrainer=" in messages[0] and "pip install" in messages[0]
    return {"doctor": status == 1 and said}


def run_case(workspace: Workspace, case: Case, python: str) -> dict:
    """One row of the result; an installer or interpreter that fails is a row that fails."""
    row = case.row(version_of(python))
    started = time.perf_counter()
    try:
        environment = Environment(workspace, case, python, link=case.nnunet != STUB)
        if case.nnunet == STUB:
            row["facts"] = check_stub(environment)
        else:
            for step in case.steps:
                environment.step(step)
            row["facts"], row["versions"] = check(environment)
        row["passed"] = all(row["facts"].values())
        shutil.rmtree(environment.folder)
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        row |= {"facts": {}, "passed": False, "error": str(error).replace(str(workspace.root), "WORKSPACE")}
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def check_stub(environment: Environment) -> dict[str, bool]:
    """On another Python: the hook alone, with a stub around nnU-Net's own search function."""
    shutil.copytree(SCRIPTS / "stub", environment.site_packages, dirs_exist_ok=True)
    search = str(find_class_by_name.__file__)
    shutil.copy(search, environment.site_packages / "nnunetv2" / "utilities")
    environment.step("ours")
    facts = json.loads(environment.run(SCRIPTS / "find_in_stub.py").stdout.splitlines()[-1])
    facts["start silent"] = environment.starts_silently()
    environment.step("ours removed")
    return facts | {"nothing left": environment.files() == environment.before_us}


def version_of(python: str) -> str:
    """The version of an interpreter."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def key(row: dict) -> str:
    """What makes a row the same row in another run."""
    return json.dumps([row[name] for name in ("python", "installer", "ours", "nnunetv2", "place", "steps")])


def hook_cost(workspace: Workspace, starts: int = 120) -> dict:
    """What the hook costs a start of Python: with and without it in turn, CPU time, and what importtime says."""
    pythons = {}
    for ours in ("none", "normal", "editable"):
        environment = Environment(workspace, Case("pip", ours, "none", ()), link=False)
        if ours != "none":
            environment.step("ours")
        pythons[ours] = environment.python
    milliseconds: dict[str, list[float]] = {name: [] for name in pythons}
    for _ in range(starts):
        for name, python in pythons.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([python, "-I", "-c", ""], check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            milliseconds[name].append(1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    imports = []
    for _ in range(starts // 3):
        lines = workspace.run([pythons["normal"], "-I", "-X", "importtime", "-c", ""]).stderr.splitlines()
        own = [line for line in lines if "nnunet_multimodal" in line]
        imports.append(1e-3 * sum(float(line.split(":")[1].split("|")[0]) for line in own))
    medians = {name: statistics.median(values) for name, values in milliseconds.items()}
    cost = {"starts": starts, "start_without_us_ms": round(medians["none"], 2)}
    cost |= {f"hook_{name}_ms": round(medians[name] - medians["none"], 2) for name in ("normal", "editable")}
    return cost | {"hook_imports_ms": round(statistics.median(imports), 2)}


def table(rows: list[dict]) -> str:
    """The rows for the terminal."""
    lines = []
    for row in rows:
        failed = [name for name, fact in row["facts"].items() if not fact]
        verdict = "passed" if row["passed"] else f"FAILED {', '.join(failed)} {row.get('error', '')}"
        ways = f"{row['installer']:<4} {row['ours']:<9} {row['nnunetv2'].split()[0]:<9} {row['place']:<10}"
        python = row.get("python", "?")
        lines.append(f"{python:<8} {ways} {' > '.join(row['steps']):<52} {row['expect']:<30} {verdict}")
    head = f"{'Python':<8} {'with':<4} {'ours':<9} {'nnunetv2':<9} {'place':<10} {'steps':<52} {'expected':<30} result"
    return "\n".join([head, *lines])


def passed_before(args: argparse.Namespace) -> dict[str, dict]:
    """The rows that need not run again."""
    file = args.out / "install_matrix.json"
    if not args.resume or not file.exists():
        return {}
    return {key(row): row for row in json.loads(file.read_text())["rows"] if row["passed"]}


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--base", help="a Python whose environment has nnU-Net's dependencies (default: make one)")
    options.add_argument("--python", nargs="*", default=[], help="other Pythons, for the start-up hook alone")
    options.add_argument("--jobs", type=int, default=1, help="rows at a time")
    options.add_argument("--resume", action="store_true", help="keep the rows of install_matrix.json that passed")
    args = options.parse_args()
    jobs = [(case, sys.executable) for case in cases()]
    for python, installer, ours in product(args.python, ("pip", "uv"), ("normal", "editable")):
        jobs.append((Case(installer, ours, STUB, ("nnunetv2", "ours"), "the hook works"), python))
    done = passed_before(args)
    missing = [job for job in jobs if key(job[0].row(version_of(job[1]))) not in done]
    with tempfile.TemporaryDirectory(prefix="install_matrix_") as folder:
        workspace = Workspace(Path(folder).resolve())
        workspace.prepare(args.base)
        with ThreadPoolExecutor(args.jobs) as pool:
            futures = [pool.submit(run_case, workspace, *job) for job in missing]
            for _ in tqdm(as_completed(futures), total=len(futures), unit="row"):
                pass
        rows = [*done.values(), *(future.result() for future in futures)]
        tools = {name: workspace.run([workspace.tools / name, "--version"]).stdout.split()[1] for name in ("pip", "uv")}
        cost = hook_cost(workspace)
    passed = sum(row["passed"] for row in rows)
    print(table(rows))
    print(f"{passed} of {len(rows)} rows passed; the hook's cost per start of Python: {cost}")
    figures = {"passed": passed, "rows_total": len(rows), "hook_cost": cost, "installers": tools}
    named = argparse.Namespace(out=args.out, device=args.device, jobs=args.jobs, resume=args.resume)
    write(named, "install_matrix", figures | {"rows": rows})
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
