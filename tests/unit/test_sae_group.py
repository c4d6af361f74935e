"""Two processes of a gloo group against one process that takes both shares: the same dictionaries, to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_streams import buffer_of, plan_of, planted, section, stream_of
from torch import distributed, multiprocessing

from finescope.sae.fit import fit, work_units

ARCHITECTURES = ("topk", "batch_topk", "jumprelu", "relu_l1")


def settings() -> list[Any]:
    """A dictionary an architecture, all in one pass; dead latents, several fills, shares of unequal length."""
    common = {"num_tokens": 1500, "epochs": 2, "buffer_mib": buffer_of(600), "workers": 2, "dead_after_tokens": 300}
    return [section(architecture=architecture, **common) for architecture in ARCHITECTURES]


def run(home: str, out: str) -> None:
    torch.set_num_threads(1)
    chunks = planted(1750)[0].split(70)
    told: list[int] = []
    results = fit(plan_of(settings(), chunks, checkpoints=home), stream_of(chunks), torch.device("cpu"), told.append)
    if results:
        weights = [result.autoencoder.state_dict() for result in results]
        torch.save({"weights": weights, "history": [result.history for result in results], "told": sum(told)}, out)


def process(rank: int, home: str, out: str, rendezvous: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    run(home, out)
    distributed.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run(str(tmp_path / "one"), str(tmp_path / "one.pt"))
    finally:
        torch.set_num_threads(before)
    arguments = (str(tmp_path / "two"), str(tmp_path / "two.pt"), str(tmp_path / "rendezvous"))
    multiprocessing.spawn(process, arguments, nprocs=2)
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two"))
    for architecture, expected, found in zip(ARCHITECTURES, one["weights"], two["weights"], strict=True):
        for name, weight in expected.items():
            assert torch.equal(found[name], weight), (architecture, name)
    # The figures on the way are sums of other parts, which round otherwise.
    for left, right in zip(one["history"], two["history"], strict=True):
        assert [entry[:2] for entry in left] == [entry[:2] for entry in right]
        assert [entry[2] for entry in left] == pytest.approx([entry[2] for entry in right], rel=1e-6)
    assert one["told"] == two["told"]
    assert 0 < one["told"] <= work_units(settings()[0])
