from pathlib import Path

from tiny_models import tiny_model

from finescope.evaluation.speed import parameter_bytes, throughput, weight_bytes


def test_throughput_has_a_figure_for_each_repeat() -> None:
    model = tiny_model("llama").train()
    measured = throughput(model, batch_size=2, prompt_tokens=8, decode_tokens=3, repeats=3)
    assert len(measured.prefill_repeats) == len(measured.decode_repeats) == 3
    assert measured.prefill == sorted(measured.prefill_repeats)[1] > 0
    assert measured.decode == sorted(measured.decode_repeats)[1] > 0
    assert model.training


def test_bytes_on_disk_and_in_memory(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameter_bytes(model) == 4 * parameters
    assert parameter_bytes(model.half()) == 2 * parameters
    assert weight_bytes(str(tmp_path)) == (tmp_path / "model.safetensors").stat().st_size
