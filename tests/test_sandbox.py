"""Programs under limits, and the reward for their tests."""

import json
import os
import time

import pytest
import torch

from lit_models.ppo.programs import ProgramReward, program_of, program_reward, same_output
from lit_models.sandbox import Execution, SubprocessExecutor
from tests.reference.rlhf.macro_checks import rollout_of


@pytest.fixture
def executor():
    return SubprocessExecutor(timeout=3.0)


def status(executor, program):
    return executor.run(program, [""])[0].status


def test_programs_read_and_print(executor):
    runs = executor.run("print(int(input()) * 2)", ["3", "é"])
    assert (runs[0].status, runs[0].output) == ("ok", "6\n")
    assert runs[1].status == "runtime_error"
    assert "ValueError" in runs[1].error


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("x = (", "compile_error"),
        ("\0", "compile_error"),
        ("1 / 0", "runtime_error"),
        ("import sys; sys.exit(3)", "runtime_error"),
        ("if __name__ == '__main__': pass", "ok"),
        ("bytearray(2 * 10**9)", "runtime_error"),
        ("open('big', 'wb').write(bytes(10**7))", "runtime_error"),
        ("def f(): f()\nf()", "runtime_error"),
        ("", "ok"),
    ],
)
def test_outcomes(executor, program, expected):
    assert status(executor, program) == expected


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(program):
    start = time.perf_counter()
    assert status(SubprocessExecutor(timeout=1.0), program) == "timeout"
    assert time.perf_counter() - start < 10


def test_a_flood_of_output_is_cut():
    (run,) = SubprocessExecutor(timeout=5.0, max_output=1000).run("while True: print('x' * 99)", [""])
    assert run.status in ("runtime_error", "timeout")
    assert len(run.output) <= 1000


def test_what_a_program_started_ends_with_it(executor, tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    executor.run(program, [""])
    time.sleep(3)
    assert not mark.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="the system does not count the processes of root")
def test_processes_are_limited(executor):
    assert status(executor, "import os; os.fork()") == "runtime_error"


def test_nothing_of_the_environment_is_seen(executor, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    (run,) = executor.run("import os; print('SECRET' in os.environ, os.listdir())", [""])
    assert run.output.startswith("False")
    assert "program.py" in run.output


@pytest.mark.parametrize("options", [{"timeout": 0}, {"memory_mb": -1}, {"workers": 0}, {"max_processes": -1}])
def test_limits_out_of_range(options):
    with pytest.raises(ValueError, match=rf"executor\.{next(iter(options))} must"):
        SubprocessExecutor(**options)


# -- the reward --------------------------------------------------------------------------------------------------------


def test_reward_of_the_four_outcomes():
    ok, wrong = Execution("ok", "4\n"), Execution("ok", "5\n")
    assert program_reward([Execution("compile_error")], ["4"]) == -1.0
    assert program_reward([ok, Execution("runtime_error")], ["4", "4"]) == -0.6
    assert program_reward([ok, Execution("timeout")], ["4", "4"]) == -0.6
    assert program_reward([wrong, wrong], ["4", "4"]) == pytest.approx(-0.3)
    assert program_reward([ok, wrong], ["4", "4"]) == pytest.approx(0.35)
    assert program_reward([ok, ok], ["4", "4"]) == pytest.approx(1.0)


def test_outputs_differ_in_more_than_trailing_spaces():
    assert same_output("1 \n2\n\n", "1\n2")
    assert not same_output("1\n\n2", "1\n2")
    assert not same_output(" 1", "1")


def test_programs_are_taken_out_of_their_fence():
    assert program_of("Sure:\n```python\nprint(1)\n```\ndone") == "print(1)\n"
    assert program_of("```\nx = 1") == "x = 1"
    assert program_of("print(2)") == "print(2)"


def scored(responses, tests, **options):
    held = rollout_of(torch.ones(len(responses), 2))
    held.responses = responses
    held.columns = {"input_output": tests}
    return ProgramReward(executor=SubprocessExecutor(timeout=3.0), **options).score(held, None)


def test_rollouts_are_scored_by_the_tests_of_their_prompts():
    tests = json.dumps({"inputs": ["2\n", "3\n"], "outputs": ["4", "6"]})
    function = {"fn_name": "double", "inputs": [[2], [3]], "outputs": [[4], 6]}
    found = scored(
        ["print(int(input()) * 2)", "print(4)", "print(", "1 / 0", "def double(x): return 2 * x"],
        [tests, tests, tests, tests, function],
    )
    torch.testing.assert_close(found, torch.tensor([1.0, 0.35, -1.0, -0.6, 1.0]))
    method = "class Solution:\n    def double(self, x):\n        return 2 * x"
    torch.testing.assert_close(scored([method], [function]), torch.tensor([1.0]))
    one = {"inputs": ["1", "2"], "outputs": ["1", "0"]}
    torch.testing.assert_close(scored(["print(input())"], [one], max_tests=1), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("no json", "holds no tests with `inputs` and `outputs`"),
        ({"inputs": ["1"]}, "holds no tests"),
        ({"inputs": ["1"], "outputs": []}, "holds 1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "holds 0 inputs and 0 outputs"),
    ],
)
def test_prompts_without_tests_are_named(tests, words):
    with pytest.raises(ValueError, match=r"rewards\.column: 'input_output' of row 0 " + words):
        scored(["x"], [tests])


def test_a_missing_column_says_how_to_pass_it_on():
    held = rollout_of(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"rewards\.column: .* add it to data\.keep_columns"):
        ProgramReward().score(held, None)
