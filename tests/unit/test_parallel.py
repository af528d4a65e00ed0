"""Cases in several processes."""

import os

import pytest

from nnunet_multimodal import parallel
from nnunet_multimodal.errors import UserError
from nnunet_multimodal.parallel import in_parallel


def test_no_more_processes_than_cores_that_this_one_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    twice = [2 * number for number in range(4)]
    # no other process could unpickle a lambda
    assert list(in_parallel(lambda number: 2 * number, [(number,) for number in range(4)], 4, "test")) == twice


def test_a_process_that_is_ended_from_outside_is_said(monkeypatch):
    monkeypatch.setattr(parallel, "cpu_cores", lambda: 2)
    with pytest.raises(UserError, match=r"test: one of 2 processes was ended from outside.*; give a smaller -np"):
        list(in_parallel(os._exit, [(1,), (1,)], 2, "test"))
