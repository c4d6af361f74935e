from pathlib import Path
from typing import Any

import pytest
import torch
from sae_streams import WIDTH, buffer_of, plan_of, planted, section, stream_of, trained
from torch import Tensor

from finescope import checkpoints
from finescope.config import SaeSection
from finescope.errors import StepFailed
from finescope.sae.fit import FitPlan, FitResult, fit, work_units
from finescope.sae.group import Group
from finescope.sae.trainer import Trainer

ARCHITECTURES = ["topk", "batch_topk", "jumprelu", "relu_l1"]


class Killed(Exception):
    """Stands for a process that dies."""


def weights(result: FitResult) -> dict[str, Tensor]:
    return result.autoencoder.state_dict()


def assert_same(left: FitResult, right: FitResult) -> None:
    for name, weight in weights(left).items():
        assert torch.equal(weight, weights(right)[name]), name
    assert left.history == right.history
    assert left.held_out.fvu == right.held_out.fvu
    assert (left.dead_share, left.trained_tokens) == (right.dead_share, right.trained_tokens)


def test_planted_directions_are_recovered() -> None:
    data, directions = planted(6300)
    (result,) = trained(data, section(epochs=15))
    learned = torch.nn.functional.normalize(result.autoencoder.decoder_weight, dim=1)
    cosine = (directions @ learned.T).max(dim=1).values
    assert cosine.mean() >= 0.95
    assert result.held_out.fvu < 0.1
    assert result.held_out.statistics.l0 <= 3


def test_what_is_held_out_is_measured_over_the_whole_of_it_and_not_trained_on() -> None:
    data, _ = planted(6300)
    (result,) = trained(data, section(epochs=1))
    assert (result.trained_tokens, result.held_out_tokens) == (6000, 300)
    held_out = data[:300] / result.autoencoder.scale
    error = result.autoencoder.reconstruction_error(data[:300], result.autoencoder(data[:300])).error.sum()
    exact = error / (held_out - held_out.mean(0)).square().sum()
    assert result.held_out.fvu == pytest.approx(exact.item(), rel=1e-4)
    changed = data.clone()
    changed[:300] = planted(300, seed=5)[0]
    (other,) = trained(changed, section(epochs=1))
    assert all(torch.equal(weight, weights(other)[name]) for name, weight in weights(result).items())


