"""The command `export`, and the command that each exporter has under its own name."""

from pathlib import Path
from typing import Any

import click

from lora_export import environment, registry
from lora_export.cli import _shared

_EPILOG = "The written file is compared with the merged model in float64, on sentences and shapes."


def _export(ctx: click.Context, name: str, options: dict[str, Any]) -> None:
    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    with _shared.progress(quiet=quiet) as say:
        say("loading torch and transformers")
        from lora_export import pipeline

        options["out"] = options["out"] or Path(
            f"model{registry.load(registry.EXPORTERS, name).SUFFIX}"
        )
        options["policy"] = _shared.policy(options)
        certificate = pipeline.export_file(name, **options, command=_shared.invoked(), say=say)
    ctx.exit(_shared.finish(certificate, as_json=as_json, written=options["out"]))


_optimize = click.option(
    "--optimize/--no-optimize",
    default=True,
    show_default=True,
    help="Rewrite the graph into what its runtime runs fastest, at equal precision (onnx, "
    "openvino). Without, it is as torch exported it.",
)
_external_data = click.option(
    "--external-data",
    is_flag=True,
    help="Weights in a file of their own, OUT.data (onnx; always so above 1.5 GB).",
)
_text = click.option(
    "--text",
    is_flag=True,
    help="Put the tokenizer into the graph: texts go in; of a classifier, labels come out (onnx; "
    "needs the extra `text`).",
)
_precision = click.option(
    "--precision",
    type=click.Choice(registry.PRECISIONS),
    default=registry.FULL,
    show_default=True,
    help="Of the weights. Less than fp32 is judged by decisions and, with labels, by accuracy.",
)
_static = click.option(
    "--static",
    is_flag=True,
    help="int8: activations by ranges found on --calibration, not anew in every call by what else "
    "is in the batch (onnx; of openvino it is always so).",
)
_calibration = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Sentences to find ranges and sensitive layers on, for int8 and int4; of the form of "
    "--data. Default: a small set that comes with the package.",
)
_target = click.option(
    "--target",
    type=click.Choice(list(environment.TARGETS)),
    default="native",
    show_default=True,
    help="Processors that the file is for; matters for int8 (onnx, openvino) and to aoti.",
)


def _with_options(function: Any) -> Any:
    out = click.option(
        "--out", type=click.Path(path_type=Path), help="File to write. Default: model.SUFFIX."
    )
    for option in (
        _shared.quiet_option,
        _shared.json_option,
        _shared.overwrite_option,
        _shared.seed_option,
        _shared.cache_option,
        _shared.limit_options,
        _text,
        _external_data,
        _optimize,
        _target,
        _calibration,
        _static,
        _precision,
        _shared.data_option,
        out,
        _shared.model_option,
    ):
        function = option(function)
    return function


@click.command("export", short_help="Export a merged model to any format.", epilog=_EPILOG)
@click.option(
    "--format",
    "name",
    required=True,
    type=click.Choice(registry.names(registry.EXPORTERS)),
    help="Artifact format.",
)
@_with_options
@click.pass_context
def command(ctx: click.Context, /, name: str, **options: Any) -> None:
    """Export a merged model to the given format.

    \b
    lora-export export --format onnx --out model.onnx
    """
    _export(ctx, name, options)


def command_for(name: str) -> click.Command:
    """Return the command that exports to the format `name`."""

    @click.command(name, short_help=f"Export a merged model to {name}.", epilog=_EPILOG)
    @_with_options
    @click.pass_context
    def exporting(ctx: click.Context, /, **options: Any) -> None:
        _export(ctx, name, options)

    exporting.help = f"Export a merged model to {name}.\n\n\b\nlora-export {name} --model merged"
    return exporting
