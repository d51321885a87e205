"""Tool-integrated reasoning in ToRA's format (arXiv 2309.17452): a model writes programs and reads their output.

<|user|>
QUESTION
<|assistant|>
```python
PROGRAM
```
```output
ITS OUTPUT
```
and so on, to an answer in \\boxed{}
"""

import dataclasses
from collections.abc import Callable, Sequence

from slm_jax.evaluate.generation import Continuation, Sampling
from slm_jax.evaluate.math.chain_of_thought import Attempt
from slm_jax.evaluate.math.prompts import Prompt
from slm_jax.evaluate.math.sandbox import Ran

STOP = ("</s>", "\n\n---", "```output")
RESULT_CHARACTERS = 1000  # of a program's output, shown to the model

Complete = Callable[[Sequence[str], Sampling], list[Continuation]]
RunAll = Callable[[Sequence[str]], list[Ran]]


def tool_prompt(question: str) -> Prompt:
    return Prompt(f"<|user|>\n{question}\n<|assistant|>\n", 0)


def program(text: str) -> str | None:
    """The program in the last ```python block of a text; None unless the text ends with that block."""
    _, opening, after = text.rpartition("```python\n")
    code, closing, rest = after.partition("```")
    return code if opening and closing and not rest.strip() else None


def attempts_with_tools(
    complete: Complete,
    sampling: Sampling,
    prompts: Sequence[str],
    run_all: RunAll,
    rounds: int,
    has_room: Callable[[str], bool],
) -> list[Attempt]:
    """Lets a model solve problems with programs; returns one attempt per prompt.

    Args:
        complete: continues texts.
        sampling: how; its `stop` is replaced by ToRA's.
        prompts: made by `tool_prompt`.
        run_all: runs programs independently: none sees what another one defined.
        rounds: maximum number of programs per answer; after the output of the last the model writes its answer.
        has_room: whether the model can read a text and then write the tokens that `sampling` allows.
    """
    written = [""] * len(prompts)
    ended = ["context"] * len(prompts)
    programs: list[tuple[str, ...]] = [()] * len(prompts)
    active = [place for place in range(len(prompts)) if has_room(prompts[place])]
    for number in range(rounds + 1):
        if not active:
            break
        how = dataclasses.replace(sampling, stop=STOP, seed=(sampling.seed + number) % 2**32)

        # ---- All that are still active write on, up to the end of a program or of their answer
        found = complete([prompts[place] + written[place] for place in active], how)
        to_run: list[tuple[int, str]] = []
        for place, continuation in zip(active, found, strict=True):
            written[place] += continuation.text
            ended[place] = continuation.ended
            code = program(continuation.text) if continuation.ended == "stop" and number < rounds else None
            if code is not None:
                to_run.append((place, code))

        # ---- Their programs run; the model reads the output and writes on, if it has room
        ran = run_all([code for _, code in to_run]) if to_run else []
        active = []
        for (place, _), result in zip(to_run, ran, strict=True):
            written[place] = written[place].rstrip("\n") + f"\n```output\n{result.shown(RESULT_CHARACTERS)}\n```\n"
            programs[place] += (result.ended,)
            if has_room(prompts[place] + written[place]):
                active.append(place)
            else:
                ended[place] = "context"
    return [Attempt(*parts) for parts in zip(written, ended, programs, strict=True)]
