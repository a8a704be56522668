"""Trials by Ray: workers that stay, each trains one trial after another, on this machine or on a cluster.

On this machine Ray runs for this sweep alone: it listens on 127.0.0.1 only, without its dashboard and its usage
statistics, keeps its files in a temporary folder, and ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zoo.core.errors import RunError, UsageError, quoted
from zoo.sweeps.judge import History, Judge, Rules
from zoo.sweeps.store import Record
from zoo.sweeps.trial import Job, Outcome, base_row, run_trial
from zoo.sweeps.workers import Workers

WAIT_SECONDS = 0.25
CONNECT_SECONDS = 10.0
STOP_SECONDS = 60.0
"""How long a worker may take after a request to stop to save its checkpoint."""
_LONGEST = 40  # characters of a folder in which Ray can still name its sockets
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # no variable of the GPUs is touched where none is asked for
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}
_INHERITED = ("ZOO_", "OMP_", "MKL_", "GOMP_", "THP_")
_MARK = "ZOO_RAY_FOLDER"
"""The variable by which Ray's processes of this sweep are known: all have it in their environment."""
_UNDERTAKER = """
import os, shutil, signal, sys, time
mark, folder, patience = sys.argv[1], sys.argv[2], float(sys.argv[3])
sys.stdin.read()
wanted = f"{mark}={folder}".encode()
def left():
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if wanted in file.read().split(bytes(1)):
                        yield int(name)
            except OSError:
                pass
end = time.monotonic() + patience
while any(left()) and time.monotonic() < end:
    time.sleep(0.2)
while found := list(left()):
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    time.sleep(0.2)
shutil.rmtree(folder, ignore_errors=True)
"""
"""Waits until this process has ended, in whatever way, ends what is left of Ray's processes, and deletes its folder."""
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_PATIENCE = 5.0
"""Seconds that Ray's processes have to end by themselves."""


class Worker:
    """An actor that trains one trial after another, in a thread, while `stop` may be called from another."""

    def __init__(self, judge: Any, waits: bool):
        self.judge, self.waits = judge, waits
        self.stopped = False

    def train(self, job: Job) -> Outcome:
        return run_trial(job, self._judge, lambda: self.stopped)

    def _judge(self, trial: int, record: dict[str, Any]) -> bool:
        import ray

        answer = self.judge.evaluated.remote(trial, record)
        return bool(ray.get(answer)) if self.waits else False

    def stop(self) -> None:
        self.stopped = True

    def ready(self) -> None:
        """Returns once the process has started."""


class _Place(NamedTuple):
    """A worker, and what is there once its process has started."""

    actor: Any
    ready: Any


class RayWorkers(Workers):
    """Workers of Ray.

    Args:
        count: number of trials at once, by default one for each processor (or GPU) that Ray has.
        address: of a cluster; None for this machine.
        rules: see `zoo.sweeps.judge.Judge`.
        groups: the same.
        history: what a judge has to know of trials that ran before.
        wanted: number of trials there are, beyond which no worker is of use.

    Raises:
        UsageError: no cluster at this address.
    """

    def __init__(
        self,
        count: int | None,
        address: str | None,
        rules: Rules | None,
        groups: dict[int, str],
        history: History,
        wanted: int,
    ):
        self._ray = _Session(address, count)
        import ray

        self.ray = ray
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        places = int(gpus or resources.get("CPU", 1)) or 1
        self.count = max(min(count or places, wanted), 1)
        share = min(gpus / self.count, 1.0)
        self._options = {"num_cpus": 0 if share else 1, "num_gpus": share, "concurrency_groups": {"control": 1}}
        self._judges = rules is not None
        self.judge: Any = ray.remote(num_cpus=0)(Judge).remote(rules, groups, history)
        self._free = [self._worker() for _ in range(self.count)]
        self._busy: dict[Any, tuple[Job, _Place]] = {}
        self._news: Any = None
        self._latest: dict[int, dict[str, Any]] = {}
        self._asked_at: float | None = None

    def _worker(self) -> _Place:
        actor: Any = self.ray.remote(**self._options)(Worker).remote(self.judge, self._judges)
        return _Place(actor, actor.ready.options(concurrency_group="control").remote())

    def start(self, job: Job) -> None:
        worker = self._free.pop()
        self._busy[worker.actor.train.remote(job)] = job, worker

    def wait(self) -> list[Outcome]:
        done, _ = self.ray.wait(list(self._busy), num_returns=1, timeout=WAIT_SECONDS)
        late = self._asked_at is not None and time.monotonic() - self._asked_at > STOP_SECONDS
        for reference in list(self._busy) if late else []:
            self.ray.kill(self._busy[reference][1].actor)
        return [self._take(reference) for reference in done]

    def _take(self, reference: Any) -> Outcome:
        job, worker = self._busy.pop(reference)
        try:
            outcome = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            if self._asked_at is not None:
                return Outcome(job, "interrupted", Record(base_row(job, "interrupted", "interrupted")))
            if getattr(error, "actor_init_failed", False):  # so would the next one: no trial is to blame
                raise RunError(f"A worker could not start{_why(error)}.") from None
            self._free.append(self._worker())
            told = "the worker's process ended" + _why(error)
            return Outcome(job, "failed", Record(base_row(job, "failed", told)))
        self._free.append(worker)
        return outcome

    def records(self) -> dict[int, dict[str, Any]]:
        if self._news is None:
            self._news = self.judge.latest.remote()
        elif self.ray.wait([self._news], timeout=0)[0]:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self._latest = self.ray.get(self._news)
            self._news = None
        return self._latest

    def stop(self) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            for _, worker in self._busy.values():
                if self.ray.wait([worker.ready], timeout=0)[0]:
                    worker.actor.stop.options(concurrency_group="control").remote()
                else:  # it has nothing to save
                    self.ray.kill(worker.actor)

    def close(self) -> None:
        self._ray.close()


