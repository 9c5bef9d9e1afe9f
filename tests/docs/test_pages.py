"""The README and the pages of `docs` say what is so: links, commands, flags, config keys, files."""

import ast
import functools
import importlib
import inspect
import re
import subprocess

import pytest
from absl import flags

import cascaded_diffusion
from cascaded_diffusion.commands.config_flags import config_values
from cascaded_diffusion.config.run_checks import cascade_config_from, run_config_from
from cascaded_diffusion.errors import UserError
from tests.docs import documents
from tests.docs.documents import PAGES
from tests.tiny import ROOT

BUILD, CONFIGURATION = documents.script("build"), documents.script("generate_configuration")
SECTIONS = CONFIGURATION.sections()
FIELDS = {f"{path}.{key}" for path, cls in SECTIONS.items() for key in cls.__dataclass_fields__}
KEYS = FIELDS | {*SECTIONS}
SETUP = (ROOT / "setup.py").read_text()
SOURCES = "".join(
    path.read_text()
    for pattern in ("cascaded_diffusion/**/*.py", "launch/*.sh", "benchmarks/**/*.py", "docs/*.py")
    for path in ROOT.glob(pattern)
)
KEY = re.compile(rf"(?:--)?(?:config\.)?((?:{'|'.join(SECTIONS)})(?:\.\w+)+)")
# Flags of programs of others.
# Of ssh and kubectl, and of guided-diffusion.
OTHERS_FLAGS = {"ssh-flag", "command", "timestep_respacing", "clip_denoised", "classifier_scale"}
OTHERS_FLAGS |= {"use_new_attention_order", "num_channels", "channel_mult", "num_res_blocks"}
OTHERS_FLAGS |= {"attention_resolutions", "num_heads", "num_head_channels", "resblock_updown"}
OTHERS_FLAGS |= {"noise_schedule", "diffusion_steps", "rescale_timesteps", "class_cond"}
OTHERS_FLAGS |= {"predict_xstart", "use_kl"}
OTHERS_FLAGS |= {"learn_sigma", "use_fp16", "microbatch", "lr_anneal_steps"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def test_the_readme_is_read_in_five_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    first_blocks = text.partition("```bash\n")[2].partition("```")[0]
    assert "./launch/demo.sh" in first_blocks and "./launch/test.sh" in first_blocks


@each_page
def test_every_link_leads_somewhere(page):
    for path, anchor, link in BUILD.links(page):
        assert path.is_file(), f"{link}: no such file"
        assert not anchor or anchor in documents.anchors(path), f"{link}: no such heading"


def test_every_page_can_be_found():
    linked = {path for page in PAGES for path, _, _ in BUILD.links(page)}
    assert set(PAGES) <= linked | {ROOT / "README.md"}
    site = (ROOT / "docs/mkdocs.yml").read_text()
    assert all(f": {page.relative_to(ROOT)}\n" in site for page in PAGES)


@each_page
@pytest.mark.usefixtures("bucket_server")
def test_every_command_is_understood(page, tmp_path, monkeypatch):
    """Those of other programs stand in blocks that are marked: <!-- needs: cloud -->."""
    (tmp_path / "bash").mkdir()
    for snippet, argv in documents.commands(page, tmp_path / "bash"):
        program, *arguments = argv
        name = program.rpartition("/")[2]
        if program.startswith("./launch/"):
            checked = subprocess.run(["bash", "-n", program], cwd=ROOT, check=False)
            assert checked.returncode == 0, argv
            assert_flags_exist(arguments, (ROOT / program).parent.glob("*.sh"))
        elif name in ("python", "python3") and arguments[0] != "-m":
            path = ROOT / arguments[0]
            assert path.is_file(), argv
            assert_flags_exist(arguments, [path])
        elif name in ("python", "python3") and arguments[1].startswith("cascaded_diffusion."):
            with monkeypatch.context() as patch:
                assert_binary_understands(arguments[1], arguments[2:], tmp_path, patch)
        elif name == "pip":
            for extra in re.findall(r"\[(\w+)\]", " ".join(arguments)):
                assert f'"{extra}": ' in SETUP, argv
        elif argv[1:3] != ["-m", "venv"] and name != "tensorboard":
            assert snippet.needs, f"{page}: {argv} cannot be checked; mark its block"


def assert_flags_exist(arguments, files):
    text = "".join(path.read_text() for path in files)
    ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for flag in re.findall(r"^--([\w-]+)", "\n".join(ours), re.MULTILINE):
        assert re.search(rf"\b{flag}\b", text), f"{arguments}: no flag --{flag}"


class _ParsedError(BaseException):
    """Stops a binary when its flags have been parsed."""


def assert_binary_understands(module, arguments, folder, monkeypatch):
    """Its flags and its config are good; if it reads a run, only the run is missing."""
    room = "commands.show_data" if module == "cascaded_diffusion.data" else module[19:]
    main = importlib.import_module(f"cascaded_diffusion.{room}").main
    argv = [module, *arguments]
    parse = flags.FlagValues.__call__

    def parse_and_stop(self, *args, **kwargs):
        raise _ParsedError(self, parse(self, *args, **kwargs))

    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(flags.FlagValues, "__call__", parse_and_stop)
        with pytest.raises(_ParsedError) as stopped:
            main(argv)
    values, rest = stopped.value.args
    assert len(rest) == 1 + (room == "import_weights"), f"{argv}: stray arguments"
    if "config" in values and values.config is not None:
        config = config_values(values, argv)
        (cascade_config_from if "cascade" in config else run_config_from)(config)
    begins = ("main", "prepare", "plan", "drill", "commands.show_data")
    if values["help"].value or room in begins:
        return  # these would begin to work
    here = folder / "no_runs"
    here.mkdir(exist_ok=True)
    if not (here / "configs").exists():
        (here / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(here)
    with pytest.raises(UserError) as refused:
        main(argv)
    missing = re.findall(r"^--\w+=([^,\n]+)", "\n".join(arguments), re.MULTILINE) + rest[1:]
    assert any(path in str(refused.value) for path in missing), f"{argv}: {refused.value}"
    assert "does not go with" not in str(refused.value), f"{argv}: {refused.value}"


@each_page
def test_every_flag_config_key_and_file_exists(page):
    for code in documents.inline_code(page):
        if key := KEY.match(code):
            if not key[1].endswith((".json", ".md", ".png")):
                assert re.sub(r"\.\d+\.", ".N.", key[1]) in KEYS | {*SECTIONS}, (
                    f"{code}: no such key"
                )
        elif flag := re.match(r"--([a-z][\w-]*)", code):
            known = re.search(rf'"{flag[1]}"|--{flag[1]}\b', SOURCES)
            assert known or flag[1] in OTHERS_FLAGS or flag[1] == "x", f"{code}: no such flag"
        if re.fullmatch(r"(configs|launch|benchmarks|tests|docs)/[\w/]+\.\w+(:\w+)?", code):
            assert (ROOT / code.partition(":")[0]).is_file(), f"{code}: no such file"


def test_the_configuration_reference_is_that_of_the_dataclasses():
    text = CONFIGURATION.PAGE.read_text()
    assert text == CONFIGURATION.markdown(), "run python docs/generate_configuration.py"
    for key in FIELDS:
        assert f"| `{key.rpartition('.')[2]}` |" in text


def test_the_python_of_the_pages_calls_what_there_is():
    blocks = [
        b for p in PAGES for b in re.findall(r"```python\n(.*?)```", p.read_text(), re.DOTALL)
    ]
    assert blocks
    for tree in map(ast.parse, blocks):
        names = {}
        for node in tree.body:
            if isinstance(node, ast.Import):
                names |= {a.asname: importlib.import_module(a.name) for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                names |= {a.name: getattr(module, a.name) for a in node.names}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            root, *path = ast.unparse(call.func).split(".")
            if root in names:  # else it is a method of what the block makes
                function = functools.reduce(getattr, path, names[root])
                inspect.signature(function).bind(*call.args, **{k.arg: k for k in call.keywords})


def test_the_api_reference_lists_every_public_name():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == cascaded_diffusion.__all__


def test_the_site_builds_without_a_warning(tmp_path, capfd):
    assert BUILD.build(tmp_path / "site") == 0
    out = "".join(capfd.readouterr())
    assert "warning" not in out.lower(), out
    built = {
        path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*")
    }
    assert {"docs/models/index.html", "benchmarks/results/demo_samples.png"} <= built
    assert {f"docs/reference/api/{room}/index.html" for room in BUILD.rooms()} <= built
    page = (tmp_path / "site/docs/reference/api/diffusion/index.html").read_text()
    assert "cascaded_diffusion.diffusion.samplers" in page
