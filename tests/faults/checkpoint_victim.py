"""A process that forks, and saves checkpoints in the child, which a fault may kill.

Reads one JSON line a task and answers with one: the child's wait status and what each save gave.
Forking from a process that has torch loaded already makes a kill cost milliseconds.
"""

import hashlib
import json
import os
import sys
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed

# Everything the child needs but what reads the fault from the environment.
import trainer.manifest  # noqa: F401

FILES = ("model.safetensors", "deepspeed/state/rank_0.pt", "deepspeed/state/rank_1.pt")


def content(step: int, name: str, size: int) -> bytes:
    """Bytes that differ in every file of every step."""
    return hashlib.shake_256(f"{step} {name}".encode()).digest(size)


def write_files(folder: Path, step: int, size: int) -> None:
    """Put down files of known content, passing a fault point in the middle of one."""
    from data_pipelines.fault_points import fault_point

    for name in FILES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = content(step, name, size)
        if file.suffix == ".pt":
            tensor = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
            torch.save({"step": step, "bytes": tensor}, file)
            continue
        with file.open("wb") as opened:
            opened.write(whole[: size // 2])
            opened.flush()
            fault_point("test.mid_write")
            opened.write(whole[size // 2 :])


def run_task(task: dict) -> list[str]:
    """Open the record and save each step of the task, collecting after each."""
    os.environ["CROSSLADDER_FAULT"] = task["fault"]
    from trainer.checkpoint import Draft, SaveFailure, collect, publish
    from trainer.parallel import SoloGroup
    from trainer.record import RunRecord

    said = []
    with closing(RunRecord(Path(task["run"]))) as record:
        for step in task["steps"]:
            draft = Draft(
                step=step,
                facts={"tokens": step * 4096},
                pinned=step in task["pinned"],
                write=lambda folder, step=step: write_files(folder, step, task["size"]),
            )
            outcome = publish(record.checkpoints, draft, SoloGroup(), record)
            said.append(str(outcome))
            if not isinstance(outcome, SaveFailure):
                collected = collect(record.checkpoints, 2, SoloGroup(), record)
                said += [str(collected)] if collected else []
    return said


def main() -> None:
    """Serve tasks until the input ends."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            said = run_task(json.loads(line))
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as answers:
            said = answers.read().decode()
        _, status = os.waitpid(child, 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "said": json.loads(said or "[]")}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
