"""Check whether your own network is GPT-2, find its faults, and race its training step against ours.

python -m pipeline.tools.check my_gpt.py:GPT                 the class GPT of your file
python -m pipeline.tools.check transformers:GPT2LMHeadModel  a class of an installed module

Your file's code runs in a process of its own, with a limit of time and memory, but with all your rights: check only
files that you trust. Only its imports, classes, functions and constants without calls are executed, but a module that
it imports runs whole.

The page is mine/report.html. The exit code is 0 for GPT-2 and its variants, 1 for a fault or an error, and 2 if the
command cannot tell.
"""

import argparse
import ast
import os
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jinja2

from gpt2_ladder import files, params_yaml
from gpt2_ladder.checking import behaviour, loading
from gpt2_ladder.checking.verdict import Report, check
from gpt2_ladder.config import UserError
from gpt2_ladder.params import Params
from gpt2_ladder.reporting.tables import markdown_table
from gpt2_ladder.training import devices
from pipeline import Parser, run
from pipeline.environment import describe

PAGE = Path("mine/report.html")


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the lines of the description, and show every option's default."""


def main(*arguments: str) -> None:
    params = params_yaml.load()
    args = parse(arguments, params)
    print(f"Checking {args.network}, for at most {args.seconds} s ...", flush=True)
    report = check_in_own_process(args, params.model_copy(update={"model": args.size}))
    rows = [(each.check, each.verdict, ": ".join(filter(None, (each.result, each.reason)))) for each in report.findings]
    loader = jinja2.FileSystemLoader(Path(loading.__file__).parent / "templates")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template(PAGE.name)
    files.write(PAGE, template.render(report=report, checks=behaviour.CHECKS, settings=" ".join(arguments)))
    print(report.sentence, markdown_table([("check", "", "result"), *rows], 3), sep="\n\n")
    print(f"\nThe page: {PAGE}", flush=True)
    sys.exit(report.code)


def parse(arguments: Sequence[str], params: Params) -> argparse.Namespace:
    parser = Parser(prog="python -m pipeline.tools.check", description=__doc__, formatter_class=Help)
    parser.add_argument("network", help="FILE:CLASS or MODULE:CLASS, or a function that returns the network")
    parser.add_argument("--config", nargs="+", default=[], metavar="KEY=VALUE", help="values such as dropout=0.1")
    parser.add_argument("--size", default="tiny", choices=params.models, help="build it at this size of params.yaml")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="precision of the race")
    parser.add_argument("--compile", action="store_true", help="compile both networks for the race")
    parser.add_argument("--rounds", type=int, default=12, help="rounds of the race; 0: no race")
    parser.add_argument("--seconds", type=int, default=300, help="stop after this time")
    parser.add_argument("--memory", type=int, default=8, help="stop if it needs more memory, in GiB")
    args = parser.parse_args(arguments)
    if args.rounds == 1 or args.rounds < 0:
        raise UserError(f"--rounds {args.rounds}: give 0 for no race, or 2 and more")
    args.config = dict(map(read_setting, args.config))
    return args


def read_setting(text: str) -> tuple[str, Any]:
    """Return the key and the value of KEY=VALUE; the value is a Python constant or, if it is none, a text."""
    key, _, value = text.partition("=")
    if not value:
        raise UserError(f"--config {text}: give key=value")
    with suppress(ValueError, SyntaxError):
        return key, ast.literal_eval(value)
    return key, value


def check_in_own_process(args: argparse.Namespace, params: Params) -> Report:
    """Return the report; raise UserError if the network cannot be checked, takes too long, or ends its process."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, args, params), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(args.seconds):
            raise UserError(f"{args.network}: no result after {args.seconds} s; if it does not hang, raise --seconds")
        result = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(f"{args.network}: its process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
    if isinstance(result, str):
        raise UserError(f"{args.network}: {result}")
    return result


def _work(sender: Connection, args: argparse.Namespace, params: Params) -> None:
    """Send the report, or the text of an error. What the user's code prints is dropped."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    resource.setrlimit(resource.RLIMIT_DATA, (args.memory * 2**30,) * 2)
    try:
        sender.send(check(args.network, args.config, params, describe(), args.precision, args.compile, args.rounds))
    except UserError as error:
        sender.send(str(error))
    except Exception as error:
        config = isinstance(error, AttributeError | TypeError) and "forward" not in str(error)
        fix = "; --config key=value sets what its config lacks" * config
        fix = "; raise --memory" if devices.is_out_of_memory(error) else fix
        sender.send(f"{loading.explain(error, args.network)}{fix}")


if __name__ == "__main__":
    run(main)
