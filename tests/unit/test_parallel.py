"""Cases in several processes."""

import os

from nnunet_multimodal.parallel import in_parallel


def test_no_more_processes_than_cores_that_this_one_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    twice = [2 * number for number in range(4)]
    # no other process could unpickle a lambda
    assert list(in_parallel(lambda number: 2 * number, [(number,) for number in range(4)], 4, "test")) == twice
