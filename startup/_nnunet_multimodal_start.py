"""What ``nnunet_multimodal.start`` (Python 3.15 on, PEP 829) calls at the start of Python.

An entry point that cannot be imported prints its error at every start. This one lies in site-packages itself, so that
the deleted checkout of an editable installation leaves Python silent, as the ``try`` in ``nnunet_multimodal.pth`` does.
"""


def install():
    """Let nnU-Net find our classes; do nothing where the package is gone."""
    try:
        from nnunet_multimodal import _startup
    except ImportError:
        return
    _startup.install()
