import pytest
import torch
from tiny_models import tiny_model

from finescope.evaluation import speed
from finescope.evaluation.speed import Shape, gain_over_flops, throughputs


def test_models_are_measured_in_turns(monkeypatch) -> None:
    models = {name: tiny_model("llama", seed=seed) for seed, name in enumerate(("base", "pruned"))}
    order: list[str] = []
    clock = iter(range(10_000))
    for name, model in models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    # A clock that goes on by one when it is read: every prefill takes 1 s and so does all of a decoding.
    monkeypatch.setattr(speed, "_now", lambda _: (float(next(clock)), 0.0))
    seen: list[int] = []
    found = throughputs(models, Shape(documents=2, prompt_tokens=8, decode_tokens=3), repeats=3, progress=seen.append)
    assert order == (["base"] * 4 + ["pruned"] * 4) * 4
    assert seen == [1] * 8
    for name, measured in found.items():
        assert (measured.prefill, measured.decode) == (16.0, 6.0)
        assert len(measured.rounds) == 3
        assert measured.peak_bytes > sum(4 * parameter.numel() for parameter in models[name].parameters())


def test_all_models_read_the_same_prompt_that_each_has_words_for() -> None:
    prompts: list[torch.Tensor] = []
    models = {"large": tiny_model("llama", vocab_size=64), "small": tiny_model("llama", vocab_size=9)}
    for model in models.values():
        model.get_input_embeddings().register_forward_pre_hook(lambda _, arguments: prompts.append(arguments[0]))
    throughputs(models, Shape(1, 12, 1), repeats=1, progress=lambda _: None)
    prompts = [prompt for prompt in prompts if prompt.shape[1] == 12]
    assert len(prompts) == 4
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)
    assert int(prompts[0].max()) < 9


def test_the_gain_is_set_against_the_operations_saved() -> None:
    # A fifth of the operations saved could be 1.25 times as fast; 1.2 times is four fifths of that.
    assert gain_over_flops((100.0, 1000), (120.0, 800)) == pytest.approx(0.8)
    assert gain_over_flops((100.0, 1000), (125.0, 800)) == pytest.approx(1.0)
    assert gain_over_flops((100.0, 1000), (90.0, 800)) == pytest.approx(-0.4)
    assert gain_over_flops((100.0, 1000), (100.0, 1000)) is None
