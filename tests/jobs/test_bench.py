"""The benchmark runs as it is typed, and its last line is for a script."""

import json
import subprocess
import sys


def test_plans_of_small_models_are_measured() -> None:
    command = [sys.executable, "-m", "jobs.bench", "plan", "--layers", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    header, *_, last = done.stdout.splitlines()
    assert header.split() == ["model", "inputs", "outputs", "wall", "s", "CPU", "s", "extra", "MB"]
    llama, deepseek = json.loads(last)["plan"]
    assert (llama["model"], llama["num_inputs"], llama["num_outputs"]) == ("llama-3-405b", 39, 39)
    assert deepseek["num_outputs"] - deepseek["num_inputs"] == 3 * 255
    assert all(one["cpu_s"] > 0 and one["wall_s"] > 0 for one in (llama, deepseek))
