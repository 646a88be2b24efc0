"""Is the machine as expected, are results on the GPU right, does every path run, how fast is it?"""

from __future__ import annotations

import time

from runner import LOGS, Job, run, run_all, save, table
from settings import CORES, KIT, WORK, limit, setting

CHAINS = "pretrain finetune byol models_genesis pcrlv2 hssl float16 ddp compile"


def main() -> None:
    parts = setting("PARTS", "numerics operators smoke speed").split()
    run("environment", [KIT / "environment.py"], limit(60, 300))
    table((LOGS / "environment.log").read_text()[-3500:])
    # Numerics load the CPU too: beside the operators' timing they do no harm, beside a benchmark they would.
    jobs = [Job(name, [KIT / f"{name}.py"], limit(120, 600)) for name in ("numerics", "operators") if name in parts]
    run_all(jobs)
    for job in jobs:
        table(job.log.read_text()[-7000:])
    save()
    if "smoke" in parts:
        smoke()
        save()
    if "speed" in parts:
        run("speed", [KIT / "speed.py"], setting("BENCH_SECONDS", 85, 400) + 60)
        lines = (LOGS / "speed.log").read_text().splitlines()
        table("\n".join(line for line in lines if line.startswith("|"))[-6000:])
        save()


def smoke() -> None:
    """Every path of training once, several at a time, on phantoms."""
    made = ["-m", "pgl_ext", "phantom", WORK / "phantom", "--cases", 6, "--test_cases", 2]
    if run("phantom", made, limit(120, 600)):
        return
    waiting = setting("CHAINS", CHAINS, "pretrain finetune ddp").split()
    running: list[Job] = []
    at_once = setting("SMOKE_JOBS", max(2, CORES // 2), 2)
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            running.append(Job(f"smoke_{name}", [KIT / "smoke.py", name], limit(120, 900)))
        for job in [job for job in running if job.poll() is not None]:
            job.wait()
            running.remove(job)
        time.sleep(0.3)
