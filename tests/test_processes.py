"""Several processes: one of them killed, several machines, a shared run folder."""
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import train
from common.files import read_rows
from tests.test_train import assert_close_run, final

import pytest

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(cfg, *torchrun: str) -> subprocess.Popen:
    """torchrun with these flags, in a group of processes of its own."""
    flags = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
             for k, v in dataclasses.asdict(cfg).items() if v != ()]
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *torchrun, "train.py", *flags],
                            env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def worker(launcher: subprocess.Popen, rank: int) -> int:
    """The pid of the launcher's worker of this rank."""
    for pid in os.listdir("/proc"):
        try:
            with open(f"/proc/{pid}/status") as f:
                child = f"PPid:\t{launcher.pid}\n" in f.read()
            with open(f"/proc/{pid}/environ") as f:
                if child and f"\0RANK={rank}\0" in f.read():
                    return int(pid)
        except (OSError, ValueError):  # not a process, or it has ended
            pass
    raise AssertionError(f"no worker of rank {rank}")


@pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc")
def test_a_killed_worker_ends_the_other_and_nothing_is_lost(small):
    """kill -9 of one worker after the other; the folder is resumed by two processes, then by one."""
    options = {"dropout": 0.1, "micro_batch_size": 2, "save_minutes": 0.0, "max_steps": 150,
               "eval_interval": 50}
    whole, parts = small(name="whole", **options), small(name="parts", **options)
    train.main(whole)
    log = os.path.join(parts.out_dir, "parts", "metrics.jsonl")
    for rank in (1, 0):
        before = len(read_rows(log, strict=False))
        launcher = start(parts, "--standalone", "--nproc_per_node=2")
        while len(read_rows(log, strict=False)) < before + 5:
            assert launcher.poll() is None, launcher.stdout.read()
            time.sleep(0.02)
        os.kill(worker(launcher, rank), signal.SIGKILL)
        said, _ = launcher.communicate(timeout=60)
        assert launcher.returncode != 0 and "SIGKILL" in said
        assert 0 < final(parts)["progress"]["step"] < 150
    assert train.main(parts)["status"] == "finished"
    assert_close_run(whole, parts)


@pytest.mark.slow
def test_two_machines_are_one(small):
    """torchrun's own --nnodes: two agents with one worker each, meeting at a port, on a shared folder."""
    one, two = small(name="one"), small(name="two")
    train.main(one)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    agents = [start(two, *meet) for _ in range(2)]
    for agent in agents:
        said, _ = agent.communicate(timeout=120)
        assert agent.returncode == 0, said
    assert_close_run(one, two)
    assert [r["name"] for r in read_rows(os.path.join(two.out_dir, "ledger.jsonl"))] == ["one", "two"]
