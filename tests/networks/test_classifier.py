import jax
import numpy as np
import pytest

from cascaded_diffusion.networks import classifier as lib


def _count(module, size):
    shapes = jax.eval_shape(
        lambda k: lib.init_classifier(module, k, (1, size, size, 3)), jax.random.key(0)
    )
    return sum(x.size for x in jax.tree.leaves(shapes["params"]))


def test_resnet50_is_the_published_network():
    assert _count(lib.CLASSIFIERS["resnet50"](num_classes=1000), 224) == 25_557_032


@pytest.mark.parametrize(("network", "features"), [("resnet", 128), ("resnet50", 2048)])
def test_features_and_logits(network, features):
    module = lib.CLASSIFIERS[network](num_classes=7)
    variables = jax.eval_shape(
        lambda k: lib.init_classifier(module, k, (1, 64, 64, 3)), jax.random.key(0)
    )
    image = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    outputs = jax.eval_shape(module.apply, variables, image)
    assert [x.shape for x in outputs] == [(2, features), (2, 7)]


def test_batch_statistics_move_while_training_alone():
    module = lib.CLASSIFIERS["resnet"](num_classes=3)
    variables = lib.init_classifier(module, jax.random.key(0), (1, 8, 8, 1))
    image = jax.random.normal(jax.random.key(1), (4, 8, 8, 1)) + 2
    _, updated = module.apply(variables, image, train=True, mutable=["batch_stats"])
    before, after = (jax.tree.leaves(v["batch_stats"]) for v in (variables, updated))
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(before, after, strict=True))
    # While testing, an image's logits depend on no other image.
    alone = module.apply(variables, image[:1])[1]
    together = module.apply(variables, image)[1][:1]
    np.testing.assert_allclose(alone, together, atol=1e-5)
    flat = lib.flatten_params(variables)
    assert {name.split("/")[0] for name in flat} == {"params", "batch_stats"}
