"""The `imagen-jax` command: finds the verb and turns user errors into one line."""

import argparse
import contextlib
import gc
import importlib
import keyword
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any

import imagen_jax
from imagen_jax.errors import UserError

VERBS = {
    "quickstart": "the whole way on embedded data: train a small cascade and draw pictures with it",
    "precompute": "encode captions and write training records",
    "train": "train one stage",
    "export": "turn trained stages into a model folder",
    "import": "turn published weights of others into a model folder",
    "sample": "make pictures of prompts",
    "edit": "make pictures of a picture and a prompt",
    "plan": "what a stage needs on a TPU slice that is not here: memory and predicted time",
    "serve": "a page in the browser that makes pictures",
}


def _module(verb: str) -> ModuleType:
    """The verb's module; "import" is a word of Python's and has an underscore behind it."""
    return importlib.import_module(f"imagen_jax.cli.{verb}{'_' * keyword.iskeyword(verb)}")


def make_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser with all verbs; only the chosen one's module is imported and its flags are added."""
    parser = argparse.ArgumentParser(prog="imagen-jax", description="Text-to-image diffusion in JAX.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"imagen_jax {imagen_jax.__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    for name, summary in VERBS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
        if name == verb:
            _module(name).add_arguments(command)
    return parser


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """The parser of one verb's arguments, as `make_parser` has it."""
    actions = make_parser(verb)._actions
    commands = next(action for action in actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices[verb]


def _import_jax() -> None:
    """Imports JAX without collecting garbage: it makes many objects and none, and looking takes a tenth of the time."""
    if "jax" in sys.modules or not gc.isenabled():
        return
    # Of a GPU's memory JAX takes 75 % unless told otherwise, too little for models that barely fit.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    gc.disable()
    try:
        importlib.import_module("jax")
    finally:
        gc.freeze()  # nor is it looked for among them later
        gc.enable()


def _check_text(argv: Sequence[str]) -> None:
    """Refuses arguments that are no text: they would go into records and names that nobody could read."""
    for argument in argv:
        flag, separator, value = argument.partition("=")
        is_flag = flag.startswith("--") and separator and not flag.startswith("--config.")
        if is_flag and value == "--":  # which argparse takes for an empty list
            raise UserError(f"{flag}: '--' is no value")
        if (
            is_flag and not value.strip() and flag != "--negative_prompt"
        ):  # a shell's variable that is not set
            raise UserError(f"{flag} is empty: give it a value, or leave it out")
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            shown = argument.encode("utf-8", "backslashreplace").decode()
            flag, separator, value = shown.partition("=")
            if not shown.startswith("--") or not separator:
                flag, value = "the argument", shown
            raise UserError(f"{flag} '{value:.80}' is not UTF-8 text") from None


def _line(error: BaseException) -> str:
    """An error as one line, whatever was in the file that it quotes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(error))


def _said_of(error: Exception) -> str | None:
    """The line that an error of the user's, or of the machine's, is printed as; None: it is the program's own."""
    from imagen_jax.files import cloud_fault  # only here: --help does not wait for what it imports

    if (fault := cloud_fault(error)) is not None:
        return fault
    if isinstance(error, (UserError, OSError)):
        return _line(error)
    if (said := _said_by_jax_of_settings(error)) is not None:
        return said
    # JAX says of a device in a RuntimeError that it is full.
    full = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if full or isinstance(error, MemoryError):
        return (
            f"{'the device' if full else 'this machine'} has too little memory for this; ask for less at a time "
            "(a smaller batch, smaller pictures), or see what it is with --debug"
        )
    return None


def _said_by_jax_of_settings(error: Exception) -> str | None:
    """What is wrong with the environment variables by which JAX chooses devices and options; None: it is not that."""
    # By the last part of their names: importing JAX to compare with its modules may be what has failed.
    names = [frame.f_globals.get("__name__") or "" for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = {name.rpartition(".")[2] for name in names if name.partition(".")[0] == "jax"}
    if "xla_bridge" in modules and (platforms := os.environ.get("JAX_PLATFORMS")):
        said = _line(error) or "it is not installed"
        return f"JAX_PLATFORMS={platforms}: JAX does not find such devices here ({said})"
    if "config" in modules and isinstance(error, ValueError):
        return f"JAX refuses an environment variable: {_line(error)}"
    return None


def _open_standard_streams() -> None:
    """Gives a command that was started without stdin, stdout or stderr ones that are empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process


def _interrupted() -> int:
    print("\nimagen-jax: interrupted; the same command goes on where it can", file=sys.stderr)
    return 130


class _Interrupts:
    """Whether Ctrl-C was pressed, also where Python or a library loses the exception that it raises.

    Attributes:
      pressed: it was.
      deferred: it raises nothing now; whoever sets this looks at `pressed` afterwards.
    """

    pressed = deferred = False

    def __init__(self) -> None:
        self._hook: Callable[[Any], Any] = sys.unraisablehook

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if not self.deferred:
            raise KeyboardInterrupt

    def lost(self, unraisable: Any) -> None:
        """Raises again what was raised in a callback that can raise nothing (the collector's, of JAX)."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            self._hook(unraisable)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """In this block Ctrl-C ends the command, whatever it is at. Nothing changes outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, self._hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        # It may be ignored, as in a job in the background, or somebody else's.
        if before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self)
        sys.unraisablehook = self.lost
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            sys.unraisablehook = self._hook

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """Keeps Ctrl-C for the end of the block: libraries of other languages die of it while they are loaded."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.pressed:
            raise KeyboardInterrupt


def command() -> None:
    """The command as the shell starts it."""
    code = main()
    if code == 130:
        # Programs may still be running in threads that nothing ends: Python's own end would pull them to pieces.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 0 only on success."""
    _open_standard_streams()
    interrupts = _Interrupts()
    with interrupts.heeded():
        return _run(list(sys.argv[1:] if argv is None else argv), interrupts)


def _run(argv: list[str], interrupts: _Interrupts) -> int:
    verb = next((argument for argument in argv if argument in VERBS), None)
    try:
        _check_text(argv)
    except UserError as error:  # before the parser could quote it
        print(f"imagen-jax{f' {verb}' if verb else ''}: error: {_line(error)}", file=sys.stderr)
        return 1
    # Names and captions hold characters that a terminal's encoding may lack: no reason to fail after the work.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not argv:
        make_parser(None).print_help(sys.stderr)
        return 2
    args: Any = argparse.Namespace(verb=verb, debug="--debug" in argv)
    try:
        args, rest = make_parser(verb).parse_known_args(argv)
        with interrupts.later():
            if args.verb != "plan":  # which chooses JAX's devices itself
                _import_jax()
            module: Any = _module(args.verb)
        if hasattr(module, "run_with_overrides"):
            return module.run_with_overrides(args, rest)
        if rest:
            raise UserError(f"unknown argument {rest[0]!r}; see imagen-jax {args.verb} --help")
        return module.run(args)
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if interrupts.pressed:  # what a library made of it
            return _interrupted()
        said = _said_of(error)
        if args.debug or said is None:
            raise
        print(f"imagen-jax {args.verb}: error: {said}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    command()
