from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, reference, saved_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from finescope.config import CoordinatesSection
from finescope.models.hooks import HookPoint, capture, values_of_embeddings
from finescope.models.load import load_model
from finescope.sae.sensitivity import choose_coordinates, jacobian_scores
from finescope.sae.stream import TokenBatch, stream_activations

LAYER = 2
IDS = np.array([[3, 9, 4, 7, 0], [5, 8, 6, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
BATCHES: list[TokenBatch] = [(IDS, MASK)]


def explicit_scores(model: PreTrainedModel) -> Tensor:
    """The whole Jacobian, document by document without padding: root mean square of ||d a_j / d e||_F."""
    squares, count = torch.zeros(16, dtype=torch.float64), 0
    for ids, mask in zip(IDS, MASK, strict=True):
        tokens = torch.from_numpy(ids[: mask.sum()])[None]
        ones = torch.ones_like(tokens)
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.func.jacrev(lambda e, ones=ones: values_of_embeddings(model, e, ones, HookPoint(LAYER)))(
                model.get_input_embeddings()(tokens)
            )
        assert isinstance(jacobian, Tensor)  # [1, T, d, 1, T, d]
        squares += jacobian[0, 1:].double().square().sum(dim=(2, 3, 4)).sum(0)
        count += int(mask.sum()) - 1
    return (squares / count).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_jacobian_scores_estimate_the_explicit_jacobian(tmp_path: Path, family: str) -> None:
    model = load_model(reference(saved_model(tmp_path, family)), num_layers=LAYER, device="cpu")
    exact = explicit_scores(model)
    copies: list[TokenBatch] = [(np.tile(IDS, (500, 1)), np.tile(MASK, (500, 1)))]  # each has probes of its own
    estimate = jacobian_scores(model, copies, LAYER, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate, exact, rtol=0.1, atol=0.0)
    assert torch.corrcoef(torch.stack([estimate, exact]))[0, 1] > 0.98


@pytest.mark.parametrize("method", ["jacobian", "magnitude", "variance", "random"])
def test_indices_are_the_best_scores_sorted(tmp_path: Path, method: str) -> None:
    model = load_model(reference(saved_model(tmp_path, "llama")), num_layers=LAYER, device="cpu")
    section = CoordinatesSection.model_validate({"method": method, "count": 5})
    chosen = choose_coordinates(model, BATCHES, LAYER, section, seed=3)
    assert chosen.indices.dtype == torch.int64
    assert chosen.scores.shape == (16,)
    assert chosen.indices.tolist() == sorted(chosen.scores.topk(5).indices.tolist())
    again = choose_coordinates(model, BATCHES, LAYER, section, seed=3)
    assert torch.equal(again.scores, chosen.scores)


def test_all_and_a_count_above_the_width_keep_all(tmp_path: Path) -> None:
    model = load_model(reference(saved_model(tmp_path, "llama")), num_layers=LAYER, device="cpu")
    for section in (CoordinatesSection(method="all", count=5), CoordinatesSection(method="variance", count=99)):
        assert choose_coordinates(model, BATCHES, LAYER, section, seed=0).indices.tolist() == list(range(16))


def test_only_the_first_documents_count(tmp_path: Path) -> None:
    model = load_model(reference(saved_model(tmp_path, "llama")), num_layers=LAYER, device="cpu")
    section = CoordinatesSection(method="magnitude", documents=1)
    whole = choose_coordinates(model, BATCHES, LAYER, section, seed=0)
    first = choose_coordinates(model, [(IDS[:1], MASK[:1])], LAYER, section, seed=0)
    assert torch.equal(whole.scores, first.scores)


def test_first_position_and_padding_are_left_out(tmp_path: Path) -> None:
    model = load_model(reference(saved_model(tmp_path, "llama")), num_layers=LAYER, device="cpu")
    (residual,) = capture(model, torch.from_numpy(IDS), torch.from_numpy(MASK), [HookPoint(LAYER)])
    (right,) = stream_activations(model, BATCHES, LAYER)
    assert torch.equal(right, torch.cat([residual[0, 1:4], residual[1, 1:3]]))
    left_ids, left_mask = np.array([[0, 5, 8, 6]]), np.array([[0, 1, 1, 1]])
    (left,) = stream_activations(model, [(left_ids, left_mask)], LAYER)
    torch.testing.assert_close(left, residual[1, 1:3])
