"""Two processes on the CPU, as `accelerate launch` starts them."""

import os
import signal
import socket
import subprocess
import sys


def launch_two(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, in two processes to its end, whatever it is; on a timeout they are killed."""
    # --multi_gpu starts several processes without MPI, --cpu would start one; what they run on the environment says.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launcher += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    process = subprocess.Popen(
        [*launcher, f"--main_process_port={free_port()}", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, printed, errors)


def free_port() -> int:
    """A port that nobody listens at; older launchers do not look for one themselves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
