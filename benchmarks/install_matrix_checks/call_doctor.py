"""Run by ``install_matrix.py``: the doctor's exit status and report, as one line of JSON."""

import argparse
import contextlib
import io
import json

from nnunet_multimodal import doctor

text = io.StringIO()
with contextlib.redirect_stdout(text):
    status = doctor.run(argparse.Namespace(json=True))
print(json.dumps([status, json.loads(text.getvalue())]))
