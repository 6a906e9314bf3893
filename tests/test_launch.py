"""The launch scripts: what they would do, and what they do when slices and processes go away."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

REPOSITORY = pathlib.Path(__file__).parent.parent
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
CLOUD = ["--name", "pod", "--zone", "here", "--type", "v5litepod-64"]
TRAIN = ["--", "--config=configs/stage2.py:big", "--workdir=/bucket/a run"]

# Writes down how it was called, and answers with the first line (CODE TEXT) of the file named after it and an argument.
FAKE = """#!/usr/bin/env bash
tool=$(basename "$0")
echo "$tool $*" >>"$FAKES/calls"
[[ $* != *-m\\ mmcore_jax.train* ]] || echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES" >>"$FAKES/started"
for argument in "" "$@"; do
  answers="$FAKES/answers/$tool${argument:+-$argument}${JAX_PROCESS_ID:-}"
  if [[ -f $answers ]]; then
    read -r code text <"$answers"
    sed -i '1{$!d}' "$answers"
    [[ -z $text ]] || echo "$text"
    stop() { echo "$JAX_PROCESS_ID" >>"$FAKES/stopped"; exit 75; }
    [[ $code != hang ]] || { trap stop TERM; sleep 60 >/dev/null 2>&1 & wait $!; }
    exit "$code"
  fi
done
"""


class Machine:
    """A copy of the scripts, and tools that are not what they seem."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.fakes, self.launch = directory / "fakes", directory / "launch"
        shutil.copytree(LAUNCH, self.launch)
        (self.launch / "environment.sh").write_text(
            'cd "$(dirname "${BASH_SOURCE[0]}")/.." && source launch/flags.sh "$1"\n'
        )
        (self.fakes / "answers").mkdir(parents=True)
        self.have("gcloud", "xpk", "docker", "sbatch", "srun", "scontrol", "python")

    def have(self, *tools: str) -> None:
        for tool in tools:
            (self.fakes / tool).write_text(FAKE)
            (self.fakes / tool).chmod(0o755)

    def answer(self, what: str, *lines: str) -> None:
        """The last line answers all further calls."""
        (self.fakes / "answers" / what).write_text("".join(f"{line}\n" for line in lines))

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        environment = {**os.environ, "PATH": f"{self.fakes}:{os.environ['PATH']}", "FAKES": str(self.fakes)}
        environment |= {"MMCORE_JAX_RETRY_SECONDS": "0", "MMCORE_JAX_GRACE_SECONDS": "0.2", **variables}
        command = ["bash", str(self.launch / script), *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, script: str, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **variables)
        output, error = process.communicate(timeout=60)
        return process.returncode, output, error

    def calls(self, name: str = "calls") -> list[str]:
        return (self.fakes / name).read_text().splitlines() if (self.fakes / name).exists() else []


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "install the extra `test`"
    ran = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS, REPOSITORY / ".ci/run"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (
            "tpu.sh",
            [*CLOUD, "--spot"],
            [
                "gcloud compute tpus tpu-vm create pod --zone here --accelerator-type=v5litepod-64 "
                "--version=v2-alpha-tpuv5-lite --spot",
                "gcloud compute tpus tpu-vm scp",
                "gcloud compute tpus tpu-vm ssh pod --zone here --worker=all",
                "launch/host.sh tpu --config=configs/stage2.py:big",
            ],
        ),
        (
            "tpu.sh",
            [*CLOUD, "--queued", "--project", "ours", "--setup", "gcsfuse bucket /bucket", "--delete"],
            [
                "queued-resources create pod --zone here --project ours --node-id=pod --accelerator-type=v5litepod-64 "
                "--runtime-version=v2-alpha-tpuv5-lite --quiet",
                "{ gcsfuse bucket /bucket; }",
                "queued-resources delete pod --zone here --project ours --force --quiet",
            ],
        ),
        (
            "tpu.sh",
            [*CLOUD, "--slices", "4"],
            ["--node-count=4 --node-prefix=pod", *(f"tpu-vm ssh pod-{node} --zone" for node in range(4))],
        ),
        (
            "xpk.sh",
            ["--cluster", "c", "--zone", "z", "--type", "v5p-128", "--image", "i", "--slices", "2", "--create"],
            [
                "xpk cluster create --cluster c --zone z --tpu-type=v5p-128 --num-slices=2 --on-demand",
                "docker build --build-arg ACCELERATOR=tpu --tag i .",
                "docker push i",
                "xpk workload create --cluster c --zone z --tpu-type=v5p-128 --num-slices=2 --workload mmcore-jax "
                "--docker-image=i --max-restarts=99 --restart-on-exit-codes=1,75,134,137,143",
            ],
        ),
        (
            "slurm.sh",
            ["--nodes", "4", "--gpus", "8", "--cpus", "12", "--time", "8:00:00", "--sbatch=--partition=batch"],
            [
                "sbatch --job-name=mmcore_jax --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --requeue "
                "--signal=TERM@300 --open-mode=append --output=slurm-%j.log --cpus-per-task=12 --time=8:00:00 "
                "--partition=batch "
                "launch/slurm_job.sh 100"
            ],
        ),
        ("local.sh", [], ["+ env python -m mmcore_jax.train --stopped_code=75 --config=configs/stage2.py:big"]),
        (
            "local.sh",
            ["--processes", "2", "--extras", "cuda"],
            [f"JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} JAX_LOCAL_DEVICE_IDS={i} python" for i in range(2)],
        ),
    ],
)
def test_dry_run_says_what_it_would_do(machine, script, arguments, expected) -> None:
    code, output, error = machine.run(script, *arguments, "--dry-run", *TRAIN)
    assert (code, error) == (0, "")
    for part in expected:
        assert part in output
    assert "/bucket/a run" in output
    assert machine.calls() == []


