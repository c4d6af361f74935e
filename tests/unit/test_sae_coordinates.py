import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, reference, saved_model, tiny_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from finescope.config_sae import CoordinatesSection
from finescope.errors import StepFailed
from finescope.models.hooks import HookPoint, Site, capture, hook_width, values_of_embeddings
from finescope.models.load import load_model
from finescope.sae.coordinates import (
    CoordinateScorer,
    SummedMethod,
    Sums,
    choose_coordinates,
    coordinates_of,
    directional_derivatives,
    merge,
)
from finescope.sae.stream import TokenBatch

HOOK = HookPoint(2)
METHODS: tuple[SummedMethod, ...] = ("jacobian", "magnitude", "variance", "pca")
DOCUMENTS = ([3, 9, 4, 7], [5, 8, 6], [2, 11, 40, 23, 17, 31], [50, 1, 12])
RIGHT: TokenBatch = (np.array([[3, 9, 4, 7, 0], [5, 8, 6, 0, 0]]), np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]))
LEFT: TokenBatch = (np.array([[0, 0, 3, 9, 4, 7], [0, 0, 0, 5, 8, 6]]), np.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]]))


def batch_of(*documents: list[int]) -> TokenBatch:
    longest = max(map(len, documents))
    ids = np.array([document + [0] * (longest - len(document)) for document in documents])
    return ids, np.array([[1] * len(document) + [0] * (longest - len(document)) for document in documents])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama").requires_grad_(False)


def section(method: str, **settings: object) -> CoordinatesSection:
    return CoordinatesSection.model_validate({"method": method, "count": 5, **settings})


def scorer(model: PreTrainedModel, method: SummedMethod, probes: int = 2, seed: int = 0) -> CoordinateScorer:
    return CoordinateScorer(model, HOOK, method, probes, seed)


