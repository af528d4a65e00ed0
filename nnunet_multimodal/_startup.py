"""Makes nnU-Net's class lookup find ours, without touching a file of nnU-Net.

nnU-Net finds planners, preprocessors and fingerprint extractors only inside its own folders, by one function,
``nnunetv2.utilities.find_class_by_name.recursive_find_python_class``. At the start of Python a line in
``nnunet_multimodal.pth`` (``nnunet_multimodal.start`` from Python 3.15 on, PEP 829) calls :func:`install`. It waits
for that one module and wraps that one function: names of ours (``nnunet_multimodal.lookup``) are answered from our
registry, all others go to nnU-Net unchanged. Every caller imports the function after that, so each gets the wrapper,
in spawned workers too.

The module runs in every Python process of the environment: standard library only, and nothing before it is needed.
"""

import sys

TARGET = "nnunetv2.utilities.find_class_by_name"


class LookupFinder:
    """A meta path finder that lets the others find ``TARGET`` and wraps the function once the module has run."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return the spec of ``TARGET`` as the other finders see it, None for every other module."""
        if name != TARGET:
            return None
        for finder in list(sys.meta_path):
            if finder is cls or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                _wrap_when_loaded(spec.loader)
                return spec
        return None


def _wrap_when_loaded(loader):
    run = loader.exec_module

    def exec_module(module):
        run(module)
        if module.__name__ == TARGET:
            wrap(module)

    loader.exec_module = exec_module


def wrap(module):
    """Replace the class lookup of an imported ``TARGET`` by one that knows our names; a second call does nothing."""
    from functools import wraps

    stock = getattr(module, "recursive_find_python_class", None)
    if stock is None or hasattr(stock, "__wrapped__"):  # None: a later nnU-Net, whose import must not fail on us
        return

    @wraps(stock)
    def recursive_find_python_class(folder, class_name, current_module, *args, **kwargs):
        from nnunet_multimodal import lookup

        def find_stock(name):
            return stock(folder, name, current_module, *args, **kwargs)

        return lookup.find_class(class_name, current_module, find_stock)

    module.recursive_find_python_class = recursive_find_python_class
    # Modules that were imported before us (a script that imports nnU-Net first) hold the function by name.
    for name, other in list(sys.modules.items()):
        if name.startswith("nnunetv2.") and getattr(other, "recursive_find_python_class", None) is stock:
            vars(other)["recursive_find_python_class"] = recursive_find_python_class


def install():
    """Wrap the lookup now if nnU-Net is already imported, else as soon as it is; safe to call any number of times."""
    if TARGET in sys.modules:
        wrap(sys.modules[TARGET])
    elif LookupFinder not in sys.meta_path:
        sys.meta_path.insert(0, LookupFinder)
