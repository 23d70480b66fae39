"""The command line: a table of commands, each a plain function whose signature and docstring are its options."""

import difflib
import errno
import importlib
import inspect
import json
import logging
import os
import re
import sys
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from glmix.console import lenient, mute, say
from glmix.errors import UserError
from glmix.ranges import in_words
from glmix_command import COMMANDS, usage

MENDABLE = {  # errors of the file system that a person can do something about
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
    errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
POSITIONAL = {"images": "+", "sources": "+", "source": None, "target": None, "repository": None, "file": None,
              "study": None}  # fmt: skip


class Parser(ArgumentParser):
    """Names options with hyphens, as people type them, and reports a mistake as one line."""

    file = ""  # a recipe that is being read, for messages

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r"\s+", " ", str(message)).strip().removesuffix(".")
        name = re.search(r'[Kk]ey "([\w.]+)"', text)
        restriction = re.search(r"type \w+: (\S+) does not conform to restriction (v.*)", text)
        unknown = re.search(r"(?:[Uu]nrecognized arguments|[Kk]ey|[Oo]ption|[Gg]roup):? '?-*([\w-]+)", text)
        given = unknown[1].replace("-", "_") if unknown else ""
        near = [n for n in difflib.get_close_matches(given, [a.dest for a in self._actions], 1) if n != given]
        hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else f"; see {self.prog} --help"
        choices = re.search(r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", text)
        whole = re.search(r"invalid literal for int\(\) with base 10: '(.*?)'", text)
        no_kind = re.search(
            r"(?:any of the Union subtypes .* Given value:|Expected a <class '(?:tuple|list)'>\. Got value:) (.*)", text
        )
        if name and restriction:
            text = f"{name[1]} must be {in_words(restriction[2])}, not {restriction[1]}"
        elif name and choices:
            text = f"{name[1]} must be one of {choices[1].replace(chr(39), '')}, not {choices[2]}"
        elif name and whole:
            text = f"{name[1]} must be a whole number, not {whole[1]}"
        elif name and no_kind and (literals := re.search(r"Literal\[(.*?)\]", text)):
            text = f"{name[1]} must be one of {literals[1].replace(chr(39), '')}, not {no_kind[1]}"
        elif name and no_kind:
            several = " (several go in brackets: '[0.5, 1.0]')" if "ist[" in text or "<class '" in text else ""
            text = f"{name[1]} cannot be {no_kind[1]}{several}"
        elif name and "File does not exist" in text:
            text = f"--{name[1]}: there is no such file"
        elif missing := re.search(r"arguments are required: (\w+)$", text):
            told = [a.help for a in self._actions if a.dest == missing[1] and a.help]
            text += f" ({' '.join(told[0].split()).split('. ')[0].removesuffix('.')})" if told else ""
        text = re.sub(r"(?<=--)\w+", lambda m: m[0].replace("_", "-"), text)
        raise UserError(self.file + text[:300] + hint)

    def format_help(self, *arguments: Any) -> str:
        """The options as they are typed: with hyphens, flags without a value, bounds in words."""
        text = super().format_help(*arguments)
        text = re.sub(r"(?<=--)[a-z]+(?:_[a-z]+)+", lambda m: m[0].replace("_", "-"), text)
        text = re.sub(r" \{true,\s*false\}", "", text)
        for action in self._actions:
            kind = getattr(action, "_typehint", None)
            expression = getattr(kind, "_expression", None)
            if kind is not None and expression:
                number = {int: "whole number", float: "number"}[kind._type]
                text = re.sub(rf"type:\s+{kind.__name__}\b", f"{number}, {in_words(expression)}", text)
        return text


def options_of(function: Any) -> tuple[dict[str, Any], bool]:
    """Option names with their types, and whether the function takes them as one dataclass, its only parameter."""
    parameters = inspect.signature(function).parameters
    only = next(iter(parameters.values())).annotation if len(parameters) == 1 else None
    return {name: p.annotation for name, p in parameters.items()}, is_dataclass(only)


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
            kind, following = str(options.get(plain)), arguments[i + 1] if i + 1 < len(arguments) else ""
            if options.get(plain) is bool and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            if "list[int]" in kind or "tuple[int, int]" in kind:
                taken, numbers = i + 1, re.findall(r"-?\d+", value) if re.fullmatch(r"\d+([,x]\d+)*", value) else []
                while not equals and taken < len(arguments) and re.fullmatch(r"-?\d+([,x]-?\d+)*", arguments[taken]):
                    numbers += re.findall(r"-?\d+", arguments[taken])
                    taken += 1
                if "tuple" in kind and len(numbers) == 1:
                    numbers *= 2
                if numbers:
                    equals, value = "=", f"[{','.join(numbers)}]"
            if "tuple[str, str]" in kind and not equals:
                taken = i + 3
                pair = [word for word in arguments[i + 1 : taken] if not word.startswith("--")]
                if len(pair) < 2:
                    raise UserError(f"{name} takes two values, not {len(pair)}; name both after it")
                equals, value = "=", json.dumps(pair)
            argument = f"--{plain}{equals}{value}"
        result.append(argument)
    return result


def asked(arguments: list[str]) -> dict[str, str]:
    """What a command line gives for each option, before it is known which there are."""
    found: dict[str, str] = {}
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            found[name[2:].replace("-", "_")] = value if equals else following
    return found


def parse(command: str, arguments: list[str]) -> tuple[Any, Any]:
    """The function of `command`, and its options: a dataclass where it takes one, else a dictionary."""
    module = importlib.import_module(f"glmix.commands.{module_of(command)}")
    function = getattr(module, module_of(command))
    options, as_dataclass = options_of(function)
    parser = Parser(prog=f"glmix {command}", description=(function.__doc__ or "").split("\n\n")[0])
    schema: Any = None
    if as_dataclass:
        given = asked(arguments)
        schema, parser.file = module.schema_of(given), f"{given['config']}: " if "config" in given else ""
        options = {f.name: f.type for f in fields(schema)}
        parser.add_argument("--config", action="config", help="a recipe: a YAML file of these options")
        positional = [name for name in options if name in POSITIONAL]
        for name in positional:
            parser.add_argument(name, nargs=POSITIONAL[name], help=described(name, *schema.__mro__))
        parser.add_class_arguments(schema, None, as_group=False, skip=set(positional))
        group_options(parser, schema)
    else:
        positional = [name for name in options if name in POSITIONAL]
        for name in positional:
            default = inspect.signature(function).parameters[name].default
            nargs = POSITIONAL[name] if default is inspect.Parameter.empty else "*"
            parser.add_argument(name, nargs=nargs, help=described(name, function))
        parser.add_function_arguments(function, None, as_group=False, as_positional=False, skip=set(positional))
    try:
        plain = normalize(arguments, options)
        result = parser.parse_args(plain).as_dict()
        result.pop("config", None)
        if schema is None:
            return function, result
        made = schema(**result)
        made.given = frozenset(parser.parse_args(plain, defaults=False).as_dict()) - {"config"}
        return function, made
    except UnicodeDecodeError as error:
        raise UserError(f"--config: not a text file ({error}); a recipe is YAML") from error
    except ValueError as error:
        raise UserError(parser.file + str(error)) from error


def described(name: str, *documented: Any) -> str | None:
    """What the first docstring that knows an argument says of it, which jsonargparse shows of options alone."""
    for one in documented:
        for argument in docstring_parser.parse(one.__doc__ or "").params:
            if argument.arg_name == name and argument.description:
                return " ".join(argument.description.split())
    return None


def group_options(parser: Parser, schema: Any) -> None:
    """Sort the options of a dataclass under the titles that its `GROUPS` give, by the first option of each."""
    titles: dict[str, list[str]] = {title: [] for title in schema.GROUPS.values()}
    title = ""
    for field in fields(schema):
        title = schema.GROUPS.get(field.name, title)
        titles[title].append(field.name)
    usual = parser._optionals
    for title, names in titles.items():
        group = parser.add_argument_group(title)
        for action in [a for a in usual._group_actions if a.dest in names]:
            usual._group_actions.remove(action)
            group._group_actions.append(action)


def module_of(command: str) -> str:
    """Name of the module and function of a command."""
    return command.replace("-", "_")


def run(command: str, arguments: list[str]) -> int:
    """Parse the options of `command` and call its function; the exit status, which is 0 where it tells none."""
    function, options = parse(command, arguments)
    status = function(**options) if isinstance(options, dict) else function(options)
    return int(status or 0)


def moved(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """A command line as it is written today: `eval --task slots` has become `slots`, and classifiers need no task."""
    if command != "eval" or "task" not in asked(arguments):
        return command, arguments
    joined = re.sub(r"(^|\n)--task(=|\n)", r"\1--task=", "\n".join(arguments)).split("\n")
    kept = [a for a in joined if not a.startswith("--task=")]
    task = asked(joined)["task"]
    if task == "weak-segment":
        return command, arguments
    if task == "slots":
        return "slots", kept
    if task != "classify":
        raise UserError(
            f"--task {task}: classify or slots or weak-segment; else the task is the checkpoint's, so leave it out"
        )
    return command, kept


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 if some images could not be used, 2 after a mistake that can be mended.

    A command that a signal stopped ends with 128 and the signal's number, as the shell has it.
    """
    lenient()
    try:
        status = answer(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        say(f"glmix: {error}")
        return error.status
    except KeyboardInterrupt:
        say("glmix: interrupted")
        return 130
    except BrokenPipeError:  # `glmix predict … | head`
        mute(sys.stdout)
        return 141
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        say(f"glmix: {error.filename or 'a file'}: {error.strerror}")
        return 2


def answer(arguments: list[str]) -> int:
    """As `main`, but for mistakes."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from glmix import __version__

        print(__version__)
        return 0
    command, *rest = arguments
    for library in ("lightning.pytorch", "huggingface_hub"):  # what they warn of is told by us, in a line
        logging.getLogger(library).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        raise UserError(
            f"no command {command!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}")
        )
    now, rest = moved(command, rest)
    status = run(now, rest)
    if now != command:  # afterwards: a mistake is told in one line
        say(f"glmix: what `glmix {command}` did here is now `glmix {now}`; the old form goes with the next release")
    return status


if __name__ == "__main__":
    sys.exit(main())
