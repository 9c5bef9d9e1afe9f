"""Which job a process belongs to, as its environment and flags say."""

import pytest

from cascaded_diffusion.errors import UserError
from cascaded_diffusion.runtime.cluster import Cluster, find_cluster, first_host


def test_where_a_job_is_named():
    explicit = dict(coordinator="h:1", num_processes=2, process_id=1)
    assert find_cluster("auto", {"SLURM_STEP_NUM_TASKS": "9"}, **explicit) == Cluster("h:1", 2, 1)
    assert find_cluster("auto", {}) is None
    assert find_cluster("none", {"SLURM_STEP_NUM_TASKS": "9"}) is None
    slurm = {
        "SLURM_STEP_NODELIST": "gpu[07-09,11],cpu1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "3",
        "SLURM_JOB_ID": "4097",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    assert find_cluster("auto", slurm) == Cluster("gpu07:61441", 8, 3, (1,))
    slurm["SLURM_NTASKS_PER_NODE"] = "1"
    assert find_cluster("slurm", slurm) == Cluster("gpu07:61441", 8, 3)
    assert find_cluster("auto", {**slurm, "SLURM_STEP_NUM_TASKS": "1"}) is None
    gke = {"TPU_WORKER_HOSTNAMES": "a,b,c", "TPU_WORKER_ID": "2"}
    assert find_cluster("auto", gke) == Cluster("a:8476", 3, 2)
    assert find_cluster("auto", {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    answers = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3",
        "agent-worker-number": "1\n",
    }
    assert find_cluster("tpu", {}, metadata=answers.get) == Cluster("10.0.0.2:8476", 2, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b", "a"),
        ("gpu[003-010]", "gpu003"),
        ("gpu[1,3-4],x", "gpu1"),
        ("r[1-2]-n", "r1-n"),
    ],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("mode", "environ", "given", "message"),
    [
        ("auto", {}, dict(coordinator="h:1"), "--num_processes is missing"),
        ("auto", {}, dict(coordinator="h", num_processes=2, process_id=0), "expected HOST:PORT"),
        ("auto", {}, dict(coordinator="h:x", num_processes=2, process_id=0), "expected HOST:PORT"),
        ("auto", {}, dict(coordinator="h:1", num_processes=0, process_id=0), "at least 1"),
        ("auto", {}, dict(coordinator="h:1", num_processes=2, process_id=2), "expected 0 to 1"),
        ("slurm", {}, {}, "SLURM_STEP_NODELIST is not set; start the processes with srun"),
    ],
)
def test_what_makes_no_job_is_refused(mode, environ, given, message):
    with pytest.raises(UserError, match=message):
        find_cluster(mode, environ, **given)


def test_a_metadata_server_of_another_kind_is_refused():
    with pytest.raises(UserError, match="the metadata server says workers 'x'"):
        find_cluster("tpu", {}, metadata=lambda name: "x")


def test_some_modes_of_evaluation_are_for_one_process(capsys):
    from cascaded_diffusion import evaluate

    job = ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=0"]
    with pytest.raises(UserError, match="`evaluate bits_per_dim` is one process, not 2: start it"):
        evaluate.main(["prog", "bits_per_dim", "--bits_per_dim=test", "--workdir=nowhere", *job])
    with pytest.raises(UserError, match="no run there"):
        evaluate.main(["prog", "--workdir=nowhere", *job])
    with pytest.raises(UserError, match="no run there"):
        evaluate.main(["prog", "--workdir=nowhere", "--distributed=none"])
