"""Peak bytes of calls whose tensors can be counted on fingers."""

from __future__ import annotations

import torch

from fewer.evaluation.memory import peak_bytes

CPU = torch.device("cpu")
KB = 256 * 4  # bytes of 256 float32


def test_freed_tensors_do_not_count() -> None:
    x = torch.ones(256)

    def call() -> None:
        for _ in range(5):
            y = x + 1
            y = y * 2

    assert peak_bytes(call, CPU) == 2 * KB  # never more than a tensor and what is made of it


def test_all_that_is_kept_counts() -> None:
    x = torch.ones(256)
    assert peak_bytes(lambda: [x + i for i in range(4)], CPU) == 4 * KB


def test_views_and_in_place_work_are_free() -> None:
    x = torch.ones(4, 64)
    assert peak_bytes(lambda: x.view(64, 4).t()[1:].add_(1).mul_(2), CPU) == 0


def test_two_peaks_give_the_higher() -> None:
    x = torch.ones(256)

    def call() -> None:
        [x + i for i in range(2)]
        [x + i for i in range(3)]

    assert peak_bytes(call, CPU) == 3 * KB
