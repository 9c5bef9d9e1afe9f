"""slurm.sh and its job: what is submitted, and what is put back into the queue."""

import shutil
import sys

import pytest

from tests.launch.stubs import HOSTILE, ROOT, bad_input

JOB = str(ROOT / "launch/slurm_job.sh")


def submit(stubs, *args):
    stubs.add("sbatch", "echo 17")
    stubs.add("my python")
    python = f"--python={stubs.bin / 'my python'}"
    return stubs.run("slurm.sh", python, f"--log_dir={stubs.folder / 'lo%gs'}", *args)


def test_one_task_per_gpu_told_to_save_in_time(stubs):
    result = submit(stubs, "--nodes=2", "--gpus_per_node=8", "--time=1-12:00:00", "--", "main")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "17\n"
    assert stubs.calls() == [
        [
            *("sbatch", "--parsable", "--job-name=cascaded_diffusion", "--nodes=2"),
            *("--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=8"),
            *("--time=1-12:00:00", "--signal=TERM@120", "--requeue", "--open-mode=append"),
            # A % in the folder's name is no pattern of Slurm's.
            f"--output={stubs.folder / 'lo%%gs'}/%x-%j.log",
            f"--chdir={ROOT}",
            *(JOB, str(stubs.bin / "my python"), "-m", "cascaded_diffusion.main"),
            "--distributed=slurm",
        ]
    ]
    assert (stubs.folder / "lo%gs").is_dir()


def test_all_that_can_be_asked_for(stubs):
    words = ("--partition=gpu", "--account=lab", "--qos=high", "--constraint=a100|h100&ib x")
    submit(stubs, "--time=60", *words, "--mem_per_gpu=64G", "--save_secs=300", "--", "sample")
    (call,) = stubs.calls()
    assert call[call.index(f"--chdir={ROOT}") + 1 :] == [
        *words,
        *("--mem-per-gpu=64G", JOB, str(stubs.bin / "my python"), "-m"),
        *("cascaded_diffusion.sample", "--distributed=none"),
    ]
    assert "--signal=TERM@300" in call


def test_arguments_of_the_trainer_arrive_as_they_are(stubs):
    submit(stubs, "--time=60", "--nodes=2", "--", "main", *HOSTILE)
    (call,) = stubs.calls()
    module = call.index("cascaded_diffusion.main")
    assert call[module + 1 :] == [*HOSTILE, "--distributed=slurm"]
    # And from the job to srun.
    stubs.add("srun")
    assert stubs.run("slurm_job.sh", *call[module - 2 :], SLURM_JOB_ID="17").returncode == 0
    assert stubs.calls("srun")[0][3:] == call[module - 2 :]


def test_a_flag_of_the_user_stays_the_only_one(stubs):
    submit(stubs, "--time=60", "--nodes=2", "--", "main", "--distributed=auto")
    assert stubs.calls()[0][-2:] == ["cascaded_diffusion.main", "--distributed=auto"]


def test_dry_run_submits_nothing(stubs):
    result = submit(stubs, "--time=60", "--dry_run", "--", "main", "a b")
    assert result.returncode == 0 and stubs.calls() == []
    assert result.stdout.startswith("sbatch --parsable ")
    assert "a\\ b" in result.stdout
    assert not (stubs.folder / "lo%gs").exists()


def test_where_slurm_is_missing(stubs):
    if shutil.which("sbatch"):
        pytest.skip("Slurm is here")
    result = stubs.run("slurm.sh", "--time=60", f"--python={sys.executable}", "--", "main")
    assert bad_input(result, "sbatch: no such program here; run this where Slurm's commands are")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--", "main"), "--time: missing"),
        (("--time=soon", "--", "main"), "--time=soon"),
        (("--time=2", "--", "main"), "--time=2: expected more than --save_secs=120"),
        (("--time=00:01:59", "--", "main"), "--time=00:01:59: expected more than"),
        (("--time=0-00:02", "--", "main"), "--time=0-00:02: expected more than"),
        (("--time=1-0", "--save_secs=86400", "--", "main"), "--save_secs=86400"),
        (("--time=60", "--nodes=0", "--", "main"), "--nodes=0"),
        (("--time=60", "--nodes=2-4", "--", "main"), "--nodes=2-4"),
        (("--time=60", "--gpus_per_node=", "--", "main"), "--gpus_per_node: missing"),
        (("--time=60", "--partition=-x", "--", "main"), "--partition=-x"),
        (("--time=60", "--job_name=%x", "--", "main"), "--job_name=%x"),
        (("--time=60", "--mem_per_gpu=lots", "--", "main"), "--mem_per_gpu=lots"),
        (("--time=60", "--log_dir=a\\b", "--", "main"), "--log_dir="),
        (("--time=60", "--python=/no/such", "--", "main"), "--python=/no/such"),
        (("--time=60",), "expected main, evaluate or sample"),
        (("--time=60", "--", "$(touch PWNED)"), "expected main, evaluate or sample"),
    ],
)
def test_bad_input(stubs, arguments, message):
    assert bad_input(submit(stubs, *arguments), message)
    assert stubs.calls() == []


def job(stubs, srun, scontrol="", **env):
    stubs.add("srun", srun)
    stubs.add("scontrol", scontrol)
    return stubs.run("slurm_job.sh", "python", "-m", "x", SLURM_JOB_ID="17", **env)


def test_the_job_waits_for_tasks_that_still_save(stubs):
    assert job(stubs, "exit 0").returncode == 0
    assert stubs.calls() == [
        ["srun", "--kill-on-bad-exit=0", "--wait=300", "python", "-m", "x"],
    ]


def test_75_goes_back_into_the_queue(stubs):
    assert job(stubs, "exit 75").returncode == 0
    assert stubs.calls("scontrol") == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize("code", [1, 2, 137])
def test_other_ends_are_the_jobs_end(stubs, code):
    assert job(stubs, f"exit {code}").returncode == code
    assert stubs.calls("scontrol") == []


def test_a_preemption_that_reaches_the_batch_shell_does_not_end_it(stubs):
    assert job(stubs, "kill -TERM $PPID; sleep 0.2; exit 75").returncode == 0
    assert stubs.calls("scontrol") == [["scontrol", "requeue", "17"]]


def test_it_is_said_where_the_queue_does_not_take_it_back(stubs):
    result = job(stubs, "exit 75", scontrol="exit 1")
    assert result.returncode == 75
    assert result.stderr.startswith("error: job 17 could not be put back")


def test_the_job_script_is_not_for_the_shell(stubs):
    assert bad_input(stubs.run("slurm_job.sh", "x"), "launch/slurm.sh")
    assert bad_input(stubs.run("slurm_job.sh", SLURM_JOB_ID="17"), "expected a command")
