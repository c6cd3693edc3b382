"""What each of several workers gets of a machine or a cluster."""

import time

import pytest

from prunus import hardware
from prunus.side_by_side import each, share

NODE = {"CPU": 8.0}


@pytest.mark.parametrize(
    ("nodes", "workers", "expected"),
    [
        ([NODE], 2, (4, 0, 2)),
        ([{"CPU": 2}], 8, (1, 0, 2)),
        ([NODE] * 4, 2, (8, 0, 1)),  # not 16: no node has them
        ([NODE, {"CPU": 4}, {}], 2, (4, 0, 2)),
        ([{"CPU": 32, "GPU": 4}], 4, (8, 1, 1)),
        ([{"CPU": 32, "GPU": 4}], 2, (16, 1, 1)),
        ([{"CPU": 32, "GPU": 2}], 8, (4, 0.25, 4)),
    ],
)
def test_equal_parts_none_larger_than_a_node(nodes, workers, expected):
    assert share(nodes, workers) == expected


def test_shared_memory_is_counted_once(monkeypatch):
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1200}))
    monkeypatch.setattr(hardware, "device", lambda: hardware.torch.device("cpu"))
    with hardware.shared(3):
        assert hardware.free_memory() == 400
    assert hardware.free_memory() == 1200


def test_no_more_than_asked_for_run_at_once():
    ray = pytest.importorskip("ray", reason="work goes side by side on Ray")

    def span(seconds):  # inside, so that workers need not import this file
        start = time.time()
        time.sleep(seconds)
        return start, time.time()

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        spans = dict(each(span, {str(number): 0.3 for number in range(7)}, workers=3))
    finally:
        ray.shutdown()
    assert len(spans) == 7
    together = [sum(start <= other < end for start, end in spans.values()) for other, _ in spans.values()]
    assert max(together) <= 3
