#!/usr/bin/env python3
"""Trains with several processes on this machine, and starts all of them again when one dies.

  python launch/local.py --processes=2 --devices=4 -- --config=shapes/base16.py --workdir=runs/base

Everything after `--` goes to `imagen-jax train`. Each process gets `--devices` of the CPU's fake devices, or finds
the accelerators that JAX_PLATFORMS and CUDA_VISIBLE_DEVICES (see --gpus) leave it. Lines are prefixed with the
process's number. SIGTERM and Ctrl-C are passed on: the processes save a checkpoint and end.

The exit code is 0 if all processes ended with 0, that of the one at fault if starting again would not help (a wrong
flag, a full disk), and 75 if the run is not finished: the launcher was told to stop, or they died, or were told to
stop, more often than `--restarts`.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

# Codes of `imagen-jax train` for something that the next attempt would meet again: an error of the user, of the
# command line, Ctrl-C.
FINAL_CODES = (1, 2, 130)
EXIT_RESTART = 75
# Seconds that the others have to notice a dead process, before they are killed.
SURVIVORS_SECONDS = 14.0


def parse_arguments() -> argparse.Namespace:
    """The launcher's flags; the rest is the training's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="processes to start")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="CPU devices of each (%(default)s)"
    )
    parser.add_argument("--gpus", action="store_true", help="give process i the GPU i alone")
    parser.add_argument(
        "--restarts",
        type=int,
        default=100,
        metavar="N",
        help="times that all are started again (%(default)s)",
    )
    parser.add_argument("--port", type=int, help="of process 0 (default: a free one at each start)")
    parser.add_argument("--dry_run", action="store_true", help="only print the commands")
    parser.add_argument("arguments", nargs="+", help="of `imagen-jax train`, after --")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 1 or args.restarts < 0:
        parser.error("--processes and --devices must be at least 1, --restarts at least 0")
    return args


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(args: argparse.Namespace, port: int, index: int) -> list[str]:
    """What process `index` runs."""
    return [
        sys.executable,
        "-m",
        "imagen_jax",
        "train",
        *args.arguments,
        f"--cpu_devices={args.devices}",
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={args.processes}",
        f"--process_id={index}",
    ]


class Job:
    """All processes of one start."""

    def __init__(self, args: argparse.Namespace, port: int):
        self._readers: list[threading.Thread] = []
        self.processes: list[subprocess.Popen[str]] = []
        for index in range(args.processes):
            environment = dict(os.environ)
            if args.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = str(index)
            process = subprocess.Popen(
                command(args, port, index),
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C comes through the launcher, once
            )
            self.processes.append(process)
            reader = threading.Thread(target=self._read, args=(index, process), daemon=True)
            reader.start()
            self._readers.append(reader)
        print(f"[launch] pids {' '.join(str(process.pid) for process in self.processes)}", flush=True)

    @staticmethod
    def _read(index: int, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.rstrip("\n")  # a killed process may leave a line without its end
            print(f"[{index}] {text}", flush=True)

    def send(self, number: int) -> None:
        """A signal to all that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> list[int]:
        """Exit codes of all; once one has failed the others have SURVIVORS_SECONDS to end."""
        deadline = None
        while None in (codes := [process.poll() for process in self.processes]):
            if deadline is None and any(codes):
                deadline = time.monotonic() + SURVIVORS_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self._readers:
            reader.join()
        return [process.returncode for process in self.processes]


def main() -> int:
    """Starts the processes until they have all come to their end."""
    args = parse_arguments()
    if args.dry_run:
        for index in range(args.processes):
            print(shlex.join(command(args, args.port or 8476, index)))
        return 0
    job: Job | None = None
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        if job is not None:
            job.send(signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for start in range(args.restarts + 1):
        job = Job(args, args.port or free_port())
        if asked:
            job.send(signal.SIGTERM)
        codes = job.wait()
        if not any(codes):
            return 0
        described = ", ".join(f"process {i} ended with {code}" for i, code in enumerate(codes) if code)
        print(f"[launch] {described}", file=sys.stderr, flush=True)
        final = [code for code in codes if code in FINAL_CODES]
        if final:
            return final[0]
        if asked:
            break
        if start < args.restarts:
            print(f"[launch] restart {start + 1} of at most {args.restarts}", flush=True)
    return EXIT_RESTART


if __name__ == "__main__":
    sys.exit(main())
