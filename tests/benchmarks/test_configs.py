"""The benchmarks' configs are such as the package takes."""


def test_the_network_beside_diffusers_has_no_classes():
    import unet

    config = unet.config_of(16)
    assert config.train.batch_size == 16
    assert config.stage.num_classes == 0


def test_an_accelerators_batch_replaces_the_configs():
    import accelerator_part

    config = accelerator_part.config_of("cifar10_sr32:gpu", 48, small=False)
    assert config.train.batch_size == 48
    assert config.stage.network.dtype == "bfloat16"
