"""nnU-Net's own integration test in miniature, for every trainer and every kind of labels; a table of what passes.

Runs tests/integration/test_nnunet_suite.py (synthetic data, one step per training): five folds of 2d, 3d_lowres,
3d_fullres and the cascade, the best configuration, ensemble, postprocessing, inference with five folds. Scenarios that
passed are not run again while the results file has them; --again forgets them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import _common as common

sys.path.insert(0, str(common.ROOT))
from nnunet_multimodal.lookup import COMBINATIONS
from tests.nnunet import LABELS

TEST = "tests/integration/test_nnunet_suite.py"
TRAINERS = ("nnUNetTrainer", *COMBINATIONS)


def run(scenarios: list[tuple[str, str]], processes: int) -> dict[tuple[str, str], dict[str, object]]:
    """Outcome, seconds and commit of scenarios (trainer, kind of labels)."""
    described = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=common.ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    commit = described.stdout.strip()
    names = {f"test_from_five_folds_to_the_postprocessed_ensemble[{t}-{kind}]": (t, kind) for t, kind in scenarios}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "", "-n", str(processes), "--dist", "load"]
            + [f"--junitxml={report}"]
            + [f"{TEST}::{name}" for name in names],
            cwd=common.ROOT, check=False,
        )  # fmt: skip
        found = {}
        for case in ElementTree.parse(report).iter("testcase"):
            failed = case.find("failure") is not None or case.find("error") is not None
            outcome = "failed" if failed else "skipped" if case.find("skipped") is not None else "passed"
            cell = {"outcome": outcome, "seconds": round(float(case.get("time", 0))), "commit": commit}
            found[names[case.get("name", "")]] = cell
    return found


def main() -> None:
    """Run what has not passed yet, in groups, and write the table after each."""
    p = common.parser(__doc__)
    p.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=TRAINERS)
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--again", action="store_true", help="also what passed before")
    args = p.parse_args()
    file = args.out / "nnunet_suite.json"
    done = json.loads(file.read_text())["trainers"] if file.is_file() else {}
    if args.again:
        done = {trainer: cells for trainer, cells in done.items() if trainer not in args.trainers}
    for trainer in args.trainers:
        missing = [(trainer, k) for k in LABELS if done.get(trainer, {}).get(k, {}).get("outcome") != "passed"]
        if missing:
            for (_, kind), result in run(missing, args.processes).items():
                done.setdefault(trainer, {})[kind] = result
            figures = {"trainers_there_are": len(TRAINERS), "trainers": {t: done[t] for t in TRAINERS if t in done}}
            common.write(args, "nnunet_suite", figures)


if __name__ == "__main__":
    main()