@pytest.mark.parametrize("script", ["tpu.sh", "xpk.sh", "slurm.sh", "local.sh"])
def test_mistakes_are_one_sentence(machine, script) -> None:
    for arguments, words in (
        ([], "error: "),
        (["--nmae", "x"], "unknown argument --nmae"),
        (["--attempts"], "a value"),
    ):
        code, _, error = machine.run(script, *arguments)
        assert code == 2
        assert words in error
        assert len(error.splitlines()) == 1
    code, output, _ = machine.run(script, "--help")
    assert code == 0
    assert f"bash launch/{script}" in output
    assert "--dry-run" in output
    assert machine.calls() == []


def actions(calls: list[str]) -> list[str]:
    """The verbs of calls of gcloud."""
    return [call.split()[4] for call in calls if call.startswith("gcloud")]


@pytest.mark.parametrize(("queued", "up"), [([], "READY"), (["--queued"], "ACTIVE")])
def test_a_slice_that_was_taken_away_is_created_again(machine, queued, up) -> None:
    machine.answer("gcloud-describe", "1", "0 CREATING", f"0 {up}", "0 PREEMPTED", f"0 {up}", f"0 {up}")
    machine.answer("gcloud-ssh", "255", "1", "0")
    code, output, error = machine.run("tpu.sh", *CLOUD, *queued, *TRAIN)
    assert code == 0, error
    looked, trained = ["describe"], ["scp", "ssh"]
    first = [*looked, "create", *looked, *looked, *trained]
    second = [*looked, "delete", "create", *looked, *trained]
    assert actions(machine.calls()) == [*first, *second, *looked, *trained]
    assert "attempt 1 of 100 ended with exit code 255" in error
    assert output.splitlines()[-1].startswith("  gcloud compute tpus")


def test_a_mistake_of_the_user_is_not_tried_again(machine) -> None:
    machine.answer("gcloud-describe", "0 READY")
    machine.answer("gcloud-ssh", "2")
    code, _, _ = machine.run("tpu.sh", *CLOUD, *TRAIN)
    assert code == 2
    assert actions(machine.calls()) == ["describe", "scp", "ssh"]


def test_all_slices_train_at_once_and_a_mistake_at_one_counts_most(machine) -> None:
    machine.answer("gcloud-describe", "0 ACTIVE")
    machine.answer("gcloud-pod-0", "1", "1")
    machine.answer("gcloud-pod-1", "0", "2")
    code, _, _ = machine.run("tpu.sh", *CLOUD, "--slices", "2", *TRAIN)
    assert code == 2
    started = [call.split()[5] for call in machine.calls() if " ssh " in call]
    assert [sorted(started[:2]), sorted(started[2:])] == [["pod-0", "pod-1"]] * 2


def test_attempts_end(machine) -> None:
    machine.answer("gcloud-describe", "0 READY")
    machine.answer("gcloud-ssh", "1")
    code, _, error = machine.run("tpu.sh", *CLOUD, "--attempts", "3", *TRAIN)
    assert code == 1
    assert actions(machine.calls()).count("ssh") == 3
    assert "attempt 3 of 3" in error


