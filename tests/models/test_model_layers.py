"""What the models add to the operator: windows and biases that follow the map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import widest_dilations
from models.layers import NeighborhoodAttention, PatchEmbed, fit_rpb, fit_window
from models.nat import ConvDownsample, ConvEmbed


@given(
    size=st.tuples(*[st.integers(1, 60)] * 2),
    window=st.tuples(*[st.integers(1, 13)] * 2),
    dilation=st.tuples(*[st.integers(1, 16)] * 2),
)
def test_a_fitted_window_is_legal_and_as_large_as_it_can_be(size, window, dilation):
    for n, k, d, fitted, spread in zip(
        size, window, dilation, *fit_window(list(size), list(window), list(dilation)), strict=True
    ):
        assert fitted * spread <= n
        assert fitted == k or fitted == n < k
        assert spread == d or fitted * (spread + 1) > n


@pytest.mark.parametrize(
    ("image_size", "kernel_size", "dilations"),
    [
        (224, 7, (8, 4, 2, 1)),
        (384, 7, (13, 6, 3, 1)),
        (384, 11, (8, 4, 2, 1)),
        ((640, 384), 7, (13, 6, 3, 1)),
        (32, 7, (1, 1, 1, 1)),
    ],
)
def test_widest_dilations_are_the_published_ones(image_size, kernel_size, dilations):
    assert widest_dilations(image_size, kernel_size) == dilations


def test_a_bias_is_cropped_about_offset_zero():
    rpb = torch.arange(2 * 13 * 13.0).view(2, 13, 13)
    fitted = fit_rpb(rpb, (7, 4))
    assert fitted.shape == (2, 13, 7)
    assert torch.equal(fitted, rpb[:, :, 3:10])
    assert torch.equal(fitted[:, 6, 3], rpb[:, 6, 6])


def test_a_bias_that_grows_keeps_its_shape():
    offsets = torch.arange(-13.0, 14)
    rpb = (offsets[:, None] + 0 * offsets)[None]
    grown = fit_rpb(rpb, (20, 7))
    assert grown.shape == (1, 39, 13)
    # A ramp stays a ramp, stretched, odd about offset zero and constant along the cropped axis.
    assert grown[0, 19].abs().max() < 1e-4
    torch.testing.assert_close(grown, -grown.flip(1))
    torch.testing.assert_close(grown[..., :1].expand_as(grown), grown)
    assert (grown[0, 2:-2].diff(dim=0) > 0).all()


def dense(attention, x):
    """Full attention with the central part of the bias, by explicit indices."""
    height, width = x.shape[1:3]
    query, key, value = (part.flatten(1, 2).transpose(1, 2) for part in attention.project(x))
    row, column = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    centre = attention.kernel_size - 1
    bias = attention.rpb[:, row - row[:, None] + centre, column - column[:, None] + centre]
    weights = (query @ key.mT * query.shape[-1] ** -0.5 + bias).softmax(-1)
    return attention.proj((weights @ value).transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (5, 3), (1, 6)])
@torch.no_grad()
def test_a_map_no_larger_than_the_window_is_attended_to_as_a_whole(size, is_global):
    torch.manual_seed(0)
    attention = NeighborhoodAttention(64, kernel_size=7, dilation=4, is_global=is_global).double()
    torch.nn.init.normal_(attention.rpb)
    x = torch.randn(2, *size, 64, dtype=torch.float64)
    torch.testing.assert_close(attention(x), dense(attention, x))


@torch.no_grad()
def test_one_axis_may_shrink_alone():
    """A map of 3 x 20 under a 7 x 7 window is a 3 x 7 window with the middle rows of the bias."""
    torch.manual_seed(0)
    attention = NeighborhoodAttention(32, kernel_size=7, dilation=2).double()
    assert attention.window_for(3, 20) == ([3, 7], [1, 2])
    assert attention.window_for(96, 96) == ([7, 7], [2, 2])
    x = torch.randn(1, 3, 20, 32, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        attention(x)[0, 1, 0].sum().backward()
    seen = x.grad.abs().sum(-1)[0].gt(0)
    assert seen[:, ::2][:, :7].all()
    assert seen.sum() == 21


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="dim = 48 is not a multiple of head_dim = 32"):
        NeighborhoodAttention(48, kernel_size=7)


@pytest.mark.parametrize("embed", [ConvEmbed(3, 32), PatchEmbed(3, 32, 4)])
def test_tokens_are_contiguous_channels_last(embed):
    tokens = embed(torch.randn(2, 3, 32, 36))
    assert tokens.shape == (2, 8, 9, 32)
    assert tokens.is_contiguous()


def test_downsampling_stays_channels_last():
    assert ConvDownsample(32)(torch.randn(2, 7, 8, 32)).is_contiguous()
