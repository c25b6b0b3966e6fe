"""The command line: parse, call one function, print, exit. One file each command.

Here is the one place that turns an error into a line on stderr and an exit code. Every exporter
has a command of its own name as well, made from its file.
"""

import json
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from lora_export import __version__, registry
from lora_export.errors import LoraExportError


class Commands(click.Group):
    """The commands of this folder and the exporters, found by file name and loaded when used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        return sorted({*registry.names(__name__), *registry.names(registry.EXPORTERS)})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the command `name`, or None where there is none."""
        if name in registry.names(__name__):
            command: click.Command = registry.load(__name__, name).command
            return command
        if name in registry.names(registry.EXPORTERS):
            from lora_export.cli.export import command_for

            return command_for(name)
        return None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-export")
def cli() -> None:
    """Take a LoRA adapter to a deployable artifact, with proof.

    \b
    lora-export run --adapter sst2.safetensors        all of it, with a certificate
    lora-export merge --adapter sst2.safetensors      into ./merged
    lora-export onnx --out model.onnx                 from ./merged

    Exit codes: 0 every verdict passes, 1 bug, 2 usage or input, 3 adapter and base do not fit,
    4 export failed, 5 files written but a verdict is not a pass.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # A polite kill cleans up like Ctrl-C does: staging folders are removed on the way out.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run(words))


class _Terminated(BaseException):
    """SIGTERM, as an exception that cleans up on its way."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _run(words: list[str]) -> int:
    try:
        code = cli.main(words, prog_name="lora-export", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        return _fail(words, error.format_message(), "UsageError", error.exit_code)
    except LoraExportError as error:
        return _fail(words, str(error), type(error).__name__, error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return _fail(words, "interrupted; the output is as it was", "Interrupted", 130)
    except _Terminated:
        return _fail(words, "terminated; the output is as it was", "Terminated", 143)
    except BrokenPipeError:
        return 1
    except Exception as error:  # the last resort: a bug still gets an exit code and its object
        traceback.print_exc()
        return _fail(words, f"{type(error).__name__}: {error}", "Bug", 1)


def _fail(words: Sequence[str], message: str, kind: str, code: int) -> int:
    click.echo(f"Error: {message}", err=True)
    if "--json" in words:
        fault: dict[str, Any] = {"type": kind, "message": message, "exit_code": code}
        click.echo(json.dumps({"schema": 1, "ok": False, "error": fault}))
    return code
