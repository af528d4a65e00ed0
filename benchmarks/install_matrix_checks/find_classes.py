"""Run by ``install_matrix.py`` in each environment: what nnU-Net's own search finds, as one line of JSON."""

import contextlib
import json
import os
import sys
from multiprocessing import get_context

HOOK_RAN = any(getattr(finder, "__module__", None) == "nnunet_multimodal._startup" for finder in sys.meta_path)


def find_trainer(name):
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    with contextlib.redirect_stdout(sys.stderr):
        return recursive_find_trainer_class_by_name(name)


def find_planner(name):
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    return recursive_find_python_class(folder, name, current_module="nnunetv2.experiment_planning")


def modules(search, names):
    """Where each class is found; None for one that is not."""
    found = {}
    for name in names:
        try:
            cls = search(name)
        except RuntimeError:  # nnU-Net's answer for a trainer that it does not find
            cls = None
        found[name] = None if cls is None else cls.__module__
    return found


def in_worker(trainer, planner):
    """The same in a spawned process; the planner first, as a trainer of ours may bring the hook with it."""
    found = {"planner": planner is not None and find_planner(planner) is not None}
    found["trainer"] = trainer is not None and find_trainer(trainer) is not None
    return found | {"stock": find_trainer("nnUNetTrainer").__name__ == "nnUNetTrainer"}


def main():
    asked = json.loads(sys.argv[1])
    result = {"hook": HOOK_RAN, "planners": modules(find_planner, asked["planners"])}
    result["trainers"] = modules(find_trainer, asked["trainers"])
    stock = find_trainer("nnUNetTrainer"), find_planner("ExperimentPlanner")
    result["stock"] = all(cls is not None and cls.__module__.startswith("nnunetv2.") for cls in stock)
    one_of_each = [next(iter(asked[kind][::-1]), None) for kind in ("trainers", "planners")]
    with get_context("spawn").Pool(1) as pool:
        result["worker"] = pool.apply(in_worker, one_of_each)
    from importlib.metadata import version

    result["versions"] = {name: version(name) for name in ("nnunetv2", "torch")}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
