"""The launch scripts against stand-ins: what they call, how, and when they stop."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.stubs import REMOTE, ROOT, Stubs, flag, remote_argv

SCRIPTS = sorted(p for p in (ROOT / "launch").rglob("*.sh"))
HOSTILE = (
    "plain",
    "two words",
    "it's",
    'say "no"',
    "$(touch PWNED)",
    "`touch PWNED`",
    "a;touch PWNED",
    "a\nb",
    "--leading=dash",
    "-x",
    "*?[a-z]{1,2}~",
    "\\backslash\\",
    "größe 像 🙂",
    "& && ! #",
    "$HOME ${x}",
    "",
)
POD = ("--name=pod-1", "--zone=us-west4-a", "--project=my-project")
PLACE = ["--zone=us-west4-a", "--project=my-project", "--quiet"]
SSH_FLAGS = ["--ssh-flag=-oConnectTimeout=60", "--ssh-flag=-oServerAliveInterval=60"]
SLICE = ("--accelerator_type=v5litepod-16", "--runtime_version=v2-alpha-tpuv5-lite")
ON_HOST = ["bash", "cascaded_diffusion/src/launch/on_host.sh"]


@pytest.fixture
def stubs(tmp_path):
    made = Stubs(tmp_path / "stub folder's")
    yield made
    assert not list(ROOT.glob("PWNED")) and not list(tmp_path.rglob("PWNED"))


def bad_input(result, *words):
    """Refused in one line that names what is wrong, with exit code 2 and nothing on stdout."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line
    return True


def gcloud_ssh(worker="all", where=PLACE):
    head = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod-1", *where]
    return [*head, f"--worker={worker}", *SSH_FLAGS]


# --- all scripts ------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck")
def test_shellcheck_finds_nothing_in_these_scripts():
    # The three older scripts source a file by a path from the repository's root.
    paths = [str(p.relative_to(ROOT)) for p in SCRIPTS]
    found = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR:.", "--exclude=SC2010", *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


# What is run by hand or by another script; the others are sourced.
COMMANDS = ("evaluate_vm", "gke", "on_host", "slurm", "slurm_job", "tensorboard", "tpu")


