"""tpu.sh train: a pod whose machines come, go and crash, and what is done about it."""

import re
import shlex
import shutil
import signal
import subprocess

import pytest

from tests.launch.stubs import POD, ROOT, SLICE, remote_argv


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
        for call in self._stubs.calls("gcloud"):
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
    # A new slice finds on the share what the last one compiled.
    cache = "JAX_COMPILATION_CACHE_DIR=/mnt/share/compilation_cache"
    trainer = ["python", "-m", "cascaded_diffusion.main", *TRAINER[1:], "--distributed=tpu"]
    arrived = remote_argv(start)
    assert arrived[arrived.index("--") + 1 :] == ["env", cache, *trainer]
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
    workers = ["none", *["!"] * 4, "none", "exited:0"]
    pod = Pod(stubs, ["GONE", *["ACTIVE"] * 5, "GONE", "ACTIVE"], workers)
    assert pod.train("--max_unanswered=3").returncode == 0
    assert pod.did() == ["create", *DEPLOY, "delete"] * 2


def test_train_runs_again_what_was_stopped_after_saving(stubs):
    workers = ["none none", "exited:75 exited:75", "running running", "exited:75 exited:1"]
    pod = Pod(stubs, ["GONE", "ACTIVE"], [*workers, "exited:0 exited:0"])
    result = pod.train("--max_failures=0")
    assert result.returncode == 0, result.stderr
    assert pod.did() == ["create", *DEPLOY, "start", "start", "delete"]


@pytest.mark.parametrize(("max_crashes", "code"), [(2, 1), (3, 0)])
def test_a_crash_that_ends_the_others_by_75_does_not_repeat_for_ever(stubs, max_crashes, code):
    workers = ["none none", *["exited:137 exited:75"] * 3, "exited:0 exited:0"]
    pod = Pod(stubs, ["GONE", "ACTIVE"], workers)
    result = impatient_train(stubs, "--max_failures=0", max_crashes=max_crashes)
    assert result.returncode == code, result.stderr
    assert pod.did() == ["create", *DEPLOY, *["start"] * min(max_crashes, 3), "delete"]


def test_some_workers_that_finished_are_not_all(stubs):
    answers = ["none none", "running running", "exited:0", "running exited:0", "exited:0 exited:0"]
    pod = Pod(stubs, ["GONE", "ACTIVE"], answers)
    assert pod.train().returncode == 0
    assert pod.did() == ["create", *DEPLOY, "delete"]
    assert (stubs.folder / "workers").read_text().splitlines() == answers[-1:]


def test_one_answer_is_not_enough_to_give_up_a_slice(stubs):
    states = ["GONE", "ACTIVE", "ACTIVE", "GONE", "GONE", "ACTIVE"]
    pod = Pod(stubs, states, ["none", "running", "exited:0"])
    assert pod.train("--max_failures=0").returncode == 0
    assert pod.did() == ["create", *DEPLOY, "delete"]


def test_train_stops_at_bad_input(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none none", "exited:2 exited:2"])
    result = pod.train()
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the trainer refused its input")
    assert "launch_logs/pod-1" in result.stderr
    assert pod.did() == ["create", *DEPLOY, "delete"]


def test_workers_that_waited_in_vain_for_another_are_not_bad_input(stubs):
    workers = ["none none", "exited:1 exited:2", "exited:0 exited:0"]
    pod = Pod(stubs, ["GONE", "ACTIVE"], workers)
    assert pod.train().returncode == 0
    assert pod.did() == ["create", *DEPLOY, "start", "delete"]


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


def test_train_ends_where_the_cloud_never_answers_and_deletes_nothing_blindly(stubs):
    pod = Pod(stubs, ["GONE"], [], fails='"queued-resources describe"')
    result = pod.train("--max_unanswered=3")
    assert result.returncode == 1 and "--max_unanswered=3" in result.stderr
    assert len(stubs.calls()) == 4 and pod.did() == []


def impatient_train(stubs, *flags, **seconds):
    """`train` of a copy of the scripts in which these constants are others."""
    copy = stubs.folder / "launch"
    shutil.copytree(ROOT / "launch", copy)
    text = (copy / "tpu.sh").read_text()
    for name, secs in seconds.items():
        text, found = re.subn(rf"^{name}=\d+$", f"{name}={secs}", text, flags=re.MULTILINE)
        assert found == 1
    (copy / "tpu.sh").write_text(text)
    subprocess.run(["git", "init", "-q", stubs.folder], check=True)
    commit = ["-c", "user.name=x", "-c", "user.email=x", "commit", "-q", "--allow-empty", "-mx"]
    subprocess.run(["git", "-C", stubs.folder, *commit], check=True)
    share = ("--share=10.0.0.2:/vol", "--poll_secs=0", *flags)
    return subprocess.run(
        [str(copy / "tpu.sh"), "train", *POD, *SLICE, *share, "--", *TRAINER],
        env=stubs.env,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_train_ends_workers_that_hang_after_another_has_ended(stubs):
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none none", "running exited:1", "exited:0 exited:0"])
    result = impatient_train(stubs, stuck_secs=0)
    assert result.returncode == 0, result.stderr
    assert pod.did() == ["create", *DEPLOY, "stop", "delete"]
    (stop,) = [c for c in stubs.calls() if "'stop'" in c[-1]]
    assert remote_argv(stop)[-2:] == ["--for_restart", "--kill"]


@pytest.mark.parametrize(("healthy_secs", "code"), [(0, 0), (1800, 1)])
def test_crashes_long_after_each_other_are_not_in_a_row(stubs, healthy_secs, code):
    workers = ["none", *["running", "exited:1"] * 3, "exited:0"]
    Pod(stubs, ["GONE", "ACTIVE"], workers)
    result = impatient_train(stubs, "--max_failures=1", healthy_secs=healthy_secs)
    assert result.returncode == code, result.stderr


def test_an_archive_that_could_not_be_made_is_not_sent(stubs):
    git = shutil.which("git")
    stubs.add("git", f'[[ " $* " != *" archive "* ]] || exit 128; exec {git} "$@"')
    pod = Pod(stubs, ["GONE", "ACTIVE"], ["none"])
    result = pod.train("--max_failures=0")
    assert result.returncode == 1 and "copy, setup or start failed" in result.stderr
    assert pod.did() == ["create", "delete"]


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
