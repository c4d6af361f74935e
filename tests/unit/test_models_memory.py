from pathlib import Path

import pytest
import torch

from finescope.models.memory import peak_memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what is resident")
def test_the_peak_is_no_less_than_what_is_resident_and_stays():
    held = torch.ones(2**24)  # 64 MiB, touched
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(lines["VmRSS"].split()[0]) * 1024
    peak = peak_memory(torch.device("cpu"))
    # The kernel counts what is resident by thread, a few pages late.
    assert peak["memory_bytes"] >= resident - 2**20 > held.nbytes
    assert peak.keys() == {"memory_bytes"}
    del held
    assert peak_memory(torch.device("cpu"))["memory_bytes"] >= peak["memory_bytes"]
