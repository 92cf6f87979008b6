"""The command `kdbench`. One file a command; nothing here imports torch before a recipe is known to be sound."""

import codecs
import contextlib
import errno
import importlib
import inspect
import io
import os
import re
import signal
import sys
import unicodedata
from typing import Any, TextIO

import typer

from kdbench.cli import analyse, logits
from kdbench.cli.options import one_a_line
from kdbench.errors import CellError, UserError, raised_by_own_code
from kdbench.files import CHECK_PATH, disk_full, expanded, name_user, refused
from kdbench.recipe.choices import Recipe
from kdbench.version import __version__

START = """
kdbench run quickstart --no-adopt
kdbench ls
kdbench show methods ab
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Run, compare and publish knowledge-distillation experiments.",
    epilog=one_a_line(START, "Start with:")
    + "\n\nEnvironment:  KDBENCH_HOME (cache), KDBENCH_DATA and KDBENCH_WEIGHTS (folders), KDBENCH_CIFAR_MIRROR",
)

# In the order of the help.
COMMANDS = "run check data table plot analyse publish verify export reproduce ls show cp schema bench"
for name in COMMANDS.split():
    module = importlib.import_module(f"kdbench.cli.{name}")
    app.command(name, epilog=one_a_line(module.EXAMPLES))(module.command)
for name in ("boundary", "judge"):
    anything = {"ignore_unknown_options": True, "allow_extra_args": True}
    app.command(name, hidden=True, context_settings=anything)(analyse.moved)


app.add_typer(logits.app, name="logits")
for command in (*app.registered_commands, *logits.app.registered_commands):
    # Typer keeps the lines of a docstring, whatever the terminal's width.
    paragraphs = inspect.cleandoc(getattr(command.callback, "__doc__", None) or "").split("\n\n")
    command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


@app.callback(invoke_without_command=True)
def version(show_version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if show_version:
        print(f"kdbench {__version__}")
        raise typer.Exit


def with_address(words: list[str]) -> list[str]:
    """The words of a command in which `--ray` alone means the cluster that this machine belongs to."""
    found = []
    for word, after in zip(words, [*words, "-"][1:], strict=True):
        alone = word == "--ray" and (after.startswith("-") or "=" in after)
        found += [word, "auto"] if alone else [word]
    return found


def check_overrides(words: list[str]) -> None:
    """Raises UserError for a recipe's key that is written as an option: '--epochs 3' for 'epochs=3'."""
    if words[:1] not in (["run"], ["check"]) or not any(word.startswith("--") for word in words):
        return
    for word, after in zip(words, [*words[1:], "…"], strict=True):
        name, equals, value = word.removeprefix("--").partition("=")
        # The folder of the data sets is an option too.
        if word.startswith("--") and name in Recipe.model_fields.keys() - {"data"}:
            hint = f"write '{name}={value if equals else after}', without dashes: it overrides the recipe"
            raise UserError(f"'--{name}' is no option", "command line", hint)