def assert_close(left: Sums, right: Sums, tolerance: float) -> None:
    assert left.count == right.count
    for one, other in ((left.total, right.total), (left.scatter, right.scatter)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def explicit_jacobian(model: PreTrainedModel, document: list[int], hook: HookPoint) -> Tensor:
    """[T, width, T * d_model] by reverse mode."""
    tokens = torch.tensor([document])
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(lambda e: values_of_embeddings(model, e, torch.ones_like(tokens), hook))(
            model.get_input_embeddings()(tokens)
        )
    assert isinstance(jacobian, Tensor)  # [1, T, width, 1, T, d_model]
    return jacobian[0, :, :, 0].flatten(2)


def explicit_squares(model: PreTrainedModel, documents: list[list[int]], hook: HookPoint = HOOK) -> Tensor:
    """Mean over tokens but the first of each document of ||d a_j / d e||^2: float64 [width]."""
    jacobians = [explicit_jacobian(model, document, hook)[1:] for document in documents]
    return torch.cat([jacobian.double().square().sum(2) for jacobian in jacobians]).mean(0)


@pytest.mark.parametrize("site", ["residual", "attention", "mlp", "mlp_hidden"])
@pytest.mark.parametrize("family", FAMILIES)
def test_derivatives_along_all_axes_are_the_jacobian(tmp_path: Path, family: str, site: Site) -> None:
    if site == "mlp_hidden" and family in ("mixtral", "qwen3_moe"):
        pytest.skip("a mixture of experts has no such site")
    model, hook = load_model(reference(saved_model(tmp_path, family)), num_layers=2, device="cpu"), HookPoint(2, site)
    document = DOCUMENTS[0]
    embeddings = model.get_input_embeddings()(torch.tensor([document]))  # [1, 4, 16]
    axes = torch.eye(embeddings.numel()).reshape(-1, *embeddings.shape)
    with torch.no_grad():
        columns = directional_derivatives(model, embeddings, torch.ones(1, len(document)), hook, axes)
    assert columns.shape == (64, 1, 4, hook_width(model, hook))
    exact = explicit_jacobian(model, document, hook)
    torch.testing.assert_close(columns[:, 0].permute(1, 2, 0), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_mean_square_over_orthogonal_probes_is_exact(llama: PreTrainedModel) -> None:
    """E[u_j^2] = s_j^2 without sampling: over the +-1 rows of a Hadamard matrix sum v v^T = n I, as in expectation."""
    (document,) = DOCUMENTS[:1]
    hadamard = torch.ones(1, 1)
    while len(hadamard) < len(document) * 16:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    embeddings = llama.get_input_embeddings()(torch.tensor([document]))
    probes = hadamard.reshape(-1, *embeddings.shape)
    changes = directional_derivatives(llama, embeddings, torch.ones(1, len(document)), HOOK, probes)[:, 0, 1:]
    torch.testing.assert_close(changes.double().square().mean((0, 1)), explicit_squares(llama, [document]), rtol=1e-4, atol=0)


def test_relative_error_falls_with_the_root_of_the_number_of_probes(llama: PreTrainedModel) -> None:
    documents = list(DOCUMENTS[:2])
    exact = explicit_squares(llama, documents)
    numbers = [1, 4, 16, 64, 256]
    errors = []
    for probes in numbers:
        estimates = [scorer(llama, "jacobian", probes, seed)([batch_of(*documents)], 0) for seed in range(24)]
        relative = torch.stack([sums.total / sums.count / exact - 1 for sums in estimates])
        errors.append(float(relative.square().mean().sqrt()))
        # The mean of the estimates is off by its own standard error and no more: no bias.
        assert float(relative.mean().abs()) < 4 * errors[-1] / math.sqrt(len(estimates))
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert -0.55 < slope < -0.45, errors


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_root_mean_square_row_norms(family: str) -> None:
    model, documents = tiny_model(family).requires_grad_(False), list(DOCUMENTS)
    chosen = choose_coordinates(model, [batch_of(*documents)], HOOK, section("jacobian", probes=64), seed=0)
    exact = explicit_squares(model, documents).sqrt()
    torch.testing.assert_close(chosen.scores, exact, rtol=0.25, atol=0)
    assert torch.corrcoef(torch.stack([chosen.scores, exact]))[0, 1] > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_how_a_chunk_is_cut_into_batches_does_not_matter(
    llama: PreTrainedModel, method: SummedMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scorer(llama, method, probes=5)([batch_of(*DOCUMENTS)], 7)
    cut = scorer(llama, method, probes=5)([batch_of(*DOCUMENTS[:1]), batch_of(*DOCUMENTS[1:])], 7)
    monkeypatch.setattr("finescope.sae.coordinates._PASS_POSITIONS", 18)  # 3 of 5 probes, then 2; one document
    passes = scorer(llama, method, probes=5)([batch_of(*DOCUMENTS)], 7)
    for other in (cut, passes):
        assert other.count == whole.count == 12 * (5 if method == "jacobian" else 1)
        assert_close(other, whole, 1e-4)


@pytest.mark.parametrize("method", ["magnitude", "variance", "pca"])
def test_merged_chunks_are_the_whole(llama: PreTrainedModel, method: SummedMethod) -> None:
    parts = [scorer(llama, method)([batch_of(document)], index) for index, document in enumerate(DOCUMENTS)]
    assert_close(merge(parts), scorer(llama, method)([batch_of(*DOCUMENTS)], 0), 1e-5)


def test_chunks_of_jacobian_have_probes_of_their_own(llama: PreTrainedModel) -> None:
    first, again, second, other_seed = (
        scorer(llama, "jacobian", seed=seed)([RIGHT], index) for seed, index in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert torch.equal(first.total, again.total)
    assert not torch.allclose(first.total, second.total)
    assert not torch.allclose(first.total, other_seed.total)
    assert not torch.allclose(second.total, other_seed.total)
    both = merge([first, second])
    assert both.count == 2 * first.count
    assert torch.equal(both.total, first.total + second.total)


@pytest.mark.parametrize("method", METHODS)
def test_result_does_not_depend_on_who_summed_a_chunk_and_when(llama: PreTrainedModel, method: SummedMethod) -> None:
    chunks = {index: [batch_of(document)] for index, document in enumerate(DOCUMENTS)}
    one = scorer(llama, method)
    alone = merge([one(chunks[index], index) for index in range(4)])
    actors = [scorer(llama, method), scorer(llama, method)]
    sent = {index: actors[index % 2](chunks[index], index).to_bytes() for index in (2, 0, 3, 1)}
    spread = merge(Sums.from_bytes(sent[index]) for index in sorted(sent))
    assert spread.count == alone.count
    width = len(alone.total)
    for left, right in zip(
        coordinates_of(alone, section(method), width, 0), coordinates_of(spread, section(method), width, 0), strict=True
    ):
        assert (left is None and right is None) or torch.equal(left, right)


@pytest.mark.parametrize("method", METHODS)
# GPT-2 counts positions from the padding.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_padding_on_either_side_changes_nothing(family: str, method: SummedMethod) -> None:
    model = tiny_model(family).requires_grad_(False)
    right, left = (scorer(model, method)([batch], 0) for batch in (RIGHT, LEFT))
    assert right.count == left.count == 5 * (2 if method == "jacobian" else 1)
    assert_close(right, left, 1e-3)


def test_sums_of_activations_are_those_of_used_positions(llama: PreTrainedModel) -> None:
    (values,) = capture(llama, torch.from_numpy(RIGHT[0]), torch.from_numpy(RIGHT[1]), [HOOK])
    used = torch.cat([values[0, 1:4], values[1, 1:3]]).double()
    assert torch.equal(scorer(llama, "magnitude")([RIGHT], 0).total, used.abs().sum(0))
    variance, pca = scorer(llama, "variance")([RIGHT], 0), scorer(llama, "pca")([RIGHT], 0)
    assert variance.scatter is not None
    assert pca.scatter is not None
    torch.testing.assert_close(variance.scatter / 5, used.var(0, correction=0))
    torch.testing.assert_close(pca.scatter / 5, used.T.cov(correction=0))
    torch.testing.assert_close(pca.scatter.diagonal(), variance.scatter)


def test_principal_directions_of_a_model(llama: PreTrainedModel) -> None:
    chosen = choose_coordinates(llama, [batch_of(*DOCUMENTS)], HOOK, section("pca"), seed=0)
    assert chosen.basis is not None
    assert chosen.basis.shape == (5, 16)
    assert chosen.basis.dtype == torch.float32
    torch.testing.assert_close(chosen.basis @ chosen.basis.T, torch.eye(5), rtol=0, atol=1e-6)
    assert (chosen.scores.diff() <= 0).all()
    assert (chosen.basis.gather(1, chosen.basis.abs().argmax(1, keepdim=True)) > 0).all()


def test_principal_directions_are_no_more_than_the_activations_span(llama: PreTrainedModel) -> None:
    chosen = choose_coordinates(llama, [RIGHT], HOOK, section("pca", count=12), seed=0)
    assert chosen.basis is not None
    assert len(chosen.basis) == 4  # 5 activations
    assert float(chosen.scores[4]) < 1e-9 * float(chosen.scores[0])
    assert float(chosen.scores[3]) > 1e-6 * float(chosen.scores[0])


@pytest.mark.parametrize("method", [*METHODS, "random", "all"])
def test_count_above_the_width_keeps_all(llama: PreTrainedModel, method: str) -> None:
    chosen = choose_coordinates(llama, [batch_of(*DOCUMENTS, [7] * 12)], HOOK, section(method, count=99), seed=0)
    assert chosen.indices.dtype == torch.int64
    assert chosen.indices.tolist() == list(range(16))
    assert chosen.scores.shape == (16,)
    assert chosen.scores.dtype == torch.float64
    assert (chosen.basis is not None) == (method == "pca")


def test_random_reads_no_document(llama: PreTrainedModel) -> None:
    chosen = choose_coordinates(llama, [], HOOK, section("random"), seed=1)
    assert torch.equal(chosen.indices, coordinates_of(None, section("random"), 16, 1).indices)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_first_documents_count(llama: PreTrainedModel, method: str) -> None:
    batches = iter([batch_of(*DOCUMENTS[:2]), batch_of(*DOCUMENTS[2:]), batch_of([1, 2])])
    some = choose_coordinates(llama, batches, HOOK, section(method, documents=3), seed=0)
    assert len(list(batches)) == 1  # nor is more read
    cut = choose_coordinates(llama, [batch_of(*DOCUMENTS[:2]), batch_of(DOCUMENTS[2])], HOOK, section(method), seed=0)
    torch.testing.assert_close(some.scores, cut.scores, rtol=1e-4, atol=1e-6)
    assert torch.equal(some.indices, cut.indices)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_activations(llama: PreTrainedModel, method: str) -> None:
    with pytest.raises(StepFailed, match=f"method {method}: 0 activations are left of the first 32 documents"):
        choose_coordinates(llama, [batch_of([3], [4])], HOOK, section(method), seed=0)


@pytest.mark.parametrize("method", METHODS)
def test_activations_that_are_not_finite(method: str) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.get_input_embeddings().weight[9] = math.inf
    with pytest.raises(StepFailed, match="not finite"):
        choose_coordinates(model, [RIGHT], HOOK, section(method), seed=0)
