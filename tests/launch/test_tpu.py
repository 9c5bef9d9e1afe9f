"""tpu.sh, a command at a time."""

import pathlib
import shlex
import subprocess

import pytest

from tests.launch.stubs import (
    HOSTILE,
    ON_HOST,
    PLACE,
    POD,
    REMOTE,
    ROOT,
    SLICE,
    SSH_FLAGS,
    bad_input,
    flag,
    gcloud_ssh,
    remote_argv,
)

# A gcloud whose scp puts the file on the machine.
COPIES = 'if [[ $4 == scp ]]; then cp "$5" "$MACHINE/${6#*:}"; fi'


def test_create_asks_for_what_the_flags_say(stubs):
    stubs.add("gcloud")
    more = ("--spot", "--network=net", "--subnetwork=sub", "--internal-ips")
    # gcloud's own spelling of a flag is taken too.
    assert stubs.run("tpu.sh", "create", *POD, *SLICE, *more).returncode == 0
    head = ["gcloud", "compute", "tpus", "queued-resources", "create", "pod-1", "--node-id=pod-1"]
    kind = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert stubs.calls() == [
        [*head, *kind, *PLACE, "--spot", "--network=net", "--subnetwork=sub", "--internal-ips"]
    ]


def test_without_options_none_are_given(stubs):
    stubs.add("gcloud")
    assert stubs.run("tpu.sh", "create", "--name=pod-1", "--zone=z-a", *SLICE).returncode == 0
    (call,) = stubs.calls()
    assert call[8:] == ["--runtime-version=v2-alpha-tpuv5-lite", "--zone=z-a", "--quiet"]


def test_delete_takes_the_slice_with_the_request(stubs):
    stubs.add("gcloud")
    assert stubs.run("tpu.sh", "delete", *POD).returncode == 0
    head = ["gcloud", "compute", "tpus", "queued-resources", "delete", "pod-1"]
    assert stubs.calls() == [[*head, *PLACE, "--force"]]


