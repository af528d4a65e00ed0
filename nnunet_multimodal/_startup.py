"""Makes nnU-Net find our classes, without touching a file of nnU-Net.

nnU-Net finds planners, preprocessors and fingerprint extractors only inside its own folders, by one function,
``nnunetv2.utilities.find_class_by_name.recursive_find_python_class``. At the start of Python a line in
``nnunet_multimodal.pth`` (``nnunet_multimodal.start`` from Python 3.15 on, PEP 829) calls :func:`install`. It waits
for the module and wraps the function: names of ours (``nnunet_multimodal.lookup``) are answered from our registry, all
others go to nnU-Net unchanged. Every caller imports the function after that, so each gets the wrapper, in spawned
workers too. In the same way ``-pretrained_weights`` learns to load nnU-Net's checkpoints into our networks.

The module runs in every Python process of the environment: standard library only, and nothing before it is needed.
"""

import sys


def _find_class(stock, folder, class_name, current_module, *args, **kwargs):
    from nnunet_multimodal import lookup

    def find_stock(name):
        return stock(folder, name, current_module, *args, **kwargs)

    return lookup.find_class(class_name, current_module, find_stock)


def _load_pretrained_weights(stock, network, fname, verbose=False):
    from nnunet_multimodal import pretrained

    return pretrained.load_pretrained_weights(stock, network, fname, verbose)


TARGET = "nnunetv2.utilities.find_class_by_name"
# module of nnU-Net -> its function, and ours that is called with the stock function in front of the arguments
FUNCTIONS = {
    TARGET: ("recursive_find_python_class", _find_class),
    "nnunetv2.run.load_pretrained_weights": ("load_pretrained_weights", _load_pretrained_weights),
}


class LookupFinder:
    """A meta path finder that lets the others find our ``FUNCTIONS``' modules and wraps them once they have run."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return such a module's spec as the other finders see it, None for every other module."""
        if name not in FUNCTIONS:
            return None
        for finder in list(sys.meta_path):
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _wrap_when_loaded(spec.loader, name)
                return spec
        return None


def _wrap_when_loaded(loader, name):
    run = loader.exec_module

    def exec_module(module):
        run(module)
        if module.__name__ == name:
            wrap(module)

    loader.exec_module = exec_module


def wrap(module):
    """Replace the function of an imported module of ``FUNCTIONS`` by ours; a second call does nothing."""
    from functools import wraps

    name, ours = FUNCTIONS[module.__name__]
    stock = getattr(module, name, None)
    if stock is None or hasattr(stock, "__wrapped__"):  # None: a later nnU-Net, whose import must not fail on us
        return

    @wraps(stock)
    def wrapper(*args, **kwargs):
        return ours(stock, *args, **kwargs)

    vars(module)[name] = wrapper
    # Modules that were imported before us (a script that imports nnU-Net first) hold the function by name.
    for other_name, other in list(sys.modules.items()):
        if other_name.startswith("nnunetv2.") and getattr(other, name, None) is stock:
            vars(other)[name] = wrapper


def install():
    """Wrap what is already imported now, the rest as soon as it is; safe to call any number of times."""
    for name in FUNCTIONS:
        if name in sys.modules:
            wrap(sys.modules[name])
    if LookupFinder not in sys.meta_path:
        sys.meta_path.insert(0, LookupFinder)
