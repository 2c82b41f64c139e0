"""The command line of a training run: Hydra's flags and overrides, and the configs that they compose."""

import argparse
import copy
import os
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segdeconv.cli.command import require_local
from segdeconv.config import (
    OTHER_NAMES,
    Node,
    current_key,
    former_keys,
    leaves,
    list_groups,
    parse_override,
    rename_keys,
    require_one_line,
    unknown_choice,
)
from segdeconv.errors import UsageError, command
from segdeconv.system.plain_data import read_yaml, require_mapping

REQUIRED = ("dataset", "model", "loss", "optimizer", "schedule", "trainer")  # groups that have no file `none`


def to_plain(composed: Any, arguments: Sequence[str], *, incomplete: bool = False) -> dict[str, Any]:
    """Convert a composed config to plain data, with interpolations resolved and keys under their current names.

    Args:
        composed: A DictConfig.
        arguments: The command line that it was composed from.
        incomplete: Keep `???` for a value that has to be given.

    Raises:
        UsageError: A value is missing or cannot be resolved, or a user's files set a key under both names.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

    try:
        config = typing.cast(
            dict[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=not incomplete)
        )
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the config"
        reason = str(error).splitlines()[0].lower()
        way_out = f"give {key}=VALUE"
        if isinstance(error, InterpolationResolutionError | GrammarParseError):
            way_out += r", in which \${ stands for the characters ${"
        raise UsageError(f"{key}: {reason} - {way_out}") from error
    user_dir = user_config_dir(arguments)
    return rename_keys(_resolve_former(config, arguments, user_dir), f"a file in {user_dir}") if user_dir else config


def _resolve_former(config: Node, arguments: Sequence[str], user_dir: Path) -> Node:
    """Keep one value where a user's file or the command line sets a key under its former name.

    Hydra merges the former name next to the current one. The command line takes precedence over a user's file, and that
    over a shipped file.
    """
    both = [(group, old, new) for group, old, new in former_keys(config) if new in config[group]]
    if not both:
        return config
    typed = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in sorted(user_dir.rglob("*.yaml")))
    resolved = copy.deepcopy(config)
    for group, old, new in both:
        if typed & {f"{group}.{old}", f"{group}.{new}"}:
            del resolved[group][old]
        elif f"{new}:" not in text:  # a shipped file has set it
            del resolved[group][new]
    return resolved


def compose(
    arguments: Sequence[str], folder: Path, *, incomplete: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose a config from a command line and a folder of YAML files.

    Args:
        arguments: The command line. `--config-dir DIR` adds a folder of the user, `--config-name NAME` starts from
            another file than train.yaml.
        folder: The shipped configs.
        incomplete: Keep `???` for a value that has to be given.

    Returns:
        The config, and the choice of each group.

    Raises:
        UsageError: The command line is wrong, or Hydra cannot compose it.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import open_dict
    from omegaconf.errors import OmegaConfBaseException

    flags = parse_flags(arguments)
    for word in _flag_words(flags):
        if not word.startswith(("--config-dir=", "--config-name=")):
            raise UsageError(f"{word.partition('=')[0]} is an option of {command('train')} - leave it out")
    words = [word for word in hydra_overrides(arguments, folder) if not word.startswith(("hydra.", "hydra/", "-"))]
    main, name = os.path.abspath(folder), (flags.config_name or "train").removesuffix(".yaml")
    if flags.config_dir is not None:
        other = os.path.abspath(flags.config_dir)
        if os.path.isfile(os.path.join(other, f"{name}.yaml")):  # Hydra finds the main file only in the first folder
            main, other = other, main
        words.append(f"hydra.searchpath=[{quote(f'file://{other}')}]")
    try:
        with initialize_config_dir(main, version_base="1.3"):
            composed = hydra_compose(name, words, return_hydra_config=True)
            choices = dict(composed.hydra.runtime.choices)
            with open_dict(composed):
                del composed["hydra"]
            return to_plain(composed, arguments, incomplete=incomplete), choices
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"the config cannot be composed: {error} - correct the override") from error


def keys_set(arguments: Sequence[str], folder: Path) -> set[str]:
    """Return the keys and groups that a command line sets, also through its experiment and its own main file.

    Args:
        arguments: The arguments, in the form of `hydra_overrides`.
        folder: The shipped configs.
    """
    flags = parse_flags(arguments)
    keys = {word.partition("=")[0].lstrip("+~") for word in flags.overrides}
    folders = [folder, *([Path(flags.config_dir)] if flags.config_dir is not None else [])]
    names = [f"experiment/{word.partition('=')[2]}" for word in flags.overrides if word.startswith("experiment=")]
    if flags.config_name is not None:
        names.append(flags.config_name.removesuffix(".yaml"))
    while names:
        name = names.pop()
        for path in (folder / f"{name}.yaml" for folder in folders):
            if not path.is_file() or name == "train":
                continue
            content = dict(require_mapping(read_yaml(path)))
            for entry in content.pop("defaults", []):
                if isinstance(entry, str):
                    names.append(f"{name.rpartition('/')[0]}/{entry}".lstrip("/"))  # another file, or _self_
                else:
                    keys |= {group.removeprefix("override ").lstrip("/") for group in entry}
            keys |= set(leaves(content))
    return keys


# Flags of Hydra that the commands do not support, and what to do instead.
UNSUPPORTED_FLAGS = {
    "config_path": "it would replace segdeconv's config files - add a folder of your own with --config-dir DIR",
    "experimental_rerun": "it would unpickle a file - run the same command again, or resume a run with resume=RUN",
}


@contextmanager
def hydra_arguments() -> Iterator[None]:
    """Let Hydra make its parser on Python 3.14, whose argparse checks that help is a text: one is not (hydra#3121)."""
    parser: Any = argparse.ArgumentParser
    if not hasattr(parser, "_check_help") or "_check_help" in vars(parser):  # older, or within another call
        yield
        return
    parser._check_help = lambda self, action: None  # instead of the method of its base class
    try:
        yield
    finally:
        del parser._check_help


def parse_flags(arguments: Sequence[str]) -> Any:
    """Parse the flags of a command line with Hydra's own parser.

    Args:
        arguments: The command line, with flags and overrides in any order.

    Returns:
        A namespace with an attribute for each flag of Hydra, such as `config_dir`; `keys`, the group of `--keys`
        (empty for all groups, None without the flag); and the list `overrides`.

    Raises:
        UsageError: A flag is unknown, not supported, given twice, or contradicts another one.
    """
    from hydra._internal.utils import get_args_parser

    def refuse(message: str) -> None:
        raise UsageError(f"{message} - see {command('train', ['--help'])}")

    with hydra_arguments():
        parser = get_args_parser()
    parser.add_argument("--keys", nargs="?", const="")
    parser.allow_abbrev = False
    parser.error = refuse  # type: ignore[method-assign, assignment]
    words = list(arguments)
    for position, word in enumerate(words):  # the optional value of a flag is never an override
        if word in ("--keys", "--info", "-i") and "=" in "".join(words[position + 1 : position + 2]):
            words[position] = "--keys=" if word == "--keys" else "--info=all"
    flags, unknown = parser.parse_known_intermixed_args(words)
    if unknown:
        raise UsageError(_unknown_flag(unknown[0], words))
    for name, reason in UNSUPPORTED_FLAGS.items():
        if getattr(flags, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} is not supported: {reason}")
    modes = [name for name in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(flags, name)]
    if len(modes) > 1:
        raise UsageError(f"{_flag(modes[0])} and {_flag(modes[1])} exclude each other - give one of them")
    if (flags.resolve or flags.package is not None) and not flags.cfg:
        raise UsageError(f"{'--resolve' if flags.resolve else '--package'} belongs to --cfg - add --cfg job")
    if flags.config_dir is not None and not Path(flags.config_dir or "-").is_dir():
        raise UsageError(f"--config-dir={flags.config_dir} does not name a folder - write --config-dir DIR")
    if sum(word.partition("=")[0] in ("--config-dir", "-cd") for word in words) > 1:
        raise UsageError("--config-dir is given twice - give it once")
    return flags


def _unknown_flag(flag: str, words: Sequence[str]) -> str:
    """Return the error message for an unknown flag, with the override to write instead if there is one."""
    name, equals, value = flag.partition("=")
    following = words[words.index(flag) + 1 :] if flag in words else []
    if not equals and following and not following[0].startswith("-") and "=" not in following[0]:
        value = following[0]
    name = name.lstrip("-").replace("-", "_")
    key = OTHER_NAMES.get(name.lower(), name)
    return f"unknown option {flag.partition('=')[0]} - write {key}={value or 'VALUE'}, without dashes, or see --keys"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def user_config_dir(arguments: Sequence[str]) -> Path | None:
    """Return the folder of `--config-dir DIR`, which has the user's configs in the layout of the shipped ones, or None.

    Raises:
        UsageError: See `parse_flags`.
    """
    path = parse_flags(arguments).config_dir
    return None if path is None else Path(path)


def available_choices(arguments: Sequence[str], folder: Path) -> dict[str, list[str]]:
    """Return the choices of each group on this command line, both shipped ones and those of the user's folder.

    Raises:
        UsageError: A user's file has the name of a shipped one.
    """
    shipped, user_dir = list_groups(folder), user_config_dir(arguments)
    added = list_groups(user_dir) if user_dir else {}
    for group, names in added.items():
        if both := sorted(set(names) & set(shipped.get(group, []))):
            raise UsageError(
                f"{user_dir}/{group}/{both[0]}.yaml has the name of a shipped file, which takes precedence - rename it"
            )
    return {group: sorted([*names, *added.get(group, [])]) for group, names in shipped.items()}


def hydra_overrides(arguments: Sequence[str], folder: Path) -> list[str]:
    """Check a command line and return its overrides in a form that Hydra accepts.

    An argument of a constructor need not be in a YAML file to be set, so `model.depth=13` becomes `++model.depth=13`;
    `check` reports unknown arguments later.

    Args:
        arguments: The command line.
        folder: The shipped configs.

    Returns:
        The flags, each as one word, and then the overrides: Hydra accepts no flags between overrides.

    Raises:
        UsageError: A flag is wrong (see `parse_flags`), or an argument has the wrong form, is given twice, names an
            unknown choice of a group, or reads environment variables.
    """
    flags = parse_flags(arguments)
    groups = available_choices(arguments, folder)
    overrides, set_keys = [], set()
    for argument in flags.overrides:
        require_one_line(argument)
        typed, (argument, override) = argument, _parse_as_typed(argument, sweeps=flags.multirun, groups=groups)
        if "${" in argument and "oc.env" in argument:
            raise UsageError(
                f"'{typed}' would write an environment variable into config.yaml and the checkpoints - give the "
                "value itself"
            )
        key = current_key(override.key_or_group)
        argument = argument.replace(override.key_or_group, key, 1)
        if key in set_keys:
            raise UsageError(f"{key} is given twice - give it once")
        set_keys.add(key)
        value = override.value()
        if (key == "hydra.job.chdir" and value) or (key == "hydra.run.dir" and not value):
            way_out = "leave it out, since paths are those of this folder" if value else "give the folder of the run"
            raise UsageError(f"'{typed}' is not supported - {way_out}")
        if override.is_delete() and key in REQUIRED:
            raise UsageError(f"{typed} leaves a run without its {key} - choose another one with {key}=NAME")
        if override.is_delete() and "none" in groups.get(key, ()):
            overrides.append(f"{key}=none")  # without a node, the default would apply
        elif key in groups:
            sweep = override.is_sweep_override()
            chosen = override.value()
            several = chosen if isinstance(chosen, list) and key in SEVERAL else [chosen]
            for choice in override.sweep_string_iterator() if sweep else map(str, several):
                if choice not in groups[key] and choice != "None":
                    raise unknown_choice(key, choice, groups[key])
            # Every group has a default, experiment=null among them, so +experiment=NAME replaces one too.
            overrides.append(argument.lstrip("+"))
        elif key.startswith("hydra") or argument[0] == "~":
            overrides.append(argument)
        else:
            overrides.append("++" + argument.lstrip("+"))
    return [*_flag_words(flags), *overrides]


def _flag_words(flags: Any) -> list[str]:
    """Return the flags of `parse_flags` as words of a command line, without the overrides."""
    return [
        _flag(name) if value is True else f"{_flag(name)}={value}"
        for name, value in vars(flags).items()
        if name != "overrides" and value is not None and value is not False
    ]


def fixed_overrides(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of a command line that are no sweeps, in the form in which Hydra gives them to each job."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([word for word in arguments if not word.startswith("-")])
    return [
        f"{word.get_key_element()}={word.get_value_element_as_str()}" for word in parsed if not word.is_sweep_override()
    ]


def first_values(arguments: Sequence[str]) -> list[str]:
    """Return the overrides of a command line with the first value of each sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    words = []
    for word in OverridesParser.create().parse_overrides(list(arguments)):
        parsed: Any = word.value()
        if word.is_interval_sweep():
            value = str(parsed.start)
        elif word.is_sweep_override():
            value = next(word.sweep_string_iterator(), "")
        else:
            value = word.get_value_element_as_str()
        words.append(f"{word.get_key_element()}={value}")
    return words


SEVERAL = ("callbacks",)  # groups of which several files can be chosen at once: callbacks=[a,b]


HYDRA_PATHS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")


def _parse_as_typed(argument: str, *, sweeps: bool, groups: Iterable[str]) -> tuple[str, Any]:
    """Parse an argument, whose value is taken as typed where Hydra's grammar does not allow it.

    Args:
        argument: `key=value`, or `~key`.
        sweeps: Whether the values of a sweep are wanted; otherwise a comma is a part of the text.
        groups: Names of the config groups, whose sweeps Hydra reports.

    Returns:
        The argument as Hydra accepts it, and Hydra's reading of it.

    Raises:
        UsageError: The argument has another form.
    """
    key, equals, text = argument.partition("=")
    name = key.lstrip("+")
    if name in HYDRA_PATHS and text.startswith("~/"):
        text = os.path.expanduser(text)
    parsed = parse_override(f"{key}{equals}{text}")
    if parsed is not None:
        value = parsed.value()
        if parsed.is_sweep_override():
            literal = not sweeps and name not in groups
        elif isinstance(value, str):
            literal = value == text.strip() != text and "${" not in text  # spaces at the ends
        else:
            literal = name in HYDRA_PATHS
    else:
        literal = True
    if name in HYDRA_PATHS and (r"\${" in text or (literal and "${" in text)):
        raise UsageError(f"'{argument}' names a folder with the characters ${{, which Hydra resolves - use other ones")
    if name in HYDRA_PATHS:
        require_local(name, text)
    if not literal:
        return f"{key}{equals}{text}", parsed
    quoted = f"{key}={quote(text)}"
    parsed = parse_override(quoted) if equals else None
    if parsed is None:
        raise UsageError(f"'{argument}' is not key=value - write for example dataset=camvid model.depth=13")
    return quoted, parsed


def quote(text: str) -> str:
    """Quote a text so that Hydra and OmegaConf read it as it is.

    Examples:
        >>> quote("it's ${x}")
        "'it\\\\'s \\\\${x}'"
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    escaped = re.sub(r"(\\*)\$\{", lambda match: 2 * match[1] + r"\${", text)
    return str(QuotedString(text=escaped, quote=Quote.single).with_quotes())
