"""Runs in a bucket, where others use a share: told to the machines, and never public."""

import pytest

from tests.launch.stubs import POD, REMOTE, SLICE, bad_input, remote_argv
from tests.launch.test_gke import pod_of, yaml
from tests.launch.test_on_host import on_host, state_of, until

_BUCKET = "--bucket=gs://bucket/team"
_MAIN = ("--", "main", "--config=configs/sr256.py", "--workdir=gs://bucket/team/RUN/sr256")
_ASK = ["gcloud", "storage", "buckets", "describe", "gs://bucket"]


def _bucket_says(stubs, answer):
    stubs.add("gcloud", f'if [[ "$1 $2" == "storage buckets" ]]; then {answer}; fi')


def test_workers_get_the_bucket_and_look_at_no_share(stubs):
    _bucket_says(stubs, "echo enforced")
    result = stubs.run("tpu.sh", "run", *POD, _BUCKET, *_MAIN)
    assert result.returncode == 0, result.stderr
    ask, start = stubs.calls()
    assert ask == [*_ASK, "--format=value(public_access_prevention)", "--project=my-project"]
    arrived = remote_argv(start)
    assert "--log_dir=gs://bucket/team/launch_logs/pod-1" in arrived
    command = arrived[arrived.index("--") + 1 :]
    assert command[:2] == ["env", "JAX_COMPILATION_CACHE_DIR=gs://bucket/team/compilation_cache"]
    assert "--workdir=gs://bucket/team/RUN/sr256" in command


def test_setup_installs_what_a_bucket_needs(stubs):
    stubs.add("gcloud")
    assert stubs.run("tpu.sh", "setup", *POD, _BUCKET).returncode == 0
    (call,) = stubs.calls()
    assert remote_argv(call)[-2:] == ["setup", "--extra=tpu,gcs"]


@pytest.mark.parametrize("answer", ["inherited", "", "unspecified"])
@pytest.mark.parametrize("command", ["create", "run", "train"])
def test_a_bucket_that_could_become_public_is_refused_with_the_command_that_mends_it(
    stubs, command, answer
):
    _bucket_says(stubs, f"echo {answer}")
    more = () if command == "create" else _MAIN
    result = stubs.run("tpu.sh", command, *POD, *SLICE, _BUCKET, *more)
    mend = "`gcloud storage buckets update gs://bucket --public-access-prevention`"
    assert bad_input(result, "--bucket=gs://bucket/team: the public could be given access", mend)
    assert len(stubs.calls()) == 1


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        ("HTTPError 403: me does not have storage.buckets.get access", 2, "roles/storage.bucketV"),
        ("gs://bucket not found: 404.", 2, "buckets create gs://bucket"),
        ("HTTPError 503: try later", 1, "could not be asked about: ERROR: (gcloud) HTTPError 503"),
    ],
)
def test_a_bucket_that_cannot_be_looked_at(stubs, said, code, words):
    _bucket_says(stubs, f"echo 'ERROR: (gcloud) {said}' >&2; exit 1")
    result = stubs.run("tpu.sh", "run", *POD, _BUCKET, *_MAIN)
    assert result.returncode == code
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: --bucket=gs://bucket/team: ")
    assert words in line


def test_a_dry_run_shows_the_question(stubs):
    stubs.add("gcloud")
    result = stubs.run("tpu.sh", "run", *POD, _BUCKET, "--dry_run", *_MAIN)
    assert result.returncode == 0
    assert result.stdout.startswith("gcloud storage buckets describe gs://bucket")
    assert stubs.calls() == []


def test_the_evaluator_reads_the_same_bucket(stubs):
    _bucket_says(stubs, "echo enforced")
    machine = ("--kind=tpu", *POD, _BUCKET)
    run = ("--", "--workdir=gs://bucket/team/RUN/sr256")
    assert stubs.run("evaluate_vm.sh", "run", *machine, *run).returncode == 0
    assert "--log_dir=gs://bucket/team/launch_logs/pod-1" in remote_argv(stubs.calls()[-1])
    assert stubs.run("evaluate_vm.sh", "setup", *machine).returncode == 0
    assert "--extra=tpu,gcs" in remote_argv(stubs.calls()[-1])


def test_pods_of_a_bucket_mount_nothing(stubs):
    job = ("--name=sr256", "--image=image", "--topology=4x4", "--service_account=trainer")
    result = stubs.run("gke.sh", "render", *job, _BUCKET, *_MAIN)
    assert result.returncode == 0, result.stderr
    pod = pod_of(yaml.safe_load(result.stdout))
    assert "volumes" not in pod
    (container,) = pod["containers"]
    assert "volumeMounts" not in container
    (cache,) = container["env"]
    assert cache["value"] == "gs://bucket/team/compilation_cache"
    stubs.add("kubectl")
    _bucket_says(stubs, "echo inherited")
    assert bad_input(stubs.run("gke.sh", "apply", *job, _BUCKET, *_MAIN), "--public-access-prev")
    assert stubs.calls("kubectl") == []


def test_the_log_is_in_the_bucket_when_the_job_has_ended(host):
    host.add("gcloud", REMOTE)
    folder = "--log_dir=gs://bucket/logs"
    assert on_host(host, "start", "--job=main", folder, "--", "python", "x").returncode == 0
    until(lambda: state_of(host) == "exited:7")
    (call,) = host.calls("gcloud")
    assert call[:5] == ["gcloud", "storage", "cp", "--quiet", "--"]
    assert call[-1].startswith("gs://bucket/logs/main-")


def test_a_log_that_cannot_be_copied_loses_no_exit_code(host):
    host.add("gcloud", "exit 1")
    folder = "--log_dir=gs://bucket/logs"
    assert on_host(host, "start", "--job=main", folder, "--", "python", "x").returncode == 0
    until(lambda: state_of(host) == "exited:7")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((_BUCKET, "--share=10.0.0.2:/share"), "expected none with --bucket"),
        (("--bucket=bucket",), "--bucket=bucket: expected gs://BUCKET or gs://BUCKET/FOLDER"),
        (("--bucket=gs://a b",), "expected gs://BUCKET"),
        (("--bucket=gs://$(touch PWNED)/x",), "expected gs://BUCKET"),
        (("--bucket=gs://bucket/../x",), "expected gs://BUCKET"),
        (("--bucket=s3://bucket/x",), "expected gs://BUCKET"),
        (("--bucket=gs://other",), "--workdir=gs://bucket/team/RUN/sr256: expected a folder in"),
    ],
)
def test_bad_input_about_a_bucket(stubs, flags, words):
    stubs.add("gcloud")
    assert bad_input(stubs.run("tpu.sh", "run", *POD, *flags, *_MAIN), words)
    assert stubs.calls() == []
