"""What runs on the machines: jobs that outlive the connection, and the set-up."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.stubs import HOSTILE, POD, REMOTE, ROOT, bad_input


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


def test_logs_show_what_was_said_and_what_is_said_now(host):
    host.add("python", "echo first; sleep 0.5; echo second")
    on_host(host, "start", "--job=main", "--", "python")
    process = subprocess.Popen(
        [str(ROOT / "launch/on_host.sh"), "logs", "--job=main"],
        env={**host.env, "HOME": str(host.machine)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = iter(process.stdout)
        assert any(line == "first\n" for line in said)
        assert any(line == "second\n" for line in said)
    finally:
        process.kill()
        process.communicate()


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
    group = os.getpgid(int((job / "pid").read_text().split()[0]))
    assert group != os.getpgrp()  # a session of its own: ours is spared
    os.killpg(group, signal.SIGTERM)
    until(lambda: state_of(host) == "exited:75")


def test_after_a_reboot_a_job_is_lost_not_running(host):
    on_host(host, "start", "--job=main", "--", "python")
    job = host.machine / "cascaded_diffusion/jobs/main"
    until(lambda: state_of(host) == "exited:7")
    (job / "exit_code").unlink()
    other = subprocess.Popen(["sleep", "60"])
    try:
        (job / "pid").write_text(f"{other.pid} of-an-earlier-boot\n")
        assert state_of(host) == "lost"
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        (job / "pid").write_text(f"{other.pid} {boot}")
        assert state_of(host) == "running"
    finally:
        other.kill()
        other.wait()


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
