"""docs/howto/walk.md, typed as it stands, with a shorter training and fewer cases."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

SHORTER = (
    ("_6epochs_60iterations", "_1epochs_3iterations"),
    ("synthetic_brats download", "synthetic_brats download --training 5 --test 2"),
    ("--samples 10", "--samples 3"),
)


def shorter(script):
    """The page's commands for fewer cases and samples, and a shorter training."""
    for long, short in SHORTER:
        assert script.count(long) == 1, f"there is no {long!r}"
        script = script.replace(long, short)
    return script


def test_the_whole_walk(documented, tmp_path):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "nnUNet_def_n_proc": "1",
        "nnUNet_n_proc_DA": "1",  # 0 is what nnU-Net's planner cannot do
        "OMP_NUM_THREADS": "1",
    }
    bash = shutil.which("bash")
    script = shorter(documented.script())
    run = subprocess.run([bash, "-euxc", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    cases = ["BraTS2021_00005", "BraTS2021_00006"]
    summaries = {case: json.loads((tmp_path / "predictions" / f"{case}.json").read_text()) for case in cases}
    assert [summary["absent"] for summary in summaries.values()] == [[], ["FLAIR"]]
    assert all(summary["samples"] == 3 for summary in summaries.values())
    evaluation = json.loads((tmp_path / "predictions" / "evaluation.json").read_text())
    assert len(evaluation["metric_per_case"]) == 2
    subsets = (tmp_path / "subsets" / "subsets.csv").read_text()
    assert "FLAIR+T1+T1CE+T2" in subsets
    assert all((tmp_path / "explained" / f"{case}.png").is_file() for case in cases)
    assert all((tmp_path / "sheets" / f"{case}_samples.png").is_file() for case in cases)
    page = (tmp_path / "report.html").read_text()
    assert all(case in page for case in cases)
