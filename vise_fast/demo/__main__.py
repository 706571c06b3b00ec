"""A page on this machine to try base and adapter on your own picture: boxes, views, ghost,
verdicts, where it looked, and how strong the adapter is.

    python -m vise_fast.demo [--adapter runs/nano/adapter] [--model PATH] [--port 7860]

Without an adapter it shows the embedded model. Needs gradio (pip install 'gradio>=5'). Answers on
loopback alone.
"""

from __future__ import annotations

from vise_fast.config import commands

if __name__ == "__main__":
    commands.begin("demo")  # before what takes seconds to import

import contextlib
import sys
from collections.abc import Sequence

from vise_fast.config import origin
from vise_fast.demo import page
from vise_fast.demo.trial import Bench
from vise_fast.engine.choose import open_engine
from vise_fast.model.load import load
from vise_fast.system.console import Console, run
from vise_fast.system.machine import threads

SYNTAX = commands.syntax("demo")
HOST = "127.0.0.1"


def main(words: Sequence[str]) -> int:
    """The command: until Ctrl-C."""
    given = SYNTAX.parse(words)
    console = Console()
    if given.help:
        console.say(commands.page("demo", words))
        return 0
    page.gradio()  # before a model is loaded for nothing
    config = origin.configuration(given)
    threads.settle(console.say)
    with console.working("loading the model"):
        policy = load(config, given["adapter"], say=console.warn)
    engine = open_engine(policy, config, console.warn)
    bench = Bench(policy, engine, config, adapter=given["adapter"] is not None)
    blocks = page.build(bench)
    blocks.queue(default_concurrency_limit=1)  # one model: a strength holds for one question
    blocks.launch(
        server_name=HOST, server_port=given.count("port"), prevent_thread_lock=True, quiet=True
    )
    console.say(f"demo     {blocks.local_url}   (Ctrl-C ends it)")
    with contextlib.suppress(KeyboardInterrupt):
        blocks.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