def test_workloads_are_submitted_to_gke(machine) -> None:
    arguments = ["--cluster", "c", "--zone", "z", "--type", "v5p-128", "--image", "i"]
    assert machine.run("xpk.sh", *arguments, *TRAIN)[0] == 0
    assert [call.split()[0] for call in machine.calls()] == ["docker", "docker", "xpk"]
    machine.answer("docker-push", "1")
    assert machine.run("xpk.sh", *arguments, *TRAIN)[0] == 1
    assert sum(call.startswith("xpk") for call in machine.calls()) == 1


@pytest.mark.parametrize(
    ("ends_with", "restarts", "requeued"),
    [("0", "0", False), ("75", "3", True), ("1", "0", True), ("2", "0", False), ("75", "4", False)],
)
def test_jobs_go_back_into_the_queue(machine, ends_with, restarts, requeued) -> None:
    machine.answer("srun", ends_with)
    directory = str(machine.launch.parent)
    variables = {"SLURM_RESTART_COUNT": restarts, "SLURM_JOB_ID": "17"}
    code, _, _ = machine.run("slurm_job.sh", "5", directory, *TRAIN[1:], **variables)
    assert code == (0 if requeued else int(ends_with))
    assert ("scontrol requeue 17" in machine.calls()) == requeued
    assert "srun --kill-on-bad-exit=1 python -m mmcore_jax.train --stopped_code=75 --config" in machine.calls()[0]


def test_all_processes_start_again_when_one_dies(machine) -> None:
    machine.answer("python--c", "0 4242")
    machine.answer("python0", "hang", "0")
    machine.answer("python1", "137", "0")
    begin = time.monotonic()
    code, _, error = machine.run("local.sh", "--processes", "2", *TRAIN)
    assert code == 0, error
    assert sorted(machine.calls("started")) == ["0 of 2", "0 of 2", "1 of 2", "1 of 2"]
    assert "attempt 1 of 100 ended with exit code 137" in error
    assert time.monotonic() - begin < 30, "the one that hangs was waited for"


def test_a_signal_reaches_all_processes(machine) -> None:
    machine.answer("python--c", "0 4242")
    for index in range(2):
        machine.answer(f"python{index}", "hang")
    process = machine.start("local.sh", "--processes", "2", *TRAIN)
    while len(machine.calls("started")) < 2:
        time.sleep(0.05)
    time.sleep(0.3)  # until they listen
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(machine.calls("started")) == 2
    assert sorted(machine.calls("stopped")) == ["0", "1"]


def test_what_is_set_already_stays() -> None:
    show = "source launch/flags.sh cuda,openmoji; "
    show += "echo ${XLA_CLIENT_MEM_FRACTION:-$XLA_PYTHON_CLIENT_MEM_FRACTION}/$GLIBC_TUNABLES"

    def shown(**given: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | given
        ran = subprocess.run(["bash", "-c", show], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        return ran.stdout.strip()

    assert shown() == "0.92/glibc.malloc.hugetlb=1"
    assert shown(XLA_CLIENT_MEM_FRACTION="0.5") == "0.5/glibc.malloc.hugetlb=1"
    assert shown(XLA_PYTHON_CLIENT_MEM_FRACTION="0.5") == "0.5/glibc.malloc.hugetlb=1"
    assert shown(GLIBC_TUNABLES="glibc.malloc.arena_max=1") == "0.92/glibc.malloc.arena_max=1"


def test_a_host_with_an_old_python_gets_a_newer_one(machine, tmp_path) -> None:
    shutil.copy(LAUNCH / "environment.sh", machine.launch)
    shutil.copy(REPOSITORY / "setup.py", tmp_path)
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        machine.have(name)
        machine.answer(f"{name}--c", "1")
    machine.have("fetched")
    machine.answer("python3-find", f"0 {machine.fakes}/fetched")
    (machine.fakes / "fetched").write_text(
        '#!/bin/bash\n[[ $2 != venv ]] || { mkdir -p .venv/bin && echo "# $PWD/.venv" >.venv/bin/activate; }\n'
    )
    code, _, error = machine.run("host.sh", "tpu", *TRAIN[1:])
    assert code == 0, error
    assert machine.calls()[-1].startswith("python -m mmcore_jax.train --stopped_code=75 --config=")
    assert any("-m uv python install" in call for call in machine.calls())


def test_an_environment_that_is_a_link_is_not_emptied(tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/kept").touch()
    shutil.copytree(LAUNCH, tmp_path / "clone/launch")
    (tmp_path / "clone/.venv").symlink_to(tmp_path / "elsewhere")
    ran = subprocess.run(["bash", "launch/test.sh"], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: .venv is a link to {tmp_path}/elsewhere")
    assert (tmp_path / "elsewhere/kept").exists()
