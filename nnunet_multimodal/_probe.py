"""What a fresh interpreter sees: its versions, devices and what nnU-Net's stock search finds.

``nnunet-multimodal doctor`` runs the text of this file with ``python -c`` and reads the last line that it prints.
Nothing here imports ``nnunet_multimodal``: only the start-up hook may bring it in, as for nnU-Net's own commands.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys

START_UP = "nnunet_multimodal._startup"


def hook_ran():
    """Whether our start-up module waits for nnU-Net, which is so only if the start of Python called it."""
    return any(getattr(finder, "__module__", None) == START_UP for finder in sys.meta_path)


def attempt(function, *args):
    """``(value, None)``, or ``(None, error)`` as one line: whatever fails is what the doctor is to tell."""
    try:
        return function(*args), None
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        return None, f"{type(error).__name__}: {line[:300]}"


def devices():
    """What torch can compute on; memory in bytes."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory_bytes": None})
    return found


def find_planner(name):
    """nnU-Net's search of ``nnUNetv2_plan_and_preprocess -pl`` and ``-fpe``."""
    return find_in("experiment_planning", name)


def find_preprocessor(name):
    """nnU-Net's search of ``nnUNetv2_plan_and_preprocess -preprocessor_name``."""
    return find_in("preprocessing", name)


def find_in(package, name):
    """nnU-Net's search of one of its packages."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], package)
    return recursive_find_python_class(folder, name, current_module=f"nnunetv2.{package}")


def find_trainer(name):
    """nnU-Net's search of ``nnUNetv2_train -tr``."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    return recursive_find_trainer_class_by_name(name)


def find(search, name):
    """Where a search finds a class; nnU-Net drops modules found through ``nnUNet_extTrainer``, so no file for these."""
    found, error = attempt(search, name)
    if found is None:
        return {"name": name, "module": None, "file": None, "error": error or "not found"}
    file = getattr(sys.modules.get(found.__module__), "__file__", None)
    return {"name": name, "module": found.__module__, "file": file, "error": None}


def report(planners, preprocessors, trainers):
    """All of it. Trainers last: a trainer found through ``nnUNet_extTrainer`` imports our package, hook and all."""
    result = {"hook_ran": hook_ran(), "nnunetv2": None, "errors": {}}
    spec, _ = attempt(importlib.util.find_spec, "nnunetv2")
    if spec is not None:
        result["nnunetv2"] = next(iter(spec.submodule_search_locations or []), None)
    for name in ("torch", "torchvision"):
        _, error = attempt(importlib.import_module, name)
        if error is not None:
            result["errors"][name] = error
    result["devices"] = attempt(devices)[0] or []
    if result["nnunetv2"] is not None:
        result["planners"] = [find(find_planner, name) for name in planners]
        result["preprocessors"] = [find(find_preprocessor, name) for name in preprocessors]
        result["trainers"] = [find(find_trainer, name) for name in trainers]
    return result


if __name__ == "__main__":
    if sys.path[0] == "":  # of ``-c``; a console script does not see the working folder
        del sys.path[0]
    with contextlib.redirect_stdout(sys.stderr):
        answer = report(**json.loads(sys.argv[1]))
    print(json.dumps(answer))
