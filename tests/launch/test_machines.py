"""evaluate_vm.sh and tensorboard.sh: one machine beside the pod, and a look at its curves."""

import pytest

from tests.launch.stubs import (
    HOSTILE,
    ON_HOST,
    PLACE,
    POD,
    REMOTE,
    SLICE,
    SSH_FLAGS,
    bad_input,
    gcloud_ssh,
    remote_argv,
)

SHARE = "--share=10.0.0.2:/vol"
GPU = ("--kind=gpu", *POD, SHARE)
IMAGE = ("--machine_type=a2-highgpu-1g", "--image_family=fam", "--image_project=images")
COMPUTE = ["gcloud", "compute"]


def gpu_ssh():
    return [*COMPUTE, "ssh", "pod-1", *PLACE, *SSH_FLAGS]


# --- evaluate_vm.sh ---------------------------------------------------------------------------


def test_a_tpu_of_one_host_is_asked_for_as_the_pod_is(stubs):
    stubs.add("gcloud", "[[ $4 != describe ]] || echo ACTIVE")
    args = ("--kind=tpu", *POD, *SLICE, SHARE, "--spot", "--poll_secs=0")
    workdir = "--workdir=/mnt/share/RUN/sr256"
    result = stubs.run("evaluate_vm.sh", "up", *args, "--", workdir, "--inception_weights=/mnt/w")
    assert result.returncode == 0, result.stderr
    assert [c[3:5] for c in stubs.calls()] == [
        ["queued-resources", "create"],
        ["queued-resources", "describe"],
        ["tpu-vm", "scp"],
        *[["tpu-vm", "ssh"]] * 3,
    ]
    assert "--spot" in stubs.calls()[0]
    assert stubs.calls()[-1][:-1] == gcloud_ssh(0)
    start = remote_argv(stubs.calls()[-1])
    assert start == [
        *(*ON_HOST, "start", "--job=evaluate", "--log_dir=/mnt/share/launch_logs/pod-1", "--"),
        *("env", "JAX_COMPILATION_CACHE_DIR=/mnt/share/compilation_cache"),
        *("python", "-m", "cascaded_diffusion.evaluate", "--follow", workdir),
        *("--inception_weights=/mnt/w", "--distributed=none"),
    ]


def test_a_gpu_vm_is_one_of_compute_engine(stubs):
    stubs.add("gcloud")
    more = ("--spot", "--network=net", "--subnetwork=sub", "--internal_ips")
    workdir = "--workdir=/mnt/share/RUN/sr256"
    result = stubs.run("evaluate_vm.sh", "up", *GPU, *IMAGE, *more, "--", workdir)
    assert result.returncode == 0, result.stderr
    create, scp, _, setup, start = stubs.calls()
    assert create == [
        *(*COMPUTE, "instances", "create", "pod-1", *PLACE),
        *("--machine-type=a2-highgpu-1g", "--image-family=fam", "--image-project=images"),
        *("--boot-disk-size=200GB", "--maintenance-policy=TERMINATE"),
        *("--provisioning-model=SPOT", "--instance-termination-action=DELETE"),
        *("--network=net", "--subnet=sub", "--no-address"),
    ]
    assert scp[:3] == [*COMPUTE, "scp"] and scp[-1] == "--internal-ip"
    assert setup[:-1] == [*gpu_ssh()[:-2], "--internal-ip", *SSH_FLAGS]
    mount = ["--share=10.0.0.2:/vol", "--mount=/mnt/share"]
    assert remote_argv(setup) == [*ON_HOST, "setup", "--extra=cuda", *mount]
    assert remote_argv(start)[-2:] == [workdir, "--distributed=none"]


def test_evaluates_arguments_arrive_as_they_are(stubs):
    stubs.add("gcloud")
    given = ["--workdir=/mnt/share/it's $(touch PWNED)", *HOSTILE]
    assert stubs.run("evaluate_vm.sh", "run", *GPU, "--", *given).returncode == 0
    (call,) = stubs.calls()
    assert call[:-1] == gpu_ssh()
    arrived = remote_argv(call)
    assert arrived[arrived.index("--follow") + 1 :] == [*given, "--distributed=none"]


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("tpu", [*COMPUTE, "tpus", "queued-resources", "delete", "pod-1", *PLACE, "--force"]),
        ("gpu", [*COMPUTE, "instances", "delete", "pod-1", *PLACE]),
    ],
)
def test_the_machine_is_deleted(stubs, kind, call):
    stubs.add("gcloud")
    assert stubs.run("evaluate_vm.sh", "delete", f"--kind={kind}", *POD).returncode == 0
    assert stubs.calls() == [call]


