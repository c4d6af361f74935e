from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from finescope.sae import sparse
from finescope.sae.sparse import Pattern, decode_at, encode_at, rows_of

ROWS, LATENTS, WIDTH = 7, 11, 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    """Any number of entries a row, none included, no latent twice in a row."""
    rows = [draw(st.lists(st.integers(0, LATENTS - 1), unique=True)) for _ in range(ROWS)]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return Pattern(torch.tensor([latent for row in rows for latent in row], dtype=torch.int64), offsets, LATENTS)


def dense(pattern: Pattern, values: Tensor) -> Tensor:
    """[N, L] with the entries' values, zero elsewhere."""
    return torch.zeros(ROWS, LATENTS).index_put((pattern.rows(), pattern.ids), values)


@pytest.fixture(autouse=True, params=["sparse", "dense"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Either way, whatever the share of entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_DENSE_SHARE", 1.0 if request.param == "sparse" else -1.0)
        yield


_FIXTURES = [HealthCheck.function_scoped_fixture]


@given(pattern=patterns())
@settings(max_examples=40, deadline=None, suppress_health_check=_FIXTURES)
def test_products_are_the_dense_ones(pattern: Pattern) -> None:
    values, latents, activations = random(len(pattern.ids)), random(LATENTS, WIDTH, seed=1), random(ROWS, WIDTH, seed=2)
    full = dense(pattern, values)
    torch.testing.assert_close(pattern.mix(values, latents), full @ latents)
    torch.testing.assert_close(pattern.collect(values, activations), full.T @ activations)
    every = activations @ latents.T
    torch.testing.assert_close(pattern.products(activations, latents), every[pattern.rows(), pattern.ids])


@given(pattern=patterns(), known=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=_FIXTURES)
def test_gradients_are_those_of_autograd_on_dense_products(pattern: Pattern, known: bool) -> None:
    batch = random(ROWS, WIDTH, seed=3)
    leaves = [random(LATENTS, WIDTH, seed=4), random(LATENTS, seed=5), random(LATENTS, WIDTH, seed=6), random(WIDTH, seed=7)]
    weigh = random(ROWS, WIDTH, seed=8)

    def sparse(encoder: Tensor, bias: Tensor, decoder: Tensor, decoder_bias: Tensor) -> Tensor:
        centred = batch - decoder_bias.detach()
        pre = (centred @ encoder.detach().T + bias.detach())[pattern.rows(), pattern.ids] if known else None
        values = encode_at(pattern, centred, encoder, bias, decoder_bias, pre).relu()
        return decode_at(pattern, values, decoder)

    def plain(encoder: Tensor, bias: Tensor, decoder: Tensor, decoder_bias: Tensor) -> Tensor:
        every = ((batch - decoder_bias) @ encoder.T + bias).relu()
        return (every * dense(pattern, torch.ones(len(pattern.ids)))) @ decoder

    gradients = []
    for function in (sparse, plain):
        given_leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        out = function(*given_leaves)
        (out * weigh).sum().backward()
        gradients.append([out.detach(), *(leaf.grad for leaf in given_leaves)])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected if expected is not None else torch.zeros_like(found), rtol=1e-4, atol=1e-5)


def test_a_pattern_of_equal_rows() -> None:
    pattern = rows_of(torch.tensor([[3, 1], [0, 3]]), 4)
    assert pattern.rows().tolist() == [0, 0, 1, 1]
    activations = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    collected = pattern.collect(torch.tensor([1.0, 2.0, 3.0, 4.0]), activations)
    assert collected.tolist() == [[30.0, 60.0], [2.0, 4.0], [0.0, 0.0], [41.0, 82.0]]


def test_many_latents_keep_their_order() -> None:
    """Beyond the range of the small integers that are sorted where they do."""
    latents = 2**16 + 10
    ids = torch.tensor([[latents - 1, 5], [2**15, latents - 1]])
    collected = rows_of(ids, latents).collect(torch.ones(4), torch.tensor([[1.0], [10.0]]))
    assert collected[[5, 2**15, latents - 1], 0].tolist() == [1.0, 10.0, 11.0]
    assert collected.count_nonzero() == 3


@pytest.mark.parametrize("coordinates", [100, 256])
def test_number_of_threads_has_no_say_in_full_patterns(coordinates: int) -> None:
    """A few dead latents make a nearly full pattern, whose products are dense and narrow."""
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(257, coordinates, generator=generator)
    before = torch.get_num_threads()
    try:
        for num_latents in range(1, 49):
            pattern = rows_of(torch.arange(num_latents).expand(257, num_latents), num_latents)
            values = torch.rand(257 * num_latents, generator=generator)
            latents = torch.randn(num_latents, coordinates, generator=generator)
            found = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                products = pattern.products(activations, latents)
                found.append((pattern.mix(values, latents), pattern.collect(values, activations), products))
            for others in found[1:]:
                assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True)), num_latents
    finally:
        torch.set_num_threads(before)
