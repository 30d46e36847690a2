"""How a run is launched: the number of processes and the engine that joins them. What was asked for must be what runs.

accelerate does not insist on either: on a CPU, `accelerate launch --cpu --num_processes 2` starts one process,
`--use_deepspeed` becomes plain DDP, and FSDP does, too. A run that asks for more than it gets is refused here.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from vggrpo.config import LaunchConfig

FOLDER = Path("launch/accelerate")
"""Of the launch configurations that go by name."""


class Asked(NamedTuple):
    """What a launcher was told to start; None where it was told nothing."""

    num_processes: int | None
    engine: str | None
    """The beginning of its name: DeepSpeed's stage may be in a file of its own."""
    by: str


def start(wanted: LaunchConfig, *, cpu: bool = False) -> Accelerator:
    """The accelerator of this process, on GPUs or CPUs, once it is what recipe and launcher ask for.

    Args:
        cpu: stay there even if there is a GPU.

    Raises:
        ValueError: another number of processes or another engine than was asked for, by whom, and the remedy; DeepSpeed
            where it is not installed.
    """
    handlers = []
    on_cpu = cpu or not torch.accelerator.is_available()
    if on_cpu:  # where it is installed, DeepSpeed would look for more, and say so on stdout
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = _flag("ACCELERATE_USE_DEEPSPEED")
    if deepspeed:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError("the launcher asks for DeepSpeed, which is not installed: pip install 'vggrpo[deepspeed]'")
        if on_cpu:  # cpu=True would make it plain DDP, and without a backend every rank would be alone
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
    accelerator = Accelerator(cpu=on_cpu and not deepspeed, kwargs_handlers=handlers)
    check(accelerator, [Asked(wanted.num_processes, wanted.engine, "the recipe's `launch`"), *launchers()])
    return accelerator


def check(accelerator: Accelerator, asked: Sequence[Asked]) -> None:
    """Refuse a launch that is not what was asked for.

    Raises:
        ValueError: see `start`.
    """
    engine, found = engine_of(accelerator), accelerator.num_processes
    for one in asked:
        if one.num_processes is not None and one.num_processes != found:
            raise ValueError(
                f"{one.by} asks for {one.num_processes} process(es), and {found} run(s): start it with "
                f"`vggrpo train RECIPE --accelerate ddp --num_processes {one.num_processes}` (accelerate's --cpu "
                "always starts one), or set launch.num_processes"
            )
        if one.engine is not None and not engine.startswith(one.engine):
            raise ValueError(
                f"{one.by} asks for {one.engine}, and {engine} runs: start it with `vggrpo train RECIPE --accelerate "
                f"{one.engine}` (fsdp2 needs GPUs; DeepSpeed on a CPU must not be told --cpu), or set launch.engine"
            )


def engine_of(accelerator: Accelerator) -> str:
    """single, ddp, zero1, zero2, zero3, fsdp1 or fsdp2."""
    kind, state = accelerator.distributed_type, accelerator.state
    if kind == DistributedType.DEEPSPEED:
        return f"zero{state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"fsdp{state.fsdp_plugin.fsdp_version}"
    return "ddp" if accelerator.num_processes > 1 else "single"


def described(accelerator: Accelerator) -> str:
    """One line: processes, engine, device."""
    return f"{accelerator.num_processes} process(es), engine {engine_of(accelerator)}, on {accelerator.device.type}"


def launchers() -> list[Asked]:
    """What the environment and the command line of an `accelerate launch` above this process ask for."""
    engine = "zero" if _flag("ACCELERATE_USE_DEEPSPEED") else "fsdp" if _flag("ACCELERATE_USE_FSDP") else None
    world = os.environ.get("WORLD_SIZE")
    found = [Asked(None if world is None else int(world), engine, "the launcher's environment")]
    words = _parent()
    if words is not None:
        from accelerate.commands.config.config_args import default_config_file, load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words)
        number = args.num_processes
        if number is None and (args.config_file or (os.path.isfile(default_config_file) and not args.cpu)):
            number = load_config_from_file(args.config_file).num_processes
        found.append(Asked(number, None, "accelerate launch"))
    return found


def command(name: str, words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`accelerate launch` with a configuration, and a recipe that insists on it.

    Args:
        name: of a file in launch/accelerate, or a path.
        words: what comes after `python -m vggrpo`.
        flags: more for `accelerate launch`, `--num_processes 4` among them.

    Raises:
        ValueError: no such configuration.
    """
    path, settings = configuration(name)
    number, engine = num_processes(settings, flags), engine_in(settings)
    launch = [
        f"launch.num_processes={number}",
        f"launch.engine={'single' if (number, engine) == (1, 'ddp') else engine}",
    ]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), *flags]
    return [*start, "-m", "vggrpo", *words, *launch]


def configuration(name: str) -> tuple[Path, dict[str, Any]]:
    """The file and content of a launch configuration.

    Raises:
        ValueError: there is none of that name, or it is not YAML.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml"))) or f"none: {FOLDER} is not here"
        raise ValueError(f"no launch configuration at {path}: give a path, or one of those in {FOLDER} ({known})")
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or "distributed_type" not in settings:
        raise ValueError(f"{path} is no configuration of accelerate: it has no distributed_type")
    return path, settings


def num_processes(settings: dict[str, Any], flags: Sequence[str] = ()) -> int:
    """Of all machines together: the flag's, or the configuration's.

    Raises:
        ValueError: no number.
    """
    given = [flags[i + 1] for i, flag in enumerate(flags) if flag == "--num_processes"]
    number = str(given[-1] if given else settings.get("num_processes", 1))
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"num_processes must be a number >= 1, got {number!r}")
    return int(number)


def engine_in(settings: dict[str, Any]) -> str:
    """The engine that a configuration asks for, as `engine_of` names it."""
    if settings["distributed_type"] == "DEEPSPEED":
        section = settings["deepspeed_config"]
        file = section.get("deepspeed_config_file")
        stage = (
            section["zero_stage"] if file is None else json.loads(Path(file).read_text())["zero_optimization"]["stage"]
        )
        return f"zero{stage}"
    if settings["distributed_type"] == "FSDP":
        return f"fsdp{settings['fsdp_config']['fsdp_version']}"
    return "ddp"


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _parent() -> list[str] | None:
    """What `accelerate launch` was given, if it is what started this process."""
    import psutil  # accelerate depends on it

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    for i, word in enumerate(words[:4]):
        name = Path(word).name
        if name in ("accelerate-launch", "accelerate.commands.launch") or word.endswith(
            "accelerate/commands/launch.py"
        ):
            return words[i + 1 :]
        if name == "accelerate" and words[i + 1 : i + 2] == ["launch"]:
            return words[i + 2 :]
    return None