def test_nothing_runs_on_a_machine_that_could_not_be_had(stubs):
    stubs.add("gcloud", "exit 1")
    args = (*GPU, *IMAGE, "--", "--workdir=/mnt/share/RUN")
    assert stubs.run("evaluate_vm.sh", "up", *args).returncode == 1
    assert len(stubs.calls()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no such command"),
        (("create", "--kind=cpu", *POD), "--kind=cpu"),
        (("create", "--kind=ssh", *POD), "--kind=ssh"),
        (("create", *GPU), "--machine_type: missing"),
        (("create", *GPU, *IMAGE, "--boot_disk_gb=big"), "--boot_disk_gb=big"),
        (("create", *GPU, *IMAGE, "--image_family=-x"), "--image_family=-x"),
        (("create", "--kind=tpu", *POD), "--accelerator_type: missing"),
        (("run", *GPU), "--workdir"),
        (("run", *GPU, "--", "--workdir="), "--workdir="),
        (("run", *GPU, "--", "--workdir=RUN"), "--workdir=RUN"),
        (("run", "--kind=gpu", *POD, "--", "--workdir=/mnt/share/RUN"), "--bucket: missing"),
        (("stop", *GPU, "--", "x"), "nothing after"),
    ],
)
def test_bad_input_of_evaluate_vm(stubs, arguments, message):
    stubs.add("gcloud")
    assert bad_input(stubs.run("evaluate_vm.sh", *arguments), message)
    assert stubs.calls() == []


# --- tensorboard.sh ---------------------------------------------------------------------------

FORWARD = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", "127.0.0.1:7007:127.0.0.1:7007"]


def board(logdir, port=7007):
    flags = [f"--logdir={logdir}", "--host=127.0.0.1", f"--port={port}"]
    return ["-m", "tensorboard.main", *flags]


def test_a_tunnel_to_a_tpu_vm(stubs):
    stubs.add("gcloud")
    logdir = "/mnt/share/" + "/".join(HOSTILE)
    args = ("--kind=tpu", *POD, f"--logdir={logdir}", "--port=7007")
    assert stubs.run("tensorboard.sh", *args).returncode == 0
    before, start, tunnel, after = stubs.calls()
    stop = [*ON_HOST, "stop", "--job=tensorboard", "--timeout_secs=10", "--kill"]
    assert remote_argv(before) == remote_argv(after) == stop
    assert remote_argv(start) == [
        *(*ON_HOST, "start", "--job=tensorboard", "--", "python"),
        *board(logdir),
    ]
    assert tunnel == [*gcloud_ssh(0), "--", *FORWARD]


def test_a_tunnel_to_a_gpu_vm_and_to_any_host(stubs):
    stubs.add("gcloud")
    stubs.add("ssh")
    logdir = ("--logdir=/RUN", "--port=7007")
    stubs.run("tensorboard.sh", "--kind=gpu", *POD, *logdir)
    stubs.run("tensorboard.sh", "--kind=ssh", "--host=me@host", *logdir)
    assert stubs.calls("gcloud")[2] == [*gpu_ssh(), "--", *FORWARD]
    start, tunnel = stubs.calls("ssh")[1:3]
    assert start[:3] == ["ssh", "me@host", "--"]
    assert remote_argv([f"--command={start[3]}"])[-5:] == board("/RUN")
    assert tunnel == ["ssh", *FORWARD, "me@host"]


def test_local_curves_need_no_tunnel(stubs):
    stubs.add("py")
    python = f"--python={stubs.bin / 'py'}"
    assert stubs.run("tensorboard.sh", "--logdir=a b", python).returncode == 0
    assert stubs.calls() == [["py", *board("a b", 6006)]]


def test_tensorboard_is_ended_where_the_tunnel_fails(stubs):
    stubs.add("gcloud", '[[ "$*" != *-N* ]] || exit 255')
    result = stubs.run("tensorboard.sh", "--kind=tpu", *POD, "--logdir=/RUN", "--port=7007")
    assert result.returncode == 255
    assert remote_argv(stubs.calls()[-1])[2] == "stop"


def test_it_arrives_at_the_machine(host):
    host.add("gcloud", REMOTE)
    result = host.run("tensorboard.sh", "--kind=tpu", *POD, "--logdir=/a b", "--port=7007")
    assert result.returncode == 0, result.stderr
    assert host.calls("python") == [["python", *board("/a b")]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--logdir: missing"),
        (("RUN",), "RUN: expected --flag=value"),
        (("--logdir=x", "--port=80"), "--port=80"),
        (("--logdir=x", "--port=99999"), "--port=99999"),
        (("--logdir=x", "--port=6006:0.0.0.0"), "--port="),
        (("--logdir=x", "--kind=all"), "--kind=all"),
        (("--logdir=/x", "--kind=ssh"), "--host: missing"),
        (("--logdir=/x", "--kind=ssh", "--host=-oProxyCommand=touch PWNED"), "--host="),
        (("--logdir=x", "--kind=tpu", *POD), "--logdir=x"),
        (("--logdir=/x", "--kind=tpu", "--zone=z"), "--name: missing"),
    ],
)
def test_bad_input_of_tensorboard(stubs, arguments, message):
    for name in ("ssh", "gcloud", "python3"):
        stubs.add(name)
    assert bad_input(stubs.run("tensorboard.sh", *arguments), message)
    assert stubs.calls() == []


def test_nothing_listens_to_the_world(stubs):
    stubs.add("gcloud")
    stubs.run("tensorboard.sh", "--kind=tpu", *POD, "--logdir=/RUN")
    assert not [a for call in stubs.calls() for a in call if "0.0.0.0" in a or "bind_all" in a]