def test_standardisation_is_folded_in() -> None:
    """Shifting and stretching coordinates changes nothing but the folded weights."""
    data, _ = planted(2100)
    stretch, shift = torch.logspace(-1, 1, WIDTH), torch.linspace(-20, 20, WIDTH)
    (plain,) = trained(data, section(epochs=1, num_tokens=1800))
    (moved,) = trained(data * stretch + shift, section(epochs=1, num_tokens=1800))
    assert moved.held_out.fvu == pytest.approx(plain.held_out.fvu, rel=1e-2)
    norms = (moved.autoencoder.decoder_weight / moved.autoencoder.scale).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(32), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(moved.autoencoder.mean, (data[300:] * stretch + shift).mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_seed_same_weights_whatever_the_chunks(architecture: str) -> None:
    data, _ = planted(2200)
    settings = section(num_tokens=1900, epochs=2, buffer_mib=buffer_of(700), architecture=architecture)
    (first,), (second,) = trained(data, settings, chunk=100), trained(torch.cat([data[:100], data]), settings, chunk=200)
    # The chunk that is held out differs; what is trained on is the same.
    for name, weight in weights(first).items():
        assert torch.equal(weight, weights(second)[name]), name
    assert first.history == second.history
    (other,) = trained(data, settings.model_copy(update={"seed": 1}), chunk=100)
    assert not torch.equal(other.autoencoder.encoder_weight, first.autoencoder.encoder_weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_number_of_threads_has_no_say(architecture: str) -> None:
    """Batches beyond 32,768 values, where torch splits a sum among threads, and dead latents."""
    data = torch.randn(1500, 80, generator=torch.Generator().manual_seed(0))
    settings = section(num_tokens=1400, batch_tokens=500, epochs=4, dead_after_tokens=600, architecture=architecture, k=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results += trained(data, settings, chunk=100)
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_interrupted_twice_equals_uninterrupted(architecture: str, workers: int, tmp_path: Path) -> None:
    data, _ = planted(2600)
    settings = section(
        num_tokens=2400, epochs=2, buffer_mib=buffer_of(500), architecture=architecture, workers=workers, dead_after_tokens=300
    )
    variant = settings.model_copy(update={"seed": 3, "num_latents": 24})
    undisturbed = trained(data, settings, variant, chunk=70)
    chunks, home = data.split(70), str(tmp_path / "checkpoints")
    plan = plan_of((settings, variant), chunks, checkpoints=home)

    def run(allowed: float) -> list[FitResult]:
        told = [0]

        def progress(amount: int) -> None:
            told[0] += amount
            if told[0] > allowed:
                raise Killed

        return fit(plan, stream_of(chunks), torch.device("cpu"), progress)

    total = work_units(settings)
    for share in (0.35, 0.8):
        before = checkpoints.complete_steps(home)
        with pytest.raises(Killed):
            run(share * total)
        assert checkpoints.complete_steps(home)[0] > max(before, default=0)
        assert len(checkpoints.complete_steps(home)) <= checkpoints.KEPT
    for left, right in zip(undisturbed, run(float("inf")), strict=True):
        assert_same(left, right)
    # A training that ended and was not told so has nothing left to train.
    for left, right in zip(undisturbed, run(float("inf")), strict=True):
        assert_same(left, right)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    data, _ = planted(1000)
    settings = section(num_tokens=600, epochs=1)
    trained(data, settings, checkpoints=str(tmp_path))
    with pytest.raises(StepFailed, match="belongs to another training"):
        trained(data, settings.model_copy(update={"k": 4}), checkpoints=str(tmp_path))


def test_shares_of_workers_are_one_batch() -> None:
    """Half a batch from each of two shares takes the step that the whole batch takes, as the objective is a mean."""
    data, _ = planted(400)
    settings = section(batch_tokens=400)
    whole, shared = (Trainer(settings, torch.nn.functional.normalize(planted(32, seed=1)[0], dim=1)) for _ in range(2))
    whole.accumulate(data, 1)
    for half in data.split(200):
        shared.accumulate(half, 2)
    for trainer in (whole, shared):
        trainer.step(Group(), 10)
    for name, weight in whole.weights.named().items():
        torch.testing.assert_close(shared.weights.named()[name], weight, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.silent_tokens, shared.silent_tokens)


def test_several_dictionaries_are_those_of_single_trainings() -> None:
    data, _ = planted(2200)
    wide = torch.cat([data, data.flip(0) * 2], dim=1)
    first, second = (
        section(num_tokens=1900, epochs=2),
        section(num_tokens=1900, epochs=2, num_latents=20, k=2, architecture="relu_l1"),
    )
    chunks = wide.split(100)
    columns = ((0, WIDTH), (WIDTH, 2 * WIDTH))
    plan = FitPlan((first, second), columns, len(chunks), 1, None)
    together = fit(plan, stream_of(chunks), torch.device("cpu"), lambda _: None)
    for result, settings, (start, stop) in zip(together, (first, second), columns, strict=True):
        (alone,) = trained(wide[:, start:stop].contiguous(), settings, chunk=100)
        assert_same(result, alone)


def half_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Trainer.__init__

    def started(self: Trainer, *arguments: Any) -> None:
        start(self, *arguments)
        with torch.no_grad():
            self.weights.encoder_bias[::2] = -3.0

    monkeypatch.setattr(Trainer, "__init__", started)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auxk_revives_dead_latents(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    half_dead(monkeypatch)
    data, _ = planted(6300)
    settings = section(architecture=architecture, l1_coefficient=1e-3, l0_coefficient=1e-3, auxk=16, dead_after_tokens=1500)
    (without,), (revived,) = (
        trained(data, settings.model_copy(update={"auxk_coefficient": coefficient})) for coefficient in (0.0, 1 / 32)
    )
    assert without.dead_share >= 0.4
    assert revived.dead_share <= 0.15
    if architecture == "topk":
        assert revived.held_out.fvu < without.held_out.fvu


@pytest.mark.parametrize(
    ("architecture", "key", "weak", "strong"),
    [("relu_l1", "l1_coefficient", 0.0, 0.02), ("jumprelu", "l0_coefficient", 0.0, 0.03)],
)
def test_a_penalty_trades_reconstruction_for_sparsity(architecture: str, key: str, weak: float, strong: float) -> None:
    data, _ = planted(6300)
    (dense,), (sparse,) = (trained(data, section(architecture=architecture, epochs=6, **{key: by})) for by in (weak, strong))
    assert sparse.held_out.statistics.l0 < 0.8 * dense.held_out.statistics.l0
    assert dense.held_out.fvu < sparse.held_out.fvu < 0.6


def test_batch_topk_has_k_active_latents_on_the_average() -> None:
    """By the threshold that inference uses, on activations that were not trained on."""
    data, _ = planted(6300)
    (result,) = trained(data, section(architecture="batch_topk", epochs=6))
    assert result.held_out.statistics.l0 == pytest.approx(3, rel=0.15)
    counts = (result.autoencoder.encode(data[:300]) > 0).sum(1)
    assert counts.min() < counts.max()


def test_history_and_progress() -> None:
    data, _ = planted(6300)
    settings, told = section(epochs=2, buffer_mib=buffer_of(2500)), []
    chunks = data.split(300)
    (result,) = fit(plan_of((settings,), chunks), stream_of(chunks), torch.device("cpu"), told.append)
    assert sum(told) == work_units(settings)
    assert {name for _, name, _ in result.history} == {"fvu", "l0", "dead_share"}
    steps = [step for step, name, _ in result.history if name == "fvu"]
    assert steps == sorted(set(steps))
    values = [value for _, name, value in result.history if name == "fvu"]
    assert values[-1] < values[0]


def test_more_latents_than_activations() -> None:
    data, _ = planted(40)
    (result,) = trained(data, section(num_latents=64, epochs=1), chunk=4)
    assert torch.isfinite(result.autoencoder.decoder_weight).all()


def test_constant_coordinate_does_no_harm() -> None:
    data, _ = planted(1000)
    data[:, 3] = 7.0
    (result,) = trained(data, section(num_tokens=900, epochs=1), chunk=100)
    assert torch.isfinite(result.autoencoder(data)).all()


@pytest.mark.parametrize("count", [2, 3])
def test_too_few_activations(count: int) -> None:
    with pytest.raises(StepFailed, match="too few tokens"):
        trained(torch.randn(count, WIDTH), section(), chunk=2 if count == 3 else 1)


def test_equal_activations_have_no_fvu() -> None:
    with pytest.raises(StepFailed, match="all equal"):
        trained(torch.ones(300, WIDTH), section(num_tokens=280, epochs=1), chunk=20)


def test_divergence_is_told() -> None:
    data, _ = planted(1000)
    data[700] = float("inf")
    with pytest.raises(StepFailed, match="loss is nan"):
        trained(data, section(num_tokens=900, epochs=1, buffer_mib=buffer_of(300)), chunk=100)
    with pytest.raises(StepFailed, match="activations are not finite"):
        trained(data, section(num_tokens=900, epochs=1), chunk=100)


def test_the_learning_rate_falls_where_the_corpus_ends_early() -> None:
    """The end is foreseen by the chunks that are left, before the last fill, which is a small one."""
    data, _ = planted(2150)
    settings = section(num_tokens=100_000, epochs=1, buffer_mib=buffer_of(500), batch_tokens=100)
    rates: list[float] = []
    step = Trainer.step

    def watched(self: Trainer, *arguments: Any) -> None:
        step(self, *arguments)
        rates.append(self._optimiser.param_groups[0]["lr"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", watched)
        (result,) = trained(data, settings, chunk=50)
    assert result.trained_tokens == 2100
    assert len(rates) == 21
    assert rates[-1] < 0.3 * settings.learning_rate
    falling = [rate for rate in rates if rate < settings.learning_rate]
    assert len(falling) >= 5


def test_more_processes_than_chunks() -> None:
    with pytest.raises(StepFailed, match="workers: 3 processes need as many chunks"):
        trained(planted(300)[0], section(workers=3), chunk=100)


def test_names_of_variants() -> None:
    settings = SaeSection.model_validate({"variants": [{"seed": 1}, {"num_latents": 8192, "k": 16}]})
    assert [variant.name for variant in settings.variants] == ["seed-1", "num_latents-8192-k-16"]
    assert [item.num_latents for item in settings.dictionaries()] == [4096, 4096, 8192]
    for wrong in ([{}], [{"seed": 1}, {"seed": 1}], [{"k": 5000}]):
        with pytest.raises(ValueError, match="variants"):
            SaeSection.model_validate({"variants": wrong})
