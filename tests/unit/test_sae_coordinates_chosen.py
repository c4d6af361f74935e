"""Which coordinates are kept, given sums that are known by hand."""

import torch

from finescope.config_sae import CoordinatesSection
from finescope.sae.coordinates import Sums, coordinates_of, merge, reads_activations

METHODS = ("jacobian", "magnitude", "variance", "pca", "random", "all")


def section(method: str, **settings: object) -> CoordinatesSection:
    return CoordinatesSection.model_validate({"method": method, "count": 5, **settings})


def made_up(values: list[list[float]], method: str) -> Sums:
    """The sums of given observations, one at a time."""
    rows = torch.tensor(values, dtype=torch.float64)
    width = rows.shape[1]
    scatter = {"variance": torch.zeros(width).double(), "pca": torch.zeros(width, width).double()}.get(method)
    return merge(Sums(1, row, scatter) for row in rows)


def test_magnitude_and_jacobian_by_hand() -> None:
    sums = made_up([[1.0, 0.0, 4.0], [3.0, 2.0, 0.0]], "magnitude")
    magnitude = coordinates_of(sums, section("magnitude", count=2), 3, 0)
    assert magnitude.scores.tolist() == [2.0, 1.0, 2.0]
    assert magnitude.indices.tolist() == [0, 2]
    sums = made_up([[1.0, 0.0, 9.0], [7.0, 2.0, 9.0]], "jacobian")
    jacobian = coordinates_of(sums, section("jacobian", count=1), 3, 0)
    assert jacobian.scores.tolist() == [2.0, 1.0, 3.0]
    assert jacobian.indices.tolist() == [2]


def test_variance_by_hand_and_of_large_means() -> None:
    """A sum of squares minus a squared sum would be lost in float64: 1e9 + {0, 1, 2, 3} has variance 1.25."""
    sums = made_up([[1e9 + i, -2.0 * i, 7.0] for i in range(4)], "variance")
    chosen = coordinates_of(sums, section("variance", count=2), 3, 0)
    assert chosen.scores.tolist() == [1.25, 5.0, 0.0]
    assert chosen.indices.tolist() == [0, 1]
    assert chosen.basis is None


def test_principal_directions_by_hand() -> None:
    """Deviations (+-3, +-4, 0) and (-+0.8, +-0.6, 0) from the mean (10, 20, 30): variances 12.5, 0.5, 0."""
    deviations = [[3.0, 4.0], [-3.0, -4.0], [-0.8, 0.6], [0.8, -0.6]]
    sums = made_up([[10.0 + x, 20.0 + y, 30.0] for x, y in deviations], "pca")
    chosen = coordinates_of(sums, section("pca", count=2), 3, 0)
    assert chosen.indices.tolist() == [0, 1, 2]
    torch.testing.assert_close(chosen.scores, torch.tensor([12.5, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(chosen.basis, torch.tensor([[0.6, 0.8, 0.0], [0.8, -0.6, 0.0]]))


def test_of_equal_scores_the_lower_index_is_kept() -> None:
    sums = made_up([[0.5] * 40 + [1.0] * 40 + [0.25] * 20], "magnitude")
    assert coordinates_of(sums, section("magnitude", count=30), 100, 0).indices.tolist() == list(range(40, 70))
    assert coordinates_of(sums, section("magnitude", count=43), 100, 0).indices.tolist() == [0, 1, 2, *range(40, 80)]


def test_random_is_drawn_from_the_seed_and_all_is_all() -> None:
    assert [method for method in METHODS if not reads_activations(method)] == ["random", "all"]
    picks = [coordinates_of(None, section("random"), 16, seed).indices for seed in (0, 0, 1)]
    assert torch.equal(picks[0], picks[1])
    assert not torch.equal(picks[0], picks[2])
    assert all(len(set(pick.tolist())) == 5 and pick.tolist() == sorted(pick.tolist()) for pick in picks)
    assert coordinates_of(None, section("all"), 16, 0).indices.tolist() == list(range(16))
