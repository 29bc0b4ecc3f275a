"""What `rlhf-train --help` says."""

from __future__ import annotations

from collections.abc import Mapping

COMMON = """\
every stage also takes:
  --config FILE.yaml   read options from a recipe; flags on the command line win
  --threads N          CPU threads (default: OMP_NUM_THREADS, else 1 for the
                       demo and tiny models)
  --overwrite          replace an earlier run in the same folder
  --allow-code MODULE  rewards and judges that stand in FILE.yaml, not on the
                       command line, may be functions of this Python module
  --traceback          show where an error came from"""


def whole(prog: str, stages: Mapping[str, str], tools: Mapping[str, str]) -> str:
    """Of the program: every subcommand with what it is about."""
    first = "\n".join(f"  {name:<8} {about}" for name, about in stages.items())
    others = "\n".join(f"  {name:<8} {about}" for name, about in tools.items())
    return f"""usage: {prog} STAGE [options]
       {prog} STAGE --help lists the options of a stage

stages:
{first}
  pipeline several of these from one recipe: {prog} pipeline RECIPE
  resume   go on with a run that was stopped: {prog} resume RUN
  report   write report.html again from a run folder
{others}

{COMMON}

start here:
  {prog} demo
  {prog} pipeline gsm8k --set data=FOLDER
  {prog} sft --model MODEL --data demonstrations.jsonl --out runs/sft"""
