"""All commands as one: `vise-fast train …`, the same as `python -m vise_fast.train …`.

    vise-fast COMMAND [options]

Left out: what a command takes and says of itself (config/commands.py), and what it does (its own
file).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from vise_fast import __version__
from vise_fast.config import commands
from vise_fast.system import console
from vise_fast.system.errors import ConfigError

BASH = """\
_vise_fast() {
  local typed=("${COMP_WORDS[@]:1:COMP_CWORD-1}")
  COMPREPLY=($(compgen -W "$(vise-fast --words "${typed[@]}")" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _vise_fast vise-fast"""
ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
_vise_fast() {
  compadd -- ${(f)"$(vise-fast --words "${(@)words[2,CURRENT-1]}")"}
  _files
}
compdef _vise_fast vise-fast"""
FISH = "complete -c vise-fast -a '(vise-fast --words (commandline -opc | tail -n +2))'"
COMPLETION = {"bash": BASH, "zsh": ZSH, "fish": FISH}
"""By shell; each asks `vise-fast --words` what may follow."""


def main(words: Sequence[str]) -> int:
    """The command that is named first, with the words that follow it."""
    if not words or words[0] in ("-h", "--help", "help"):
        console.Console().say(commands.overview())
        return 0
    if words[0] == "--version":
        console.Console().say(f"vise_fast {__version__}")
        return 0
    if words[0] == "--completion":
        console.Console().say(_completion(words[1:]))
        return 0
    if words[0] == "--words":
        console.Console().say("\n".join(commands.words_after(words[1:])))
        return 0
    name, *rest = words
    if name not in commands.COMMANDS:
        raise ConfigError(f"'{name}' is no command; {_meant(name)}")
    code = commands.answered(name, rest)
    if code is not None:
        return code
    module = import_module(f"vise_fast.{commands.COMMANDS[name].module}")
    return module.main(rest) or 0


def _completion(shell: Sequence[str]) -> str:
    """What the shell has to run; bash where none is named. Raises ConfigError."""
    named = " ".join(shell) or "bash"
    if named not in COMPLETION:
        raise ConfigError(
            f"no completion for '{named}'; it is written for {', '.join(COMPLETION)}; write "
            "vise-fast --completion bash"
        )
    return COMPLETION[named]


def _meant(name: str) -> str:
    close = get_close_matches(name, commands.COMMANDS, n=1)
    known = f"known: {', '.join(commands.COMMANDS)}"
    return f"did you mean vise-fast {close[0]}?" if close else known


def run() -> int:
    """What the console script calls: returns the exit code."""
    return console.run(main)


if __name__ == "__main__":
    sys.exit(run())
