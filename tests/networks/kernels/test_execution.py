"""How a network is computed changes nothing of what it computes; and how it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cascaded_diffusion.networks import initializers
from cascaded_diffusion.networks.kernels.execution import Execution
from cascaded_diffusion.networks.unet import NETWORKS
from tests.networks.test_unet import (
    ONE_LEVEL,
    build,
    compiled_with_dropout,
    inputs,
    random_params,
)
from tests.xla import QUICK, compiled_with


def _gradients(networks, args, params):
    """Loss and gradient of each; one program, which computes once what they have in common."""
    key = jax.random.key(3)

    def loss(params, network):
        return (network.apply(params, *args, dropout_key=key) ** 2).mean()

    both = jax.jit(lambda params: [jax.value_and_grad(loss)(params, n) for n in networks])
    return both(params)


def _gathering(gathered, placed, remat_sizes):
    """An execution that notes what is gathered and placed."""

    def gather(part, path, dtype):
        gathered.append(path)
        return jax.tree.map(lambda x: x * 1.0, part)

    return Execution(
        gather=gather,
        constrain_sharding=lambda h: placed.append(h.shape) or h,
        remat_sizes=remat_sizes,
    )


@pytest.mark.parametrize(
    ("options", "execution"),
    [
        ({"name": "unet", **ONE_LEVEL}, Execution(remat_sizes=(16,))),
        # Some blocks are computed again and some are not; all gather.
        ({"name": "efficient_unet"}, _gathering([], [], (8,))),
    ],
    ids=NETWORKS,
)
def test_rematerialization_and_gathering_change_nothing(options, execution):
    network, args = build(True, dropout_rate=0.3, **options), inputs(True)
    params = random_params(network.init, *args)
    expected, found = _gradients([network, network.with_execution(execution)], args, params)
    # Dropout, too, is the same.
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found[1], expected[1]
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_all_parameters_are_gathered_and_feature_maps_of_all_sizes_placed(name):
    network, args = build(True, name=name), inputs(True)
    params = jax.eval_shape(network.init, jax.random.key(0), *args)
    gathered, placed = [], []
    ours = network.with_execution(_gathering(gathered, placed, (8,)))
    jax.eval_shape(ours.apply, params, *args)
    assert {path[0] for path in gathered} == set(params)
    assert {shape[1] for shape in placed} >= {16, 8}


def test_rematerialized_blocks_keep_less():
    network, args = build(), inputs()
    params = jax.eval_shape(network.init, jax.random.key(0), *args)

    def residuals(network):
        back = jax.eval_shape(lambda p: jax.vjp(lambda p: network.apply(p, *args), p)[1], params)
        return sum(np.size(x) for x in jax.tree.leaves(back))

    none = residuals(network)
    some = residuals(network.with_execution(Execution(remat_sizes=(16,))))
    everything = residuals(network.with_execution(Execution(remat_sizes=(16, 8))))
    assert everything < some < none


def test_dropout_is_a_function_of_the_row():
    apply, params, (xt, logsnr, cond) = compiled_with_dropout()
    key = jax.random.key(5)
    whole = apply(params, xt, logsnr, cond, dropout_key=key)
    rows = jnp.asarray([3, 1])
    part = apply(
        params,
        xt[rows],
        logsnr[rows],
        jax.tree.map(lambda x: x[rows], cond),
        dropout_key=key,
        rows=rows,
    )
    np.testing.assert_allclose(part, whole[rows], atol=1e-5)
    other = apply(params, xt, logsnr, cond, dropout_key=jax.random.key(6))
    assert np.abs(whole - other).max() > 1e-3  # whatever is dropped differs


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_parameters_have_the_spread_of_their_fan_in(name):
    network = build(True, name=name, channels=32, num_heads=1)
    # NumPy's functions of JAX's arrays would be JAX's, which compiles them for each shape.
    params = jax.tree.map(np.asarray, jax.jit(network.init)(jax.random.key(0), *inputs(True)))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    zero, drawn = [], []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [k.key for k in keys]
        if names[-1] != "kernel":
            continue
        (zero if not np.any(leaf) else drawn).append("/".join(names))
        if np.any(leaf):
            spread = np.std(leaf) * np.sqrt(np.prod(leaf.shape[:-1]))
            assert 0.85 < spread < 1.15, names
            assert np.abs(leaf).max() * np.sqrt(np.prod(leaf.shape[:-1])) < 2.3
    assert all(path.split("/")[-2] in ("conv1", "out", "scale_shift", "conv_out") for path in zero)
    assert any("conv0" in path for path in drawn)
    # No number is handed out twice.
    numbers = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params) if x.ndim > 1])
    numbers = numbers[numbers != 0]
    assert len(np.unique(numbers)) > 0.99 * len(numbers)


@compiled_with(QUICK)  # without optimization one program and its parts round differently
def test_initial_parameters_are_a_function_of_the_key_alone():
    network, args = build(name="one_layer"), inputs()
    first, again, other = (network.init(jax.random.key(k), *args) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    # Operation by operation, not as one program, they are the same but for rounding.
    eager = type(network).init.__wrapped__(network, jax.random.key(0), *args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), first, eager)
    assert not np.allclose(first["conv_in"]["kernel"], other["conv_in"]["kernel"])


def test_one_draw_serves_all_parameters():
    network, args = build(), inputs()
    jaxpr = str(jax.make_jaxpr(network.init)(jax.random.key(0), *args))
    assert jaxpr.count("erf_inv") == 1
    # Outside, an initializer draws for itself.
    kernel = initializers.fan_in_normal(jax.random.key(0), (64, 64))
    assert 0.9 < float(kernel.std()) * 8 < 1.1
