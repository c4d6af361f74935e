import pytest

from finescope.models.hooks import HookPoint, Site
from finescope.sae.hook_names import hook_of, lens_name, module_name, normed_outputs

SITES: tuple[Site, ...] = ("residual", "attention", "mlp", "mlp_hidden")


@pytest.mark.parametrize("site", SITES)
def test_lens_names_there_and_back(site: Site) -> None:
    assert hook_of(lens_name(HookPoint(10, site))) == HookPoint(10, site)


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("blocks.9.hook_resid_post", HookPoint(10)),
        ("blocks.9.hook_resid_pre", HookPoint(9)),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.9.hook_resid_mid", None),
        ("blocks.9.attn.hook_z", None),
        ("layers.9", HookPoint(10)),
        ("model.layers.9", HookPoint(10)),
        ("model.language_model.layers.9", HookPoint(10)),
        ("transformer.h.9", HookPoint(10)),
        ("gpt_neox.layers.9.attention", HookPoint(10, "attention")),
        ("layers.9.self_attn", HookPoint(10, "attention")),
        ("layers.9.self_attn.o_proj", HookPoint(10, "attention")),
        ("h.9.mlp.c_proj", HookPoint(10, "mlp")),
        ("layers.9.mlp.up_proj", None),
        ("encoder.layers.9", None),
        ("layers.nine", None),
        ("embed_tokens", None),
    ],
)
def test_names_of_others(name: str, hook: HookPoint | None) -> None:
    assert hook_of(name) == hook


@pytest.mark.parametrize(
    ("module", "site", "expected"),
    [
        ("model.layers.9", "residual", "layers.9"),
        ("transformer.h.9.attn.c_proj", "attention", "h.9.attn.c_proj"),
        ("blocks.9.hook_mlp_out", "mlp", "layers.9.mlp"),
        ("blocks.9.hook_resid_post", "residual", "layers.9"),
    ],
)
def test_module_names(module: str, site: Site, expected: str) -> None:
    assert module_name(HookPoint(10, site), module) == expected
    assert hook_of(expected) == HookPoint(10, site)


def test_families_with_a_norm_after_the_sublayer() -> None:
    assert [name for name in ("llama", "gemma2", "gemma3_text", "olmo2", "gpt2", "unknown") if normed_outputs(name)] == [
        "gemma2",
        "gemma3_text",
        "olmo2",
    ]
