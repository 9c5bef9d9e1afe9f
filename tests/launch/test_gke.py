"""gke.sh: the JobSet says exactly what was asked for, whatever is in the values."""

import re

import pytest

from launch.gke.render import render
from tests.launch.stubs import HOSTILE, bad_input

yaml = pytest.importorskip("yaml")

JOB = ("--name=sr256", "--image=region/repo/image:1", "--topology=4x4", "--claim=share")
TRAINER = ("main", "--config=configs/sr256.py", "--workdir=/mnt/share/RUN/sr256")


def jobset(stubs, *args, trainer=TRAINER):
    result = stubs.run("gke.sh", "render", *JOB, *args, "--", *trainer)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def pod_of(made):
    (replicated,) = made["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]["template"]["spec"]


def as_kubernetes_starts_it(command):
    """$(NAME) is replaced, $$ is $: here with variables all of which would be noticed."""
    return [re.sub(r"\$(\$|\([^)]*\))", lambda m: "$" if m[1] == "$" else "!", a) for a in command]


def test_a_slice_is_one_job_of_as_many_pods_as_hosts(stubs):
    made = jobset(stubs, "--namespace=team", "--grace_secs=300", "--max_restarts=7")
    assert made["kind"] == "JobSet" and made["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert made["metadata"]["name"] == "sr256" and made["metadata"]["namespace"] == "team"
    assert made["spec"]["network"] == {"enableDNSHostnames": True}
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7
    (replicated,) = made["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 1
    assert (job["completions"], job["parallelism"], job["backoffLimit"]) == (4, 4, 0)
    assert job["completionMode"] == "Indexed"
    pod = pod_of(made)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["restartPolicy"] == "Never"  # as podFailurePolicy demands
    assert "serviceAccountName" not in pod
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"google.com/tpu": 4},
        "limits": {"google.com/tpu": 4},
    }
    assert container["command"] == ["python", "-m", "cascaded_diffusion.main", *TRAINER[1:]]
    (cache,) = container["env"]
    assert cache == {"name": "JAX_COMPILATION_CACHE_DIR", "value": "/mnt/share/compilation_cache"}
    assert container["volumeMounts"] == [{"name": "share", "mountPath": "/mnt/share"}]
    assert pod["volumes"] == [{"name": "share", "persistentVolumeClaim": {"claimName": "share"}}]


def test_what_was_stopped_after_saving_starts_again_and_does_not_count(stubs):
    made = jobset(stubs)
    (rule,) = made["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    stopped, gone = job["podFailurePolicy"]["rules"]
    assert stopped["action"] == gone["action"] == "FailJob"
    (container,) = pod_of(made)["containers"]
    assert stopped["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [75],
    }
    assert gone["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"),
    [("4x4", 4, 4), ("16x16", 4, 64), ("2x4", 8, 1), ("4x4x8", 4, 32)],
)
def test_hosts_are_counted(stubs, topology, chips, hosts):
    made = jobset(stubs, f"--topology={topology}", f"--chips_per_host={chips}")
    assert made["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == hosts


def test_spot_and_service_account(stubs):
    pod = pod_of(jobset(stubs, "--spot", "--service_account=trainer"))
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "trainer"


STRANGE = (
    *HOSTILE,
    "{{ name }}",
    "yes",
    "1e3",
    "null",
    "a: b # c",
    "- x",
    "\t",
    "\x85\u2028\x7f",
    "$$",
)


@pytest.mark.parametrize("value", STRANGE)
def test_values_come_out_as_they_went_in(stubs, value):
    words = (f"--config={value}", value, f"--workdir=/m{value}/RUN")
    given = (f"--image=i{value}", f"--claim=c{value}", f"--mount=/m{value}")
    pod = pod_of(jobset(stubs, *given, trainer=("main", *words)))
    (container,) = pod["containers"]
    assert container["image"] == f"i{value}"
    assert container["volumeMounts"][0]["mountPath"] == f"/m{value}"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == f"c{value}"
    command = as_kubernetes_starts_it(container["command"])
    assert command == ["python", "-m", "cascaded_diffusion.main", *words]


def test_render_wants_all_values_and_no_others():
    assert render("a: {{ x }}\n# {{ x }}\n", {"x": 'y"'}) == 'a: "y\\""\n# {{ x }}\n'
    with pytest.raises(KeyError, match="x"):
        render("a: {{ x }}\n", {})
    with pytest.raises(KeyError, match="not in the template: y"):
        render("a: {{ x }}\n", {"x": 1, "y": 2})


def test_apply_gives_the_rendered_jobset_to_kubectl(stubs):
    seen = stubs.folder / "stdin"
    stubs.add("kubectl", f'cat >"{seen}"')
    result = stubs.run("gke.sh", "apply", *JOB, "--context=my cluster", "--", *TRAINER)
    assert result.returncode == 0, result.stderr
    assert stubs.calls() == [
        ["kubectl", "--context=my cluster", "--namespace=default", "apply", "--filename=-"]
    ]
    assert yaml.safe_load(seen.read_text()) == jobset(stubs)


def test_logs_and_delete(stubs):
    stubs.add("kubectl")
    assert stubs.run("gke.sh", "logs", "--name=sr256", "--worker=3").returncode == 0
    assert stubs.run("gke.sh", "delete", "--name=sr256", "--namespace=team").returncode == 0
    logs, delete = stubs.calls()
    labels = "jobset.sigs.k8s.io/jobset-name=sr256,batch.kubernetes.io/job-completion-index=3"
    assert logs[1:] == [
        *("--namespace=default", "logs", "--follow"),
        *("--container=trainer", f"--selector={labels}"),
    ]
    assert delete[1:] == ["--namespace=team", "delete", "jobset", "sr256"]


def test_dry_run_calls_nothing(stubs):
    stubs.add("kubectl")
    result = stubs.run("gke.sh", "delete", "--name=sr256", "--dry_run")
    assert result.stdout == "kubectl --namespace=default delete jobset sr256\n"
    assert stubs.calls() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no such command"),
        (("apply", "--", "main"), "--name: missing"),
        (("delete", "--name=-x"), "--name=-x"),
        (("delete", "--name=x$(touch PWNED)"), "--name="),
        (("delete", "--name=x", "--namespace=a b"), "--namespace="),
        (("logs", "--name=x", "--worker=all"), "--worker=all"),
        (("logs", "--name=x", "--", "main"), "nothing after"),
        (("render", "--name=x", "--topology=4x4", "--claim=c", "--", "main"), "--image: missing"),
        (("render", *JOB, "--topology=4", "--", "main"), "--topology=4"),
        (("render", *JOB, "--topology=3x3", "--", *TRAINER), "--chips_per_host=4"),
        (("render", *JOB, "--topology=1x2", "--", *TRAINER), "--chips_per_host=4"),
        (("render", *JOB, "--mount=m", "--", "main"), "--mount=m"),
        (("render", *JOB, "--max_restarts=-1", "--", "main"), "--max_restarts=-1"),
        (("render", *JOB, "--", "prepare"), "-- prepare"),
        (("render", *JOB, "--", "main", "--config=c"), "-- main: --workdir is missing"),
        (("render", *JOB, "--", "main", "--workdir="), "-- main: --workdir is missing"),
        (("logs", "--name=x", "--worker="), "--worker: missing"),
        (("render", *JOB, "--", "main", "--workdir=RUN"), "--workdir=RUN"),
    ],
)
def test_bad_input(stubs, arguments, message):
    stubs.add("kubectl")
    assert bad_input(stubs.run("gke.sh", *arguments), message)
    assert stubs.calls() == []
