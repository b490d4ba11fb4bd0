"""Rewards of programs by the tests that they pass (MA-RLHF, APPS)."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lit_models.ppo.rewards import Reward
from lit_models.ppo.rollout import Rollout
from lit_models.sandbox import Execution, Executor, SubprocessExecutor

COMPILE_ERROR, RUNTIME_ERROR = -1.0, -0.6
BASE, SPAN = -0.3, 1.3
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program_of(response: str) -> str:
    """The program in a response: its first fenced block of code, or all of it."""
    match = FENCE.search(response)
    return match.group(1) if match else response


def program_reward(executions: list[Execution], expected: list[str]) -> float:
    """Reward of one program (MA-RLHF, appendix B.5).

    Args:
        executions: of the tests.
        expected: wanted output of each test.

    Returns:
        -1 for text that is no program, -0.6 if a test ends with an error or takes too long, otherwise from -0.3 for no
        passed test to 1 for all of them.
    """
    states = {execution.status for execution in executions}
    if "compile_error" in states:
        return COMPILE_ERROR
    if not states <= {"ok"}:
        return RUNTIME_ERROR
    passed = sum(same_output(execution.output, wanted) for execution, wanted in zip(executions, expected, strict=True))
    return BASE + SPAN * passed / max(1, len(expected))


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs have the same lines, spaces at their ends and empty lines at the end left out."""
    return [line.rstrip() for line in output.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]


@dataclass
class ProgramReward(Reward):
    """Runs each response as a program on the tests that came with its prompt.

    The prompt data must pass on a column (`data.keep_columns`) that holds, as in `codeparrot/apps`, a JSON object or a
    record with `inputs` and `outputs`, lists of texts. With `fn_name` the program defines that function, which is
    called with each list of inputs, and its result is compared.

    Args:
        column: name of the column.
        executor: runs the programs.
        max_tests: tests of a prompt that are run.
        weight: factor in the sum of rewards.
    """

    column: str = "input_output"
    executor: Executor = field(default_factory=SubprocessExecutor)
    max_tests: int = 16
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: naming the option.
        """
        if self.max_tests < 1:
            raise ValueError(f"rewards.max_tests of ProgramReward must be at least 1, got {self.max_tests}")

    def score(self, rollout: Rollout, network: nn.Module | None) -> Tensor:
        """Run all programs; (B,) float32.

        Raises:
            ValueError: if the column is missing or holds no tests.
        """
        if self.column not in rollout.columns:
            raise ValueError(
                f"rewards.column: ProgramReward needs the column {self.column!r} of the prompts; add it to "
                "data.keep_columns"
            )
        jobs, wanted = [], []
        for row, (response, value) in enumerate(zip(rollout.responses, rollout.columns[self.column], strict=True)):
            program, inputs, outputs = self._tests(program_of(response), value, row)
            jobs.append((program, inputs))
            wanted.append(outputs)
        executions = self.executor.run_all(jobs)
        rewards = [program_reward(runs, outputs) for runs, outputs in zip(executions, wanted, strict=True)]
        return torch.tensor(rewards, dtype=torch.float32, device=rollout.response_mask.device)

    def _tests(self, program: str, value: Any, row: int) -> tuple[str, list[str], list[str]]:  # noqa: ANN401
        """Program, inputs and wanted outputs of a row."""
        try:
            tests = json.loads(value) if isinstance(value, str) else value
            inputs, outputs = list(tests["inputs"]), list(tests["outputs"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"rewards.column: {self.column!r} of row {row} holds no tests with `inputs` and `outputs` "
                f"({type(error).__name__}: {error})"
            ) from error
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(
                f"rewards.column: {self.column!r} of row {row} holds {len(inputs)} inputs and {len(outputs)} outputs"
            )
        inputs, outputs = inputs[: self.max_tests], outputs[: self.max_tests]
        name = tests.get("fn_name")
        if name is None:
            return program, [as_text(text) for text in inputs], [as_text(text) for text in outputs]
        return (
            f"{program}\n{CALL.format(name=name)}",
            [json.dumps(text) for text in inputs],
            [json.dumps(text[0] if isinstance(text, list) and len(text) == 1 else text) for text in outputs],
        )


CALL = """
import json as _json, sys as _sys
_function = getattr(Solution(), {name!r}) if "Solution" in globals() else {name}
print(_json.dumps(_function(*_json.loads(_sys.stdin.read()))))
"""


def as_text(value: Any) -> str:  # noqa: ANN401
    """Lines of a test given as a list, or its text."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