def main() -> None:
    """Entry point. Exit codes: 0 well, 1 a run failed, 2 the user can fix it, 130 interrupted."""
    keep_streams()
    _fit_encodings()
    name_user()
    if sys.platform not in ("linux", "darwin"):
        print("note: kdbench is made for Linux and macOS; on Windows it is tried in WSL only", file=sys.stderr)
    # A shell without job control starts its background jobs with interrupts ignored. They are answered all the same:
    # an interrupt loses nothing here, every cell is checkpointed first, and no other way of stopping a run is as clean.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A scheduler's end (SIGTERM) and a closed terminal (SIGHUP) are answered as an interrupt is. What 'nohup' has
    # ignored stays so.
    for name in _OTHER_ENDS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        if odd := next((word for word in sys.argv[1:] if re.search("[\ud800-\udfff]", word)), None):
            raise UserError(f"not in UTF-8: {os.fsencode(odd)!r}", "command line", "rename the file, or set the locale")
        # A shell opens ~ at the beginning of a word only, and of no word in quotes.
        words = [re.sub(r"(?s)^(--[\w-]+=|)(~.*)", _with_home, word) for word in sys.argv[1:]]
        check_overrides(words)
        # An interrupt comes back as a number.
        end = app(with_address(words), standalone_mode=False)
        sys.exit(end if type(end) is int else 0)
    except SystemExit as end:
        # Said here for every command. The terminal may be gone.
        if end.code == 130:
            # Python's own end would leave them to the system, which kills.
            for name in ("SIGINT", *_OTHER_ENDS):
                signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)
            kept = "what is finished is kept, and checkpoints of what was training"
            _end(130, f"interrupted: {kept}; repeat the command to continue")
        if found := raised_by_own_code(end):
            _end(2, f"error: {found}")
        raise
    except UserError as error:
        _end(2, f"error: {error}")
    except CellError as error:
        _end(1, f"failed: {error}")
    except OSError as error:
        what = str(error)
        if error.errno == errno.ENOENT and error.filename is None:
            what = "the folder in which this was started is no longer there"
        _end(2, f"error: {refused(error) or UserError(what, hint=CHECK_PATH)}")
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # The help was printed.
            sys.exit(2)
        if found := _usage(error) or disk_full(error) or raised_by_own_code(error):
            _end(2, f"error: {found}")
        raise


def _usage(error: Exception) -> UserError | None:
    """What is said of words that are no command, option or value of one; None for other errors."""
    if not isinstance(error, _USAGE):
        return None
    # Typer's own class, or click's in older ones.
    of: Any = error
    what = re.sub(r"(^|: )[A-Z]", lambda begin: begin[0].lower(), of.format_message().rstrip("."))
    command = of.ctx.command_path if of.ctx else "kdbench"
    return UserError(what, "command line", f"see '{command} --help'")


_USAGE: type = typer.BadParameter.__mro__[1]


def _with_home(word: re.Match[str]) -> str:
    return word[1] + str(expanded(word[2], "command line"))


# What ends a program beside Ctrl-C, where the system has it.
_OTHER_ENDS = ("SIGTERM", "SIGHUP", "SIGBREAK")


def _end(code: int, message: str) -> None:
    with contextlib.suppress(OSError):  # Full as well: the code says it.
        print(message, file=sys.stderr, flush=True)
    sys.exit(code)


class _Heard(io.FileIO):
    """An output whose reader may leave, as `| head -1` does, and for messages one whose disk may be full: the rest is
    lost, and the work goes on."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # What is still buffered goes there too, at the latest when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                raise
            return len(data)


def keep_streams() -> None:
    """Standard streams that were closed by whoever started this ('>&-') lead nowhere, for worker processes too, which
    would else take a file of theirs for one. Both outputs may lose their reader at any time."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    sys.stdout, sys.stderr = _heard(sys.stdout, sys.__stdout__, 1), _heard(sys.stderr, sys.__stderr__, 2)


def _heard(stream: TextIO, own: TextIO | None, number: int) -> TextIO:
    """The stream of this number, whose reader may leave; another, as a notebook has it, as it is."""
    if stream is not own or not isinstance(stream, io.TextIOWrapper):
        return stream
    output = io.BufferedWriter(_Heard(number, "w", closefd=False))
    buffered = number == 1 and not (stream.line_buffering or stream.write_through)
    return io.TextIOWrapper(output, stream.encoding, stream.errors, line_buffering=not buffered)


# What stands for characters that an output's encoding lacks.
_LACKING = "–—−→…±×·²≥≤━╺╸─’“”"
_PLAIN = ("-", "-", "-", "->", "...", "+/-", "x", "-", "^2", ">=", "<=", "=", "=", "=", "-", "'", '"', '"')
_ASCII = str.maketrans(dict(zip(_LACKING, _PLAIN, strict=True)))


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_ASCII)
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return plain or "?" * (error.end - error.start), error.end


def _fit_encodings() -> None:
    """Print what an output's encoding lacks in ASCII, rather than fail."""
    codecs.register_error("kdbench", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="kdbench")
