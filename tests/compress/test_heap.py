"""The heap while stages run: what is given back at once, what is kept and used again, and which stages keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gossamer.compress import memory
from gossamer.compress.recipe import STAGES

FAULTS = """
import contextlib, json, resource, torch
from gossamer.compress import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(1 << 20).fill_(1.0)  # 4 MiB: 1024 pages, or two large ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
memory.bound_heap()
found = {"bound": faults()}
with memory.reused_heap():
    faults()
    found["reused"] = faults()
    tensors = [torch.full((1 << 20,), 1.0) for _ in range(20)]
    del tensors
    found["kept"] = memory.resident_bytes()
found["after"] = memory.resident_bytes()
found["again"] = faults()
print(json.dumps(found))
"""


@pytest.mark.skipif(memory._libc() is None or not hasattr(memory._libc(), "mallopt"), reason="glibc's allocator only")
def test_freed_memory_is_used_again_inside_and_given_back_behind():
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env=environment)
    found = json.loads(told.stdout.splitlines()[-1])
    assert min(found["bound"], found["again"]) >= 20
    assert found["reused"] < found["bound"] / 4
    assert found["after"] < found["kept"] - 19 * (4 << 20)


def test_a_setting_of_the_users_own_is_kept(monkeypatch):
    called = []

    class Libc:
        def mallopt(self, *given):
            called.append(given)

    monkeypatch.setattr(memory, "_libc", Libc)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    with memory.reused_heap():
        pass
    assert called == []
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_")
    with memory.reused_heap():
        assert called == [(-3, memory.KEPT), (-1, memory.SPARE)]
    assert called[2:] == [(-3, memory.LARGE), (-1, memory.LARGE)]


def test_stages_that_compute_the_same_sizes_over_and_over():
    repeating = {name for name, kind in STAGES.items() if kind.repeats}
    assert repeating >= {"finetune", "imp", "soup", "nm-flow", "activation", "heads"}
    assert not repeating & {"prune", "evaluate", "export"}
