"""The command line: a table of commands, each a plain function whose signature and docstring are its options."""

import difflib
import errno
import importlib
import inspect
import logging
import os
import re
import sys
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from glmix.errors import UserError

COMMANDS = {
    "train": "train a classifier on your images",
    "eval": "accuracy of a model on labelled images",
    "predict": "what a model sees in images",
    "explain": "pictures of the slots",
    "label-tokens": "dense labels of training images, by a teacher",
    "models": "the variants, their size and published accuracy",
    "convert": "a released .pth file to safetensors",
    "scenes": "write generated scenes with labels, boxes and masks",
}
MENDABLE = {  # errors of the file system that a person can do something about
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
POSITIONAL = {"images": "+", "source": None, "target": None}


class Parser(ArgumentParser):
    """Reports a mistake as one line, with the nearest option where one is misspelt."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"\s+", " ", str(message)).strip()
        unknown = re.search(r"(?:[Uu]nrecognized arguments|[Kk]ey|[Oo]ption):? '?-*([\w-]+)", text)
        names = [a.dest for a in self._actions]
        given = unknown[1].replace("-", "_") if unknown else ""
        near = [n for n in difflib.get_close_matches(given, names, 1) if n != given]
        hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else f"; see {self.prog} --help"
        raise UserError(text.removesuffix(".")[:300] + hint)


def options_of(function: Any) -> tuple[dict[str, Any], type | None]:
    """Option names with their types, and the dataclass if the function takes one."""
    parameters = inspect.signature(function).parameters
    only = next(iter(parameters.values())).annotation if len(parameters) == 1 else None
    if only is not None and is_dataclass(only):
        return {f.name: f.type for f in fields(only)}, only  # type: ignore[return-value]
    return {name: p.annotation for name, p in parameters.items()}, None


def normalize(arguments: list[str], options: dict[str, Any]) -> list[str]:
    """Hyphens in option names to underscores, `--json` alone to `--json=true`, `--blocks 2 5` to `--blocks=[2, 5]`."""
    result: list[str] = []
    taken = 0
    for i, argument in enumerate(arguments):
        if i < taken:
            continue
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            plain = name[2:].replace("-", "_")
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            if options.get(plain) is bool and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            if "list[int]" in str(options.get(plain)) and not equals:
                taken = i + 1
                while taken < len(arguments) and re.fullmatch(r"-?\d+", arguments[taken]):
                    taken += 1
                if taken > i + 1:
                    equals, value = "=", f"[{','.join(arguments[i + 1 : taken])}]"
                elif re.fullmatch(r"-?\d+(,-?\d+)+", following):
                    taken, equals, value = i + 2, "=", f"[{following}]"
            argument = f"--{plain}{equals}{value}"
        result.append(argument)
    return result


def parse(command: str, arguments: list[str]) -> tuple[Any, Any]:
    """The function of `command`, and its options: a dataclass where it takes one, else a dictionary."""
    function = getattr(importlib.import_module(f"glmix.commands.{module_of(command)}"), module_of(command))
    options, schema = options_of(function)
    parser = Parser(prog=f"glmix {command}", description=(function.__doc__ or "").split("\n\n")[0])
    positional = [name for name in options if name in POSITIONAL]
    for name in positional:
        default = inspect.signature(function).parameters[name].default
        parser.add_argument(name, nargs=POSITIONAL[name] if default is inspect.Parameter.empty else "*")
    if schema is not None:
        parser.add_argument("--config", action="config", help="a recipe: a YAML file of these options")
        parser.add_class_arguments(schema, None, as_group=False)
    else:
        parser.add_function_arguments(function, None, as_group=False, as_positional=False, skip=set(positional))
    try:
        given = parser.parse_args(normalize(arguments, options)).as_dict()
    except UnicodeDecodeError as error:
        raise UserError(f"--config: not a text file ({error}); a recipe is YAML") from error
    given.pop("config", None)
    try:
        return function, given if schema is None else schema(**given)
    except ValueError as error:
        raise UserError(str(error)) from error


def module_of(command: str) -> str:
    """Name of the module and function of a command."""
    return command.replace("-", "_")


def run(command: str, arguments: list[str]) -> None:
    """Parse the options of `command` and call its function."""
    function, options = parse(command, arguments)
    if isinstance(options, dict):
        function(**options)
    else:
        function(options)


def usage() -> str:
    """The table of commands."""
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["usage: glmix COMMAND [options]", "", *lines, "", "glmix COMMAND --help shows the options of a command."]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it went well, 2 after a mistake that the message tells how to mend."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from glmix import __version__

        print(__version__)
        return 0
    command, *rest = arguments
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if command not in COMMANDS:
            near = difflib.get_close_matches(command, COMMANDS, 1)
            raise UserError(
                f"no command {command!r}; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
            )
        run(command, rest)
        return 0
    except UserError as error:
        print(f"glmix: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("glmix: interrupted", file=sys.stderr)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        print(f"glmix: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
