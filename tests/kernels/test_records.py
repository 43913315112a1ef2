"""Packing records: several threads may learn at once."""

from __future__ import annotations

import sys
import threading

import torch

from gossamer.kernels.bitmask import dispatch as bitmask
from gossamer.kernels.bitmask_gemv import dispatch as gemv


def test_threads_that_learn_at_once_do_not_meet():
    weight, mask = torch.randn(8, 64, dtype=torch.bfloat16), torch.rand(8, 64) > 0.5
    bits = bitmask.pack_bits(mask)
    packed = gemv.pack(bits, bitmask.compress(weight, bits), 64)
    faults: list[BaseException] = []

    def learn() -> None:
        try:
            for _ in range(2000):
                assert gemv.describe(packed.clone()).nnz == int(mask.sum())
        except BaseException as fault:  # noqa: BLE001 - a thread's fault is nobody's otherwise
            faults.append(fault)

    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=learn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(usual)
    assert faults == []
