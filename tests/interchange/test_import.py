"""Runs made of weights from elsewhere, and what is refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from cascaded_diffusion import export_weights, import_weights
from cascaded_diffusion.cascade.build import build_stage
from cascaded_diffusion.errors import UserError
from cascaded_diffusion.interchange import exporting, importing, names
from cascaded_diffusion.interchange.published import PUBLISHED
from cascaded_diffusion.networks.classifier import flatten_params
from cascaded_diffusion.runtime.checkpoint import load_ema_params
from cascaded_diffusion.runtime.run_folder import RunFolder
from tests.interchange import reference
from tests.interchange.files import write_pt
from tests.tiny import ROOT, config_values, run_config_from, with_overrides

SMALL = {
    "stage.network.channels": 32,
    "stage.network.attention_resolutions": (8,),
    "stage.network.num_head_channels": 16,
}
FLAGS = [f"--config.{key}={value}" for key, value in SMALL.items()]
NETWORK = reference.Guided(
    size=16,
    channels=32,
    mults=(1, 2),
    attention=(8,),
    head_channels=16,
    new_order=True,
    classes=10,
)


@pytest.fixture(scope="module")
def tensors():
    drawn = reference.Tensors()
    NETWORK(drawn, np.zeros((1, 3, 16, 16)), [0], [0])
    return dict(drawn)


def run_import(path, workdir, *flags):
    config = f"--config={ROOT}/configs/adm_base64.py:smoke"
    return import_weights.main(
        [
            *("prog", "--source=guided_diffusion", config, "--qkv_order=new", *FLAGS, *flags),
            *(f"--workdir={workdir}", str(path)),
        ]
    )


@pytest.fixture(scope="module")
def imported(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("import")
    write_pt(folder / "weights.pt", tensors)
    assert run_import(folder / "weights.pt", folder / "run") == 0
    return RunFolder(folder / "run")


def params_of(folder):
    stage = build_stage(folder.read_config().stage)
    chosen = folder.chosen()
    params = load_ema_params(folder, chosen.step, chosen.ema_decay, stage.shapes()[0])
    return flatten_params(jax.device_get(params))


def test_an_imported_run_says_where_its_weights_are_from(imported, tensors):
    assert imported.chosen().step == 0
    about = json.loads((imported.path / "imported.json").read_text())
    assert about["file"] == "weights.pt"
    assert about["parameters"] == sum(x.size for x in tensors.values())
    assert re.fullmatch("[0-9a-f]{64}", about["sha256"])
    assert not list(imported.path.parent.glob(".*importing*"))


def test_import_export_import_is_the_same_to_the_bit(imported, tensors, tmp_path):
    out = tmp_path / "out.safetensors"
    argv = ["prog", f"--workdir={imported.path}", "--source=guided_diffusion", "--qkv_order=new"]
    assert export_weights.main([*argv, f"--output={out}"]) == 0
    exported = load_file(out)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)
    assert run_import(out, tmp_path / "again") == 0
    first, second = params_of(imported), params_of(RunFolder(tmp_path / "again"))
    assert first.keys() == second.keys()
    for path, x in first.items():
        np.testing.assert_array_equal(x, second[path], err_msg=path)
    with pytest.raises(UserError, match="is there already; name a new one"):
        export_weights.main([*argv, f"--output={out}"])


def test_a_run_that_is_there_stays(imported):
    before = sorted(imported.path.rglob("*"))
    with pytest.raises(UserError, match="there is something already; name a new folder"):
        run_import(imported.path.parent / "weights.pt", imported.path)
    assert sorted(imported.path.rglob("*")) == before


def test_what_a_killed_import_left_is_no_run_and_in_nobodys_way(tensors, tmp_path):
    write_pt(tmp_path / "weights.pt", tensors)
    left = tmp_path / ".run.importing.1" / "checkpoints" / "0"
    left.mkdir(parents=True)
    assert run_import(tmp_path / "weights.pt", tmp_path / "run") == 0
    assert not left.exists()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_converted_and_said(tensors, tmp_path, capsys, dtype):
    halves = {name: x.astype(dtype) for name, x in tensors.items()}
    write_pt(tmp_path / "half.pt", halves)
    assert run_import(tmp_path / "half.pt", tmp_path / "run") == 0
    assert f"({np.dtype(dtype)})" in capsys.readouterr().out
    found = params_of(RunFolder(tmp_path / "run"))["conv_in/kernel"]
    np.testing.assert_array_equal(
        found, halves["input_blocks.0.0.weight"].astype(np.float32).transpose(2, 3, 1, 0)
    )


def test_a_wrapper_s_prefix_is_taken_off(tensors, tmp_path):
    write_pt(tmp_path / "ddp.pt", {f"module.{name}": x for name, x in tensors.items()})
    assert run_import(tmp_path / "ddp.pt", tmp_path / "run") == 0


def _without(tensors, *gone):
    return {name: x for name, x in tensors.items() if name not in gone}


SIX = [f"input_blocks.1.0.{part}.bias" for part in ("in_layers.0", "in_layers.2", "emb_layers.1")]
SIX += [f"input_blocks.1.0.{part}.bias" for part in ("out_layers.0", "out_layers.3")] + [
    "input_blocks.0.0.bias"
]
WRONG = {
    "missing": (lambda t: _without(t, "out.2.bias"), "1 tensors are missing: out.2.bias, in stage"),
    "six missing": (lambda t: _without(t, *SIX), r"6 tensors are missing: \S+, .* \.\.\., in"),
    "surplus": (
        lambda t: {**t, "extra.weight": t["out.2.bias"]},
        "1 tensors have no place: extra.weight, in stage 'adm_base64'",
    ),
    "shape": (
        lambda t: {**t, "out.2.bias": np.zeros(3, np.float32)},
        r"tensor out.2.bias is \(3,\), expected \(6,\) for stage 'adm_base64'",
    ),
    "not finite": (
        lambda t: {**t, "out.2.bias": np.full(6, np.nan, np.float32)},
        "tensor out.2.bias has values that are not finite",
    ),
    "a classifier": (
        lambda t: {n: x for n, x in t.items() if "output_blocks" not in n and "middle" not in n},
        "it is a classifier of guided-diffusion, not the U-Net of stage 'adm_base64'",
    ),
    "another family": (
        lambda t: {"down_blocks.0.resnets.0.conv1.weight": t["out.2.bias"]},
        r"145 tensors are missing: \S+, .* \.\.\.; 1 tensors have no place: down_blocks",
    ),
    "Stable Diffusion": (
        lambda t: {f"model.diffusion_model.{n}": x for n, x in t.items()},
        "it is a latent diffusion model",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_another_networks_weights_are_refused_in_one_line(kind, tensors, tmp_path):
    change, message = WRONG[kind]
    write_pt(tmp_path / "weights.pt", change(tensors))
    with pytest.raises(UserError, match=message) as error:
        run_import(tmp_path / "weights.pt", tmp_path / "run")
    assert str(error.value).startswith(f"FILE={tmp_path}/weights.pt: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


NO_WEIGHTS = {
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
    "a page": (b"<!DOCTYPE html><html>not found</html>", "a page of HTML"),
    "an answer": (b'<?xml version="1.0"?><Error/>', "an answer in XML"),
    "nothing": (b"", "is empty; download it again"),
    "text": (b"hello", "cannot be read: not a whole state dict of tensors"),
    "a trap": (b"cos\nsystem\n(S'touch trapped'\ntR.", "'os system', which no state dict"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_file_of_weights_is_said(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, message = NO_WEIGHTS[kind]
    (tmp_path / "weights.pt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        run_import(tmp_path / "weights.pt", tmp_path / "run")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_is_cut_off_is_refused(suffix, imported, tensors, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        write_pt(path, tensors)
    else:
        exporting._write_safetensors(path, tensors, {})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot be read: not a whole"):
        run_import(path, tmp_path / "run")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source=guided_diffusion", "--model=imagenet65", "FILE"], "there is imagenet64, "),
        (["--source=diffusers", "--model=imagenet64", "FILE"], "none: give --config"),
        (["--source=guided_diffusion", "FILE"], "--config is missing"),
        (["--source=guided_diffusion", "--model=imagenet64"], "FILE is missing"),
        (["--source=guided_diffusion", "--model=imagenet64", "FILE", "B"], "'B' is not a flag"),
        (["--source=guided_diffusion", "--model=imagenet64", "nothing.pt"], "no such file"),
        (["--model=imagenet64", "FILE"], "--source is missing"),
    ],
)
def test_bad_commands_are_one_line(argv, message, tmp_path):
    (tmp_path / "FILE").write_bytes(b"x")
    argv = [str(tmp_path / "FILE") if arg == "FILE" else arg for arg in argv]
    with pytest.raises(UserError, match=message):
        import_weights.main(["prog", f"--workdir={tmp_path / 'run'}", *argv])


def test_another_published_network_is_recognised_by_its_size(tensors, tmp_path, monkeypatch):
    models = PUBLISHED["guided_diffusion"]
    size = sum(x.size for x in tensors.values())
    monkeypatch.setitem(
        models, "imagenet128", dataclasses.replace(models["imagenet128"], parameters=size)
    )
    write_pt(tmp_path / "weights.pt", tensors)
    with pytest.raises(UserError, match=r"parameters as --source=guided_diffusion --model=imagene"):
        run_import(
            tmp_path / "weights.pt",
            tmp_path / "run",
            "--config.stage.network.attention_resolutions=(16,)",
        )


def test_digests_are_compared_where_one_is_published(tensors, tmp_path, monkeypatch, capsys):
    models = PUBLISHED["guided_diffusion"]
    model = dataclasses.replace(models["imagenet64"], sha256="0" * 64)
    monkeypatch.setitem(models, "imagenet64", model)
    write_pt(tmp_path / "weights.pt", tensors)
    assert run_import(tmp_path / "weights.pt", tmp_path / "run", "--model=imagenet64") == 0
    assert f"is {'0' * 64}: these are other weights" in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert about["as_published"] is False


FULL_SIZE = {
    ("guided_diffusion", "imagenet64"): 295_904_454,
    ("guided_diffusion", "upsample256"): 311_795_910,
    ("guided_diffusion", "imagenet256_uncond"): 552_814_086,
}


@pytest.mark.parametrize("model", FULL_SIZE, ids="-".join)
def test_full_size_networks_have_the_published_number_of_parameters(model):
    source, name = model
    published = PUBLISHED[source][name]
    config, _, variant = published.config.partition(".py")
    values = config_values(config, variant.lstrip(":") or None)
    shapes = build_stage(run_config_from(values).stage).shapes()[0]
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == published.parameters == FULL_SIZE[model]


def test_an_upsampler_with_a_level_of_noise_begins_as_the_one_without():
    values = {
        **SMALL,
        "stage.num_classes": 10,
        "stage.resolution": 16,
        "stage.low_res_resolution": 8,
        "stage.network.channel_mults": (1, 2),
        "stage.network.num_res_blocks": (1, 1),
        "stage.network.num_heads": None,
        "stage.network.dtype": "float32",
    }
    plain, noisy = (
        run_config_from(with_overrides(config_values("adm_sr256", variant), values))
        for variant in (None, "gaussian")
    )
    drawn = reference.Tensors()
    low_res = np.zeros((1, 3, 8, 8))
    NETWORK(drawn, np.zeros((1, 3, 16, 16)), [0], [0], low_res)
    outputs = []
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((2, 16, 16, 3)), jnp.float32)
    for config in (plain, noisy):
        params = importing.params_from(drawn, names.GUIDED_DIFFUSION, config.stage)
        state = importing._state(config, params)
        stage = build_stage(config.stage)
        _, _, cond = stage.example_inputs(2)
        if cond.aug_level is not None:
            cond = dataclasses.replace(cond, aug_level=jnp.array([0.1, 0.4]))
        apply = jax.jit(stage.network.apply)
        outputs.append(apply(state.params, image, jnp.array([-1.0, 2.0]), cond))
    np.testing.assert_allclose(outputs[0], outputs[1], atol=1e-6)
    level = state.params["aug_level"]
    assert not level["Dense_1"]["kernel"].any()
    assert level["Dense_0"]["kernel"].any()  # or the level would never be learned


def test_a_null_label_that_the_weights_lack_is_zero(tensors):
    config = run_config_from(
        with_overrides(
            config_values("adm_base64"),
            {
                **SMALL,
                "stage.network.null_label": None,
                "stage.diffusion.label_dropout_prob": 0.1,
            },
        )
    )
    params = importing.params_from(tensors, names.GUIDED_DIFFUSION, config.stage)
    table = params["label/embedding"]
    np.testing.assert_array_equal(table[:-1], tensors["label_emb.weight"])
    assert not table[-1].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage.network.patch_size": 2}, "patch_size = 2: expected 1: guided_diffusion has no"),
        ({"stage.network.scale_skips": True}, "scale_skips = True: expected False"),
        ({"stage.network.channels": 16}, "channel_mults = .*: expected multiples of 32 channels"),
    ],
)
def test_a_network_that_they_do_not_have_is_not_exported(changes, message):
    values = with_overrides(config_values("adm_base64"), {**SMALL, **changes})
    stage = run_config_from(values).stage
    with pytest.raises(UserError, match=message):
        exporting.check_expressible(stage, names.GUIDED_DIFFUSION)


def test_weights_that_are_trained_further_are_no_longer_chosen(imported, tmp_path):
    shutil.copytree(imported.path, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.chosen().step == 0
    folder.forget_imported()
    assert folder.best() is None
    folder.best_path.write_text('{"step": 20, "ema_decay": 0.9999, "metric": "fd", "value": 1.0}')
    folder.forget_imported()  # evaluation's own choice stays
    assert folder.chosen().step == 20


def test_a_null_label_comes_back_from_what_was_exported(tensors, imported, tmp_path):
    guided = ("--config.stage.network.null_label=None",)
    guided += ("--config.stage.diffusion.label_dropout_prob=0.1",)
    write_pt(tmp_path / "weights.pt", tensors)
    assert run_import(tmp_path / "weights.pt", tmp_path / "run", *guided) == 0
    out = tmp_path / "out.safetensors"
    argv = ["prog", f"--workdir={tmp_path / 'run'}", "--source=guided_diffusion"]
    assert export_weights.main([*argv, "--qkv_order=new", f"--output={out}"]) == 0
    assert run_import(out, tmp_path / "again", *guided) == 0
    first, second = (params_of(RunFolder(tmp_path / name)) for name in ("run", "again"))
    np.testing.assert_array_equal(first["label/embedding"], second["label/embedding"])


def test_a_name_that_says_another_format_is_refused(imported, tmp_path):
    argv = ["prog", f"--workdir={imported.path}", "--source=guided_diffusion"]
    with pytest.raises(UserError, match=r"expected a name that ends with \.safetensors"):
        export_weights.main([*argv, f"--output={tmp_path / 'a.pt'}"])


@pytest.mark.parametrize("dtype", [np.int32, bool, np.complex64])
def test_numbers_that_are_no_weights_are_refused(tensors, dtype):
    stage = run_config_from(with_overrides(config_values("adm_base64"), SMALL)).stage
    odd = {**tensors, "out.2.bias": np.ones(6, dtype)}
    with pytest.raises(UserError, match="tensor out.2.bias is of "):
        importing.params_from(odd, names.GUIDED_DIFFUSION, stage)


def test_a_link_to_an_empty_folder_takes_a_run(tensors, tmp_path):
    write_pt(tmp_path / "weights.pt", tensors)
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert run_import(tmp_path / "weights.pt", tmp_path / "link") == 0
    assert RunFolder(tmp_path / "link").chosen().step == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="there is something already"):
        run_import(tmp_path / "weights.pt", tmp_path / "file")
