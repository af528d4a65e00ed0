"""Run by ``install_matrix.py`` on other Pythons, next to ``stub``: does the start-up hook work?"""

import json
import sys
from multiprocessing import get_context

HOOK_RAN = any(getattr(finder, "__module__", None) == "nnunet_multimodal._startup" for finder in sys.meta_path)
TRAINERS = "nnunetv2.training.nnUNetTrainer"


def find(kind, name):
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = nnunetv2.__path__[0] + "/" + kind.removeprefix("nnunetv2.").replace(".", "/")
    return recursive_find_python_class(folder, name, kind, nnunetv2.__path__[0])


def find_planner():
    return find("nnunetv2.experiment_planning", "nnUNetPlannerCPU").__module__ == "nnunet_multimodal.plans.cpu"


def main():
    trainer = find(TRAINERS, "nnUNetTrainer_12epochs_100iterations")
    facts = {
        "hook ran": HOOK_RAN,
        "planner": find_planner(),
        "length suffix": trainer.__mro__[1].__module__ != TRAINERS,
    }
    facts["stock found"] = find(TRAINERS, "nnUNetTrainer") is trainer.__mro__[1]
    facts["unknown name is none"] = find(TRAINERS, "NoSuchTrainer") is None
    with get_context("spawn").Pool(1) as pool:
        facts["worker"] = pool.apply(find_planner)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
