"""The rules of the house, read off the source itself."""

import ast
import subprocess
import sys
import typing

import pytest

import cascaded_diffusion
from cascaded_diffusion.cascade.pixels import UPSAMPLERS
from cascaded_diffusion.config import schema as config
from cascaded_diffusion.diffusion.gaussian import PARAMETERIZATIONS
from cascaded_diffusion.diffusion.grids import GRIDS
from cascaded_diffusion.diffusion.guidance import THRESHOLDS
from cascaded_diffusion.diffusion.losses import WEIGHTINGS
from cascaded_diffusion.diffusion.samplers import SAMPLERS, VARIANCES
from cascaded_diffusion.diffusion.schedules import SCHEDULES
from cascaded_diffusion.networks.conditioning import NOISE_INPUTS
from cascaded_diffusion.networks.unet import NETWORKS
from tests.tiny import ROOT

PACKAGE = ROOT / "cascaded_diffusion"
BINARIES = {"main", "evaluate", "sample", "prepare", "plan", "report", "reference"}
BINARIES |= {"import_weights", "export_weights", "drill"}
_ROOMS = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
_LEAVES = {"config", "files", "types", "errors"}
# Which rooms may import which others.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "resize_weights": set(),
    "files": {"errors"},
    "config": {"files", "errors"},
    "diffusion": {"types"},
    "networks": {"types"},
    "cascade": {"resize_weights", "diffusion", "networks", *_LEAVES},
    "data": {"resize_weights", *_LEAVES},
    "runtime": _LEAVES,
    "reporting": {"runtime", *_LEAVES},
    "training": {"cascade", "networks", "runtime", *_LEAVES},
    # networks: the classifier whose features it scores by is no cascade's business.
    "evaluation": {"cascade", "networks", "runtime", *_LEAVES},
    "planning": {"cascade", "networks", "runtime", "training", *_LEAVES},
    "interchange": {"cascade", "networks", "runtime", "training", *_LEAVES},
    # What a notebook calls: it sets JAX up and reads configs as the binaries do.
    "library": {"commands", "cascade", "data", "evaluation", "runtime", *_LEAVES},
    # It breaks the binaries on purpose.
    "drilling": {"commands", "cascade", "runtime", "training", *_LEAVES},
    # A deferred import: Ctrl-C is answered from the package's first line on.
    "__init__": {"commands", *_ROOMS},
    "commands": _ROOMS | _LEAVES,
    **{name: _ROOMS | _LEAVES for name in BINARIES},
}
# Outside packages with one home (a package or a file of ours).
HOMES = {
    "flax": {"networks"},
    "orbax": {"runtime/checkpoint.py"},
    "clu": {"runtime/metric_writer.py"},
    "tensorboardX": {"runtime/metric_writer.py"},
    "PIL": {"runtime/pictures.py", "files/image_files.py", "data/decode.py", "data/transforms.py"},
    "matplotlib": {"runtime/pictures.py"},
    "grain": {"data"},
    "tensorflow_datasets": {"data/tfds.py"},
    "array_record": {"data/record_files.py"},
    "google_crc32c": {"data/record_files.py"},
    "cv2": {"data"},
    "simplejpeg": {"data/decode.py"},
    "ml_dtypes": {"files/torch_file.py"},
    "safetensors": {"interchange"},
    "mlxtend": {"data"},
    # Two trainings, two homes: the diffusion models', and the classifier's.
    "optax": {"training", "evaluation/features/classifier_training.py"},
    "absl": {"commands", *(f"{name}.py" for name in BINARIES)},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way_and_outside_packages_have_one_home(path):
    here = path.relative_to(PACKAGE).as_posix()
    for name in _imports(ast.parse(path.read_text())):
        top, *rest = name.split(".")
        if top == "cascaded_diffusion":
            # `python -m cascaded_diffusion.data` is a binary, too.
            room = "commands" if path.name == "__main__.py" else _room(path)
            # The package itself has the public names, which are imported when they are used.
            wanted = rest[0] if rest else "__init__"
            allowed = ALLOWED[room] | {room}
            if room in {"commands", *BINARIES}:
                allowed |= {"__init__"}
            assert wanted in allowed, f"{here} imports {name}"
        elif top in HOMES:
            assert any(here == home or here.startswith(f"{home}/") for home in HOMES[top]), (
                f"{here} imports {name}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_unpickles_evaluates_or_shells_out(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            names.add(getattr(node, "module", None) or "")
            assert not names & {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in {"eval", "exec", "os.system", "os.popen", "torch.load"}, name
            for keyword in node.keywords:
                true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in {"shell", "allow_pickle"} and true)


def test_config_choices_are_the_tables_keys():
    # config.py imports nothing of the rest, so it repeats the names.
    def choices(cls, field):
        hint = typing.get_type_hints(cls)[field]
        (literal,) = [
            h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is typing.Literal
        ]
        return set(typing.get_args(literal))

    assert choices(config.ScheduleConfig, "name") == set(SCHEDULES)
    assert choices(config.DiffusionConfig, "parameterization") == set(PARAMETERIZATIONS)
    assert choices(config.DiffusionConfig, "weighting") == {"none", *WEIGHTINGS}
    assert choices(config.SamplerConfig, "name") == set(SAMPLERS)
    assert choices(config.SamplerConfig, "variance") == set(VARIANCES)
    assert choices(config.SamplerConfig, "grid") == set(GRIDS)
    assert choices(config.SamplerConfig, "threshold") == set(THRESHOLDS)
    assert choices(config.NetworkConfig, "name") == set(NETWORKS)
    assert choices(config.NetworkConfig, "noise_input") == set(NOISE_INPUTS)
    assert choices(config.NetworkConfig, "upsample") == set(UPSAMPLERS)


def test_config_files_are_short_enough_to_read():
    for path in (ROOT / "configs").glob("*.py"):
        if path.name == "sections.py":
            continue
        code = path.read_text().split('"""', 2)[2]
        assert sum(bool(line.strip()) for line in code.splitlines()) <= 80, path


def test_importing_the_package_is_quick_and_starts_nothing():
    code = (
        "import sys, cascaded_diffusion, cascaded_diffusion.main, cascaded_diffusion.evaluate,"
        " cascaded_diffusion.sample, cascaded_diffusion.plan, cascaded_diffusion.report,"
        " cascaded_diffusion.reference, cascaded_diffusion.prepare,"
        " cascaded_diffusion.import_weights, cascaded_diffusion.export_weights,"
        " cascaded_diffusion.commands.show_data\n"
        "heavy = {'jax', 'flax', 'orbax', 'grain', 'tensorflow', 'optax', 'cv2'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_public_names_are_few_and_there():
    assert len(cascaded_diffusion.__all__) <= 20
    for name in cascaded_diffusion.__all__:
        assert getattr(cascaded_diffusion, name).__name__ == name
        assert "cd." in getattr(cascaded_diffusion, name).__doc__, f"{name} has no example"
    with pytest.raises(AttributeError):
        cascaded_diffusion.nothing  # noqa: B018


def test_every_module_says_what_it_is():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path