class _Session:
    """Ray while it runs for this process."""

    def __init__(self, address: str | None, count: int | None):
        if address is not None:
            _check_reachable(address)
        with _environment(alone=address is None):
            import ray

            if ray.is_initialized():
                raise UsageError("Ray runs in this process already: call ray.shutdown() first, or take ray=False.")
            common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            common["namespace"] = f"zoo-{secrets.token_hex(4)}"
            old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._folder: str | None = None
            self._undertaker: subprocess.Popen[bytes] | None = None
            try:
                if address is None:
                    self._folder = _short_folder()
                    self._watch()
                    os.environ[_MARK] = self._folder
                    ray.init(
                        "local",
                        num_cpus=count,
                        include_dashboard=False,
                        object_store_memory=2**27,
                        _node_ip_address="127.0.0.1",
                        _temp_dir=self._folder,
                        **common,
                    )
                else:
                    variables = {k: v for k, v in os.environ.items() if k.startswith(_INHERITED)}
                    ray.init(address, runtime_env={"env_vars": variables}, **common)
            except (ConnectionError, ValueError, OSError, RuntimeError) as error:
                self.close()
                what = "Ray does not start here" if address is None else f"There is no Ray cluster at {quoted(address)}"
                hint = "; --no-ray trains one trial after another" if address is None else ""
                raise UsageError(f"{what} ({' '.join(str(error).split())[:200]}){hint}.") from None
            finally:
                for number, handler in old.items():  # Ray installs one of its own
                    with contextlib.suppress(ValueError, TypeError):
                        signal.signal(number, handler)

    def _watch(self) -> None:
        """Start the process that clears up, should this one be killed."""
        if sys.platform.startswith("linux"):
            command = [sys.executable, "-I", "-S", "-c", _UNDERTAKER, _MARK, str(self._folder), str(_PATIENCE)]
            self._undertaker = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        import ray

        ray.shutdown()
        if self._undertaker is not None:
            assert self._undertaker.stdin is not None
            self._undertaker.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._undertaker.wait(timeout=20)
            self._undertaker = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _check_reachable(address: str) -> None:
    """Find out at once what Ray would try for minutes.

    Raises:
        UsageError: nobody listens at an address.
    """
    if address == "auto":  # Ray knows of a cluster on this machine, or of none
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 2**16:
        raise UsageError(f"--address {quoted(address)} is not allowed: it should be HOST:PORT, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise UsageError(f"There is no Ray cluster at {quoted(address)}: {error.strerror or error}.") from None


def _short_folder() -> str:
    """A temporary folder in which Ray can name its sockets."""
    place = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="zoo-ray-", dir=place if len(place) <= _LONGEST or os.name == "nt" else "/tmp")


@contextlib.contextmanager
def _environment(*, alone: bool) -> Iterator[None]:
    """The environment that Ray and its workers start with; this process has its own back afterwards.

    Args:
        alone: whether Ray listens on this machine only.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    new = {**_ENVIRONMENT, **threads, "PYTHONPATH": os.pathsep.join([*paths, root])}
    if alone:
        new["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for 127.0.0.1, whatever the system
    before = {key: os.environ.get(key) for key in (*new, _MARK)}
    os.environ.update(new)
    from ray._private import ray_constants  # which reads the variable once, when it is imported

    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = clusters and not alone
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _why(error: Exception) -> str:
    """The last line of Ray's text where it is that of an exception, else the beginning."""
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if lines and re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", lines[-1]):
        lines = lines[-1:]
    return f" ({' '.join(lines)[:300]})" if lines else ""


__all__ = ["RayWorkers", "Worker"]