def test_wait_ends_when_active(stubs):
    states = stubs.lines("states", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    stubs.add("gcloud", f"next {states}")
    result = stubs.run("tpu.sh", "wait", *POD, "--poll_secs=0")
    assert result.returncode == 0
    head = ["gcloud", "compute", "tpus", "queued-resources", "describe", "pod-1"]
    assert stubs.calls() == [[*head, *PLACE, "--format=value(state.state)"]] * 3
    assert "pod-1: PROVISIONING" in result.stderr


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED", "DELETING"])
def test_wait_ends_with_an_error_when_it_will_never_be_active(stubs, state):
    stubs.add("gcloud", f"next {stubs.lines('states', 'PROVISIONING', state, 'ACTIVE')}")
    result = stubs.run("tpu.sh", "wait", *POD, "--poll_secs=0")
    assert result.returncode == 1
    assert f"the request is {state}" in result.stderr
    assert len(stubs.calls()) == 2


def test_wait_says_that_there_is_no_request(stubs):
    stubs.add("gcloud", "echo 'ERROR: (gcloud) NOT_FOUND: no such' >&2; exit 1")
    result = stubs.run("tpu.sh", "wait", *POD, "--poll_secs=0")
    assert result.returncode == 1 and "run `create` first" in result.stderr
    assert len(stubs.calls()) == 1


def test_wait_forgives_a_few_answers_that_do_not_come(stubs):
    answers = stubs.lines("answers", "no", "no", "no", "no", "ACTIVE")
    stubs.add("gcloud", f"a=$(next {answers}); [[ $a != no ]] || exit 1; echo $a")
    assert stubs.run("tpu.sh", "wait", *POD, "--poll_secs=0").returncode == 0


def test_wait_does_not_ask_for_good_where_nobody_answers(stubs):
    stubs.add("gcloud", "echo 'network is down' >&2; exit 1")
    result = stubs.run("tpu.sh", "wait", *POD, "--poll_secs=0")
    assert result.returncode == 1 and len(stubs.calls()) == 5


def test_wait_is_bounded_and_says_that_the_request_stays(stubs):
    stubs.add("gcloud", "echo WAITING_FOR_RESOURCES")
    result = stubs.run("tpu.sh", "wait", *POD, "--poll_secs=0.1", "--wait_timeout_secs=1")
    assert result.returncode == 1
    assert "WAITING_FOR_RESOURCES after --wait_timeout_secs=1" in result.stderr
    assert "delete" in result.stderr


@pytest.mark.parametrize("value", HOSTILE)
def test_arguments_of_the_trainer_arrive_as_they_are(stubs, value):
    stubs.add("gcloud")
    given = ["main", f"--config={value}", value]
    assert stubs.run("tpu.sh", "run", *POD, "--", *given).returncode == 0
    (call,) = stubs.calls()
    assert call[:-1] == gcloud_ssh()
    arrived = remote_argv(call)
    assert arrived[:4] == [*ON_HOST, "start", "--job=main"]
    trainer = ["python", "-m", "cascaded_diffusion.main", f"--config={value}", value]
    assert arrived[arrived.index("--") + 1 :] == [*trainer, "--distributed=tpu"]


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_the_remote_string_means_the_same_to_any_shell(stubs, shell):
    stubs.add("gcloud")
    given = [v for v in HOSTILE if v]
    stubs.run("tpu.sh", "run", *POD, "--", "main", *given)
    (call,) = stubs.calls()
    words = subprocess.run(
        [shell, "-c", f"for a in {flag(call, 'command')}; do printf '%s\\0' \"$a\"; done"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    assert words.split("\0")[-2 - len(given) : -2] == given


def test_a_distributed_flag_of_the_user_stays_the_only_one(stubs):
    stubs.add("gcloud")
    stubs.run("tpu.sh", "run", *POD, "--", "sample", "--distributed=auto")
    assert remote_argv(stubs.calls()[0])[-2:] == ["cascaded_diffusion.sample", "--distributed=auto"]


def test_one_worker_trains_for_itself(stubs):
    stubs.add("gcloud")
    stubs.run("tpu.sh", "run", *POD, "--worker=0", "--", "prepare", "--config=c")
    stubs.run("tpu.sh", "run", *POD, "--worker=0", "--", "main")
    prepare, main = stubs.calls()
    assert prepare[:-1] == main[:-1] == gcloud_ssh(0)
    assert remote_argv(prepare)[-2:] == ["cascaded_diffusion.prepare", "--config=c"]
    assert remote_argv(main)[-1] == "--distributed=none"


def test_logs_follow_one_worker(stubs):
    stubs.add("gcloud")
    stubs.run("tpu.sh", "logs", *POD)
    stubs.run("tpu.sh", "logs", *POD, "--worker=12", "--job=sample")
    first, other = stubs.calls()
    assert first[:-1] == gcloud_ssh(0) and other[:-1] == gcloud_ssh(12)
    assert remote_argv(first) == [*ON_HOST, "logs", "--job=main"]
    assert remote_argv(other) == [*ON_HOST, "logs", "--job=sample"]


def test_stop_asks_all_workers_at_once(stubs):
    stubs.add("gcloud")
    stubs.run("tpu.sh", "stop", *POD, "--internal_ips")
    (call,) = stubs.calls()
    where = [*PLACE]
    assert call[:-1] == [*gcloud_ssh(where=where)[:-2], "--internal-ip", *SSH_FLAGS]
    assert remote_argv(call) == [*ON_HOST, "stop", "--job=main", "--timeout_secs=600"]


def test_setup_mounts_the_share_on_all_workers(stubs):
    stubs.add("gcloud")
    share = ("--share=10.0.0.2:/my share", "--mount=/mnt/it's")
    stubs.run("tpu.sh", "setup", *POD, *share, "--python=python3.12")
    (call,) = stubs.calls()
    assert call[:-1] == gcloud_ssh()
    setup = ["setup", "--extra=tpu", "--python=python3.12"]
    assert remote_argv(call) == [
        *ON_HOST,
        *setup,
        "--share=10.0.0.2:/my share",
        "--mount=/mnt/it's",
    ]


def test_copy_arrives_whole_and_replaces_the_old(stubs):
    stubs.add("gcloud", COPIES + REMOTE)
    old = stubs.machine / "cascaded_diffusion/src"
    old.mkdir(parents=True)
    (old / "removed_since.py").write_text("")
    result = stubs.run("tpu.sh", "copy", *POD)
    assert result.returncode == 0, result.stderr
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert f"commit {head}, SHA-256 " in result.stderr
    assert (old / "cascaded_diffusion/main.py").exists()
    assert not (old / "removed_since.py").exists()
    assert [p.name for p in stubs.machine.iterdir()] == ["cascaded_diffusion"]
    assert [p.name for p in old.parent.iterdir()] == ["src"]
    scp = stubs.calls()[0]
    name = f"cascaded_diffusion-{head[:12]}.tar.gz"
    assert scp[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert scp[6:] == [f"pod-1:{name}", *PLACE, "--worker=all"]
    assert not pathlib.Path(scp[5]).exists()


def test_a_copy_deletes_no_runs(stubs):
    """A relative --workdir is below the copy, which the next one replaces."""
    stubs.add("gcloud", COPIES + REMOTE)
    run = stubs.machine / "cascaded_diffusion/src/RUN/sr256"
    run.mkdir(parents=True)
    result = stubs.run("tpu.sh", "copy", *POD)
    assert result.returncode == 1
    assert "error: ~/cascaded_diffusion/src/RUN holds runs, which this copy" in result.stderr
    assert run.exists()


def test_a_run_that_would_end_with_its_machine_is_refused(stubs):
    stubs.add("gcloud")
    job = ("run", *POD, "--bucket=gs://my-cdm/x")
    missing = (
        "-- main: --workdir is missing; expected a folder in the bucket, --bucket=gs://my-cdm/x"
    )
    assert bad_input(stubs.run("tpu.sh", *job, "--", "main", "--config=c"), missing)
    sample = ("sample", "--workdir=gs://my-cdm/x/RUN", "--output")
    assert bad_input(stubs.run("tpu.sh", *job, "--", *sample, "/home/me"), "--output=/home/me")
    assert stubs.calls() == []
    for allowed in (
        (*sample, "gs://my-cdm/x/RUN/s"),
        (*sample, "gs://another/s"),
        ("main", "--replay", "gs://my-cdm/x/RUN/nonfinite/7"),
        ("main", "--flagfile=flags"),
    ):
        result = stubs.run("tpu.sh", *job, "--dry_run", "--", *allowed)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "spelled", ["--distributed=none", "--distributed none", "-distributed=none"]
)
def test_how_processes_meet_is_said_once(stubs, spelled):
    given = ("main", "--workdir=gs://my-cdm/x/RUN", *spelled.split())
    result = stubs.run("tpu.sh", "run", *POD, "--bucket=gs://my-cdm/x", "--dry_run", "--", *given)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("distributed") - result.stdout.count("--distributed=tpu") >= 1
    assert "--distributed=tpu" not in result.stdout


def test_what_gcloud_says_of_an_error_is_not_its_last_line(stubs):
    said = "echo 'ERROR: (gcloud) You do not have an active account'; echo 'to select an account.'"
    stubs.add("gcloud", f"{{ {said}; }} >&2; exit 1")
    result = stubs.run("tpu.sh", "create", *POD, *SLICE, "--bucket=gs://my-cdm/x")
    assert result.returncode == 1
    assert "could not be asked about: ERROR: (gcloud) You do not have an act" in result.stderr


def test_copy_notices_damage_and_leaves_the_old(stubs):
    stubs.add("gcloud", 'if [[ $4 == scp ]]; then echo damaged >"$MACHINE/${6#*:}"; fi' + REMOTE)
    old = stubs.machine / "cascaded_diffusion/src"
    old.mkdir(parents=True)
    result = stubs.run("tpu.sh", "copy", *POD)
    assert result.returncode == 1
    assert "error: the archive has arrived damaged" in result.stderr
    assert [p.name for p in old.parent.iterdir()] == ["src"]


def test_a_copy_that_fails_is_not_unpacked(stubs):
    stubs.add("gcloud", "exit 1")
    assert stubs.run("tpu.sh", "copy", *POD).returncode == 1
    assert len(stubs.calls()) == 1


def test_dry_run_prints_what_would_be_called_and_calls_nothing(stubs):
    stubs.add("gcloud")
    trainer = ["main", "--config=it's $(touch PWNED)", "--workdir=/mnt/share/RUN/a b"]
    share = "--share=10.0.0.2:/vol"
    result = stubs.run("tpu.sh", "train", *POD, *SLICE, share, "--dry_run", "--", *trainer)
    assert result.returncode == 0, result.stderr
    assert stubs.calls() == []
    printed = [shlex.split(line) for line in result.stdout.splitlines()]
    done = [" ".join(c[2:5]) if c[0] == "gcloud" else " ".join(c[:4:3]) for c in printed]
    queue, vm = "tpus queued-resources", "tpus tpu-vm"
    assert done == [
        *(f"{queue} create", f"{queue} describe", "git archive", f"{vm} scp"),
        *(f"{vm} ssh", f"{vm} ssh", f"{vm} ssh", f"{queue} delete"),
    ]
    assert remote_argv(printed[-2])[-4:] == [
        "cascaded_diffusion.main",
        *trainer[1:],
        "--distributed=tpu",
    ]


BAD = [
    ((), "no such command"),
    (("$(touch PWNED)",), "no such command"),
    (("create",), "--name: missing"),
    (("create", "--name=pod-1"), "--zone: missing"),
    (("create", *POD), "--accelerator_type: missing"),
    (("create", *POD, "--accelerator_type=v5litepod-16"), "--runtime_version: missing"),
    (("create", *POD, "--spot=yes"), "--spot: takes no value"),
    (("create", *POD, "--zone"), "--zone: no value"),
    (("create", *POD, "--nmae=x"), "--nmae: no such flag"),
    (("create", *POD, "--a[$(touch PWNED)]=1"), "--flag=value"),
    (("create", *POD, "stray"), "stray: expected --flag=value"),
    (("create", *POD, *SLICE, "--", "main"), "nothing after"),
    (("create", *POD, *SLICE, "--network=-x"), "--network=-x"),
    (("wait", *POD, "--poll_secs=soon"), "--poll_secs=soon"),
    (("wait", *POD, "--wait_timeout_secs="), "--wait_timeout_secs: missing"),
    (("wait", *POD, "--wait_timeout_secs=1;2"), "--wait_timeout_secs="),
    (("wait", *POD, "--wait_timeout_secs=08"), "--wait_timeout_secs=08"),
    (("run", *POD), "run -- ''"),
    (("run", *POD, "--", "rm"), "run -- rm"),
    (("run", *POD, "--", "prepare"), "--worker=0"),
    (("run", *POD, "--worker=one", "--", "main"), "--worker=one"),
    (("logs", *POD, "--worker=all"), "--worker=all"),
    (("copy", *POD, "--commit=--output=x"), "--commit=--output=x"),
    (("setup", *POD, "--share=nowhere"), "--share=nowhere"),
    (("setup", *POD, "--share=-o:/x"), "--share=-o:/x"),
    (("setup", *POD, "--mount=relative"), "--mount=relative"),
    (("train", *POD, *SLICE, "--", "main"), "--bucket: missing"),
    (
        ("train", *POD, *SLICE, "--share=h:/v", "--worker=0", "--", "prepare"),
        "train -- prepare: expected main, evaluate or sample",
    ),
    (("train", *POD, *SLICE, "--share=h:/v", "--", "main", "--workdir=RUN"), "--workdir=RUN"),
    (
        ("train", *POD, *SLICE, "--share=h:/v", "--", "main", "--workdir=/mnt/share/../x"),
        "--workdir=",
    ),
    (
        ("train", *POD, *SLICE, "--share=h:/v", "--", "main", "--workdir", "/RUN"),
        "--workdir=/RUN",
    ),
    (("train", *POD, *SLICE, "--share=h:/v", "--max_slices=0", "--", "main"), "--max_slices=0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_refused_before_anything_is_called(stubs, arguments, message):
    stubs.add("gcloud")
    assert bad_input(stubs.run("tpu.sh", *arguments), message)
    assert stubs.calls() == []


@pytest.mark.parametrize("name", [v for v in HOSTILE if v not in ("", "plain")])
def test_what_cannot_be_a_machine_name_is_refused(stubs, name):
    stubs.add("gcloud")
    for given in (f"--name={name}", f"--zone={name}", f"--project={name}"):
        assert bad_input(stubs.run("tpu.sh", "delete", *POD, given), given.partition("=")[0])
    assert stubs.calls() == []
