import jax
import pytest

from tests.networks.test_unet import build, inputs, outputs_of_blocks


def shapes_of(**overrides):
    network = build(True, name="efficient_unet", **overrides)
    args = inputs(super_resolution=True)
    params = jax.eval_shape(network.init, jax.random.key(0), *args)
    return params, outputs_of_blocks(network, params, args)


def test_only_the_ends_work_at_full_resolution():
    _, shapes = shapes_of()
    sizes = {name: shape[1] for name, shape in shapes.items() if len(shape) == 4}
    assert {name for name, size in sizes.items() if size == 16} == {
        *("conv_in", "up0_resample", "norm_out", "conv_out")
    }
    assert sizes["down0_block0"] == sizes["up0_block0"] == 8
    assert sizes["down1_block0"] == sizes["up1_block0"] == 4


def test_levels_stride_first_and_attend_once():
    params, shapes = shapes_of(num_res_blocks=(1, 3))
    assert shapes["down0_resample"] == (2, 8, 8, 8)
    assert shapes["down1_resample"] == (2, 4, 4, 16)
    assert {name for name in params if name.endswith("attention")} == {
        *("down0_attention", "up0_attention")
    }
    blocks = {name for name in params if "_block" in name}
    assert blocks == {"down0_block0", "up0_block0"} | {
        f"{way}1_block{i}" for way in ("down", "up") for i in range(3)
    }
    assert all("skip" in params[name] for name in blocks)


@pytest.mark.parametrize("overrides", [{"patch_size": 2}, {"resample": "biggan"}])
def test_what_it_does_not_know_is_refused(overrides):
    with pytest.raises(ValueError, match="efficient"):
        shapes_of(**overrides)