@pytest.mark.parametrize("name", [n for n in COMMANDS if (ROOT / f"launch/{n}.sh").exists()])
def test_help_is_the_manual(stubs, name):
    result = stubs.run(f"{name}.sh", "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"{name}.sh" in result.stdout
    assert "set -euo" not in result.stdout
    assert stubs.calls() == []


# --- tpu.sh: single commands ------------------------------------------------------------------


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
    stubs.add("gcloud", 'if [[ $4 == scp ]]; then cp "$5" "$MACHINE/${6#*:}"; fi' + REMOTE)
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
    (("run", *POD), "run -- ''"),
    (("run", *POD, "--", "rm"), "run -- rm"),
    (("run", *POD, "--", "prepare"), "--worker=0"),
    (("run", *POD, "--worker=one", "--", "main"), "--worker=one"),
    (("logs", *POD, "--worker=all"), "--worker=all"),
    (("copy", *POD, "--commit=--output=x"), "--commit=--output=x"),
    (("setup", *POD, "--share=nowhere"), "--share=nowhere"),
    (("setup", *POD, "--share=-o:/x"), "--share=-o:/x"),
    (("setup", *POD, "--mount=relative"), "--mount=relative"),
    (("train", *POD, *SLICE, "--", "main"), "--share: missing"),
    (("train", *POD, *SLICE, "--share=h:/v", "--", "evaluate"), "train -- evaluate"),
    (("train", *POD, *SLICE, "--share=h:/v", "--", "main", "--workdir=RUN"), "--workdir=RUN"),
    (
        ("train", *POD, *SLICE, "--share=h:/v", "--", "main", "--workdir=/mnt/share/../x"),
        "--workdir=",
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


# --- tpu.sh train -----------------------------------------------------------------------------


class Pod:
    """Answers of a pod: the states of its request, and what its workers say when asked.

    A worker's answer is its states with spaces between, or `!` where nobody answers.
    """

    def __init__(self, stubs, states, workers, node="READY", fails=""):
        self._stubs = stubs
        seen = shlex.quote(str(stubs.folder / "id"))
        stubs.add(
            "gcloud",
            f"""
case "$3 $4" in
  {fails or "nothing"}) echo "no capacity" >&2; exit 1 ;;
  "queued-resources describe")
    state=$(next {stubs.lines("states", *states)})
    if [[ $state == GONE ]]; then echo "ERROR: NOT_FOUND" >&2; exit 1; fi
    echo "$state" ;;
  "tpu-vm describe") echo {node} ;;
  "tpu-vm ssh")
    case "$*" in
      *"'start'"*) grep -o "id=[0-9a-f]*" <<<"$*" | cut -c 4- >{seen} ;;
      *"'stop'"*) ;;
      *"'status'"*)
        answer=$(next {stubs.lines("workers", *workers)})
        [[ $answer != "!" ]] || exit 255
        for state in $answer; do
          echo "worker says @job host-$((++n)) main $state $(cat {seen} 2>/dev/null || echo -)"
        done ;;
    esac ;;
esac
""",
        )

    def train(self, *flags, **kwargs):
        share = ("--share=10.0.0.2:/vol", "--poll_secs=0", *flags)
        return self._stubs.run("tpu.sh", "train", *POD, *SLICE, *share, "--", *TRAINER, **kwargs)

    def did(self):
        """What was done, without the questions."""
        names = []
        for call in self._stubs.calls():
            what = call[4] if call[3:5] != ["tpu-vm", "ssh"] else remote_argv(call)[2]
            if call[4] == "ssh" and remote_argv(call)[0] == "sh":
                what = remote_argv(call)[3]
            if what not in ("describe", "status"):
                names.append(what)
        return names


TRAINER = ("main", "--config=configs/sr256.py", "--workdir=/mnt/share/RUN/sr256")
DEPLOY = ["scp", "unpack", "setup", "start"]


def test_train_does_it_all_and_leaves_nothing(stubs):
    pod = Pod(
        stubs,
        ["GONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"],
        ["none none", "running running", "running running", "exited:0 exited:0"],
    )
    result = pod.train()
    assert result.returncode == 0, result.stderr
    assert pod.did() == ["create", *DEPLOY, "delete"]
    assert result.stdout == "pod-1: finished\n"
    (start,) = [c for c in stubs.calls() if "'start'" in c[-1]]
    trainer = ["python", "-m", "cascaded_diffusion.main", *TRAINER[1:], "--distributed=tpu"]
    arrived = remote_argv(start)
    assert arrived[arrived.index("--") + 1 :] == trainer
    assert "--log_dir=/mnt/share/launch_logs/pod-1" in arrived


@pytest.mark.parametrize("state", ["SUSPENDED", "SUSPENDING"])
def test_train_starts_over_after_a_preemption(stubs, state):
    pod = Pod(
        stubs,
        ["GONE", "ACTIVE", "ACTIVE", state, "SUSPENDED", "GONE", "PROVISIONING", "ACTIVE"],
        ["none", "running", "none", "running", "exited:0"],
    )
    result = pod.train()
    assert result.returncode == 0, result.stderr
    assert pod.did()[:6] == ["create", *DEPLOY, "delete"]
    assert pod.did()[-6:] == ["create", *DEPLOY, "delete"]
    assert "preempted" in result.stderr
    first, second = [c[-1] for c in stubs.calls() if "'start'" in c[-1]]
    assert first == second


def test_train_starts_over_where_only_the_machine_says_that_it_is_gone(stubs):
    states = ["GONE", "ACTIVE", "ACTIVE", "ACTIVE", "GONE", "ACTIVE"]
    workers = ["none", "running", "!", "none", "exited:0"]
    pod = Pod(stubs, states, workers, node="PREEMPTED")
    assert pod.train().returncode == 0
    assert pod.did() == ["create", *DEPLOY, "delete"] * 2


def test_train_forgives_workers_that_do_not_answer_for_a_while(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none", *["!"] * 5, "running", "exited:0"])
    assert pod.train().returncode == 0
    assert pod.did() == ["create", *DEPLOY, "delete"]


def test_train_starts_over_where_workers_never_answer(stubs):
    workers = ["none", *["!"] * 11, "none", "exited:0"]
    pod = Pod(stubs, ["GONE", *["ACTIVE"] * 12, "GONE", "ACTIVE"], workers)
    assert pod.train().returncode == 0
    assert pod.did() == ["create", *DEPLOY, "delete"] * 2


def test_train_runs_again_what_was_stopped_after_saving(stubs):
    workers = ["none none", "exited:75 exited:75", "running running", "exited:75 exited:1"]
    pod = Pod(stubs, ["GONE", "ACTIVE"], [*workers, "exited:0 exited:0"])
    result = pod.train("--max_failures=0")
    assert result.returncode == 0, result.stderr
    assert pod.did() == ["create", *DEPLOY, "start", "start", "delete"]


def test_train_stops_at_bad_input(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none none", "exited:1 exited:2"])
    result = pod.train()
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the trainer refused its input")
    assert "launch_logs/pod-1" in result.stderr
    assert pod.did() == ["create", *DEPLOY, "delete"]


def test_train_ends_when_stop_was_asked_for(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none none", "running running", "stopped stopped"])
    result = pod.train()
    assert result.returncode == 75
    assert pod.did() == ["create", *DEPLOY, "delete"]


def test_train_gives_up_after_crashes_in_a_row(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none", "exited:1"])
    result = pod.train("--max_failures=2")
    assert result.returncode == 1
    assert "ended with exited:1, more than --max_failures=2 times" in result.stderr
    assert pod.did() == ["create", *DEPLOY, "start", "start", "delete"]


def test_train_deploys_again_to_a_worker_that_was_started_anew(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none none", "exited:1 lost", "exited:0 exited:0"])
    assert pod.train().returncode == 0
    assert pod.did() == ["create", *DEPLOY, *DEPLOY, "delete"]


def test_train_uses_up_so_many_slices_and_no_more(stubs):
    pod = Pod(stubs, ["GONE", "SUSPENDED", "GONE", "SUSPENDED", "GONE", "SUSPENDED"], ["none"])
    result = pod.train("--max_slices=2")
    assert result.returncode == 1 and "--max_slices=2" in result.stderr
    assert pod.did() == ["create", "delete", "create", "delete"]


def test_train_deletes_a_request_that_waits_too_long(stubs):
    pod = Pod(stubs, ["GONE", "WAITING_FOR_RESOURCES"], [])
    result = pod.train("--wait_timeout_secs=1", "--poll_secs=0.2")
    assert result.returncode == 1 and "--wait_timeout_secs=1" in result.stderr
    assert pod.did() == ["create", "delete"]


def test_train_deletes_a_request_that_failed_and_says_why(stubs):
    pod = Pod(stubs, ["GONE", "FAILED"], [])
    result = pod.train()
    assert result.returncode == 1 and "FAILED; quota" in result.stderr
    assert pod.did() == ["create", "delete"]


def test_train_does_not_ask_for_a_slice_for_good(stubs):
    pod = Pod(stubs, ["GONE"], [], fails='"queued-resources create"')
    result = pod.train("--max_failures=2")
    assert result.returncode == 1 and "could not be asked for" in result.stderr
    assert pod.did() == ["create", "create", "create", "delete"]


def test_train_says_so_where_the_slice_could_not_be_deleted(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none", "exited:0"], fails='"queued-resources delete"')
    result = pod.train()
    assert result.returncode == 1
    assert "may go on to cost money" in result.stderr


def test_keep_keeps_the_slice_and_says_what_it_costs(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none", "exited:0"])
    result = pod.train("--keep")
    assert result.returncode == 0
    assert pod.did() == ["create", *DEPLOY]
    assert "costs money until you `delete` it" in result.stderr


def test_train_goes_on_with_a_slice_that_is_there_and_a_job_that_runs(stubs):
    Pod(stubs, ["GONE", "ACTIVE"], ["none", "exited:0"]).train("--keep")  # writes the job's id
    before = len(stubs.calls())
    pod = Pod(stubs, ["ACTIVE"], ["running running", "exited:0 exited:0"])
    assert pod.train("--keep").returncode == 0
    assert not [c for c in stubs.calls()[before:] if "'start'" in c[-1] or c[4] == "create"]


@pytest.mark.parametrize("ended", ["exited:0", "stopped", "exited:2", "exited:1"])
def test_the_end_of_an_earlier_job_is_not_this_ones(stubs, ended):
    pod = Pod(stubs, ["ACTIVE"], [ended, "running", "exited:0"])
    assert pod.train().returncode == 0
    assert pod.did() == [*DEPLOY, "delete"]


def test_train_leaves_alone_what_someone_else_runs_there(stubs):
    pod = Pod(stubs, ["ACTIVE"], ["running running"])
    result = pod.train()
    assert result.returncode == 1 and "something else is running there" in result.stderr
    assert pod.did() == []


def test_an_interrupted_supervisor_says_what_goes_on(stubs):
    Pod(stubs, ["GONE", "ACTIVE"], ["none", "running"])
    share = ("--share=10.0.0.2:/vol", "--poll_secs=0.1")
    process = subprocess.Popen(
        [str(ROOT / "launch/tpu.sh"), "train", *POD, *SLICE, *share, "--", *TRAINER],
        env=stubs.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line == "pod-1: running\n":
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "costs money" in errors
    assert not [c for c in stubs.calls() if c[4] == "delete"]


# --- on_host.sh -------------------------------------------------------------------------------


@pytest.fixture
def host(stubs):
    """A machine whose copy is this working tree and whose Python is a stand-in."""
    home = stubs.machine / "cascaded_diffusion"
    (home / "venv/bin").mkdir(parents=True)
    (home / "src").symlink_to(ROOT)
    stubs.add("python", 'printf "says %s\\n" "$*"; exit 7')
    (home / "venv/bin/python").symlink_to(stubs.bin / "python")
    yield stubs
    for pid in home.glob("jobs/*/pid"):
        try:
            os.kill(int(pid.read_text().split()[0]), signal.SIGKILL)
        except ProcessLookupError:
            continue


def on_host(stubs, *args):
    return stubs.run("on_host.sh", *args, HOME=str(stubs.machine))


def state_of(stubs):
    line = on_host(stubs, "status", "--job=main").stdout.split()
    assert line[0] == "@job" and line[2] == "main"
    return line[3]


def until(condition, secs=15):
    end = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def test_a_job_runs_by_itself_and_leaves_its_exit_code_and_log(host):
    assert state_of(host) == "none"
    logs = host.folder / "logs; touch PWNED"
    given = [v for v in HOSTILE if v]
    start = ("start", "--job=main", "--id=0a", f"--log_dir={logs}", "--")
    result = on_host(host, *start, "python", *given)
    assert result.returncode == 0, result.stderr
    until(lambda: state_of(host) == "exited:7")
    assert host.calls("python") == [["python", *given]]
    (log,) = logs.iterdir()
    assert "says plain two words it's" in log.read_text()
    assert on_host(host, "status", "--job=main").stdout.endswith("main exited:7 0a\n")


def test_stop_lets_the_trainer_save(host):
    host.add("python", "trap 'sleep 0.3; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    on_host(host, "start", "--job=main", "--", "python")
    log = host.machine / "cascaded_diffusion/jobs/main/log"
    until(lambda: "ready" in log.read_text())
    assert state_of(host) == "running"
    assert bad_input(on_host(host, "start", "--job=main", "--", "python"), "already running")
    assert on_host(host, "stop", "--job=main").returncode == 0
    job = host.machine / "cascaded_diffusion/jobs/main"
    assert (job / "exit_code").read_text() == "75\n"
    assert state_of(host) == "stopped"
    # Started anew, it is not stopped any more.
    host.add("python", "exit 0")
    on_host(host, "start", "--job=main", "--", "python")
    until(lambda: state_of(host) == "exited:0")


def test_stop_is_patient_and_kills_only_if_told_to(host):
    host.add("python", "trap '' TERM; echo ready; while :; do sleep 0.05; done")
    on_host(host, "start", "--job=main", "--", "python")
    log = host.machine / "cascaded_diffusion/jobs/main/log"
    until(lambda: "ready" in log.read_text())
    patient = on_host(host, "stop", "--job=main", "--timeout_secs=1", "--for_restart")
    assert patient.returncode == 1 and "still runs" in patient.stderr
    assert state_of(host) == "running"
    on_host(host, "stop", "--job=main", "--timeout_secs=0", "--for_restart", "--kill")
    assert state_of(host) == "exited:137"


def test_a_signal_to_all_processes_does_not_lose_the_trainers_code(host):
    host.add("python", "trap 'sleep 0.3; exit 75' TERM; echo ready; while :; do sleep 0.05; done")
    on_host(host, "start", "--job=main", "--", "python")
    job = host.machine / "cascaded_diffusion/jobs/main"
    until(lambda: "ready" in (job / "log").read_text())
    os.killpg(os.getpgid(int((job / "pid").read_text().split()[0])), signal.SIGTERM)
    until(lambda: state_of(host) == "exited:75")


def test_after_a_reboot_a_job_is_lost_not_running(host):
    on_host(host, "start", "--job=main", "--", "python")
    job = host.machine / "cascaded_diffusion/jobs/main"
    until(lambda: state_of(host) == "exited:7")
    (job / "exit_code").unlink()
    (job / "pid").write_text(f"{os.getpid()} of-an-earlier-boot\n")
    assert state_of(host) == "lost"
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    (job / "pid").write_text(f"{os.getpid()} {boot}")
    assert state_of(host) == "running"
    (job / "pid").unlink()


def test_setup_mounts_and_installs(host):
    for name in ("sudo", "mount.nfs"):
        host.add(name)
    host.add("mountpoint", "exit 1")
    host.add("python", "[[ $1 != -c ]] || exit 0")
    mount = str(host.folder / "mnt $(touch PWNED)")
    result = on_host(host, "setup", "--share=10.0.0.2:/my vol", f"--mount={mount}")
    assert result.returncode == 0, result.stderr
    mounting = ["mount", "-t", "nfs", "-o", "hard,noatime", "--", "10.0.0.2:/my vol", mount]
    assert host.calls("sudo") == [
        ["sudo", "mkdir", "-p", "--", mount],
        ["sudo", *mounting],
        ["sudo", "chmod", "a+rwx", "--", mount],
    ]
    install = host.calls("python")[-1]
    assert install[:3] == ["python", "-m", "pip"] and ".[tpu]" in install
    assert "https://storage.googleapis.com/jax-releases/libtpu_releases.html" in install


def test_setup_leaves_a_mounted_share_alone(host):
    for name in ("sudo", "mount.nfs", "mountpoint"):
        host.add(name)
    host.add("python", "[[ $1 != -c ]] || exit 0")
    on_host(host, "setup", "--share=10.0.0.2:/vol", "--mount=/mnt/share", "--extra=cuda")
    assert host.calls("sudo") == []
    assert host.calls("python")[-1][-2:] == [".[cuda]", "tensorboard>=2.19"]


def test_setup_brings_a_python_where_all_are_too_old(host):
    shutil.rmtree(host.machine / "cascaded_diffusion/venv")
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        host.add(
            name,
            "if [[ $1 == -c ]]; then exit 1; fi; if [[ $3 == venv ]]; then"
            ' mkdir -p "${@: -1}/bin"; printf "#!/bin/sh\\n" >"${@: -1}/bin/python";'
            ' chmod +x "${@: -1}/bin/python"; fi',
        )
    assert on_host(host, "setup").returncode == 0
    venv = str(host.machine / "cascaded_diffusion/venv")
    made = [c for c in host.calls("python3") if c[1] == "-m"]
    assert made == [
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        ["python3", "-m", "uv", "venv", "--seed", "--python", "3.12", venv],
    ]


def test_a_python_that_was_named_must_be_good(host):
    shutil.rmtree(host.machine / "cascaded_diffusion/venv")
    result = on_host(host, "setup", "--python=no such python")
    assert bad_input(result, "--python=", "3.11")


def test_the_copy_on_the_machine_runs_what_the_pod_is_told(host):
    """The whole way: tpu.sh, a remote string, a shell, on_host.sh, the trainer."""
    host.add("gcloud", REMOTE)
    given = [v for v in HOSTILE if v]
    result = host.run("tpu.sh", "run", *POD, "--", "main", *given)
    assert result.returncode == 0, result.stderr
    until(lambda: state_of(host) == "exited:7")
    trainer = ["python", "-m", "cascaded_diffusion.main", *given, "--distributed=tpu"]
    assert host.calls("python") == [trainer]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("start", "--job=main"), "no command"),
        (("start", "--", "x"), "--job: missing"),
        (("status", "--job=../x"), "--job=../x"),
        (("logs", "--job=main"), "no such job"),
        (("setup", "--share=h:/v"), "--mount: missing"),
        (("fly",), "no such command"),
    ],
)
def test_bad_input_on_the_machine(host, arguments, message):
    assert bad_input(on_host(host, *arguments), message)
