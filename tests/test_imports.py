"""Imports point one way, and what stands alone is shown to: by reading the code, and by a fresh process."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = (
    "diffusers",
    "transformers",
    "accelerate",
    "deepspeed",
    "open3d",
    "av",
    "peft",
    "rerun",
    "matplotlib",
    "trimesh",
)
RULES = {
    "geometry": ("rewards", "vggrpo"),
    "rewards": (
        "vggrpo",
        *(f"geometry.{name}" for name in ("world", "export", "models", "backbone", "hooks", "latent", "ridge")),
        *(f"geometry.{name}" for name in ("stitch", "distance", "distil", "stored")),
    ),
    "vggrpo/trainer.py": ("vggrpo.policy",),
    "vggrpo/grpo.py": ("geometry", "rewards", "vggrpo"),
    "vggrpo/evaluate": ("rewards", "geometry.latent", "geometry.stitch", "geometry.distil", "geometry.stored"),
}


def imports(source: str) -> set[str]:
    """Every module that some source imports, at any depth; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def forbidden(source: str, rules: tuple[str, ...]) -> set[str]:
    return {name for name in imports(source) for rule in rules if name == rule or name.startswith(f"{rule}.")}


@pytest.mark.parametrize("where", RULES)
def test_imports_point_one_way(where):
    path = ROOT / where
    files = [path] if path.suffix else sorted(path.rglob("*.py"))
    broken = {str(file.relative_to(ROOT)): forbidden(file.read_text(), RULES[where]) for file in files if file.exists()}
    assert not {name: modules for name, modules in broken.items() if modules}


def knows_the_referee(source: str) -> bool:
    """Whether some source imports the second geometry model, or the adjustment that is its own."""
    return any("referee" in name or name.startswith("geometry.models.bundle") for name in imports(source))


def test_only_judges_know_the_referee():
    """Rewards, trainers and stitching must not: who is judged by it may not have been taught by it."""
    broken = []
    for package in ("geometry", "rewards", "vggrpo"):
        for file in sorted((ROOT / package).rglob("*.py")):
            source = file.read_text()
            if file == ROOT / "vggrpo/bootstrap/commands.py":  # the command that trains it, and no other
                own = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "bootstrap_referee")
                source = source.replace(ast.get_source_segment(source, own) or "", "")
            judge = file.stem in ("generator_eval", "evaluation") or file.is_relative_to(ROOT / "vggrpo/evaluate")
            if file.stem.startswith("referee") or judge:
                continue
            if knows_the_referee(source):
                broken.append(str(file.relative_to(ROOT)))
    assert not broken
    assert knows_the_referee("def f():\n    from geometry.models.referee import Referee")
    assert knows_the_referee("from vggrpo.bootstrap import referee_publish")
    assert not knows_the_referee("from geometry.models.solver import chain")


def test_the_rule_can_be_broken():
    assert forbidden("import rewards", RULES["geometry"]) == {"rewards"}
    assert forbidden("def f():\n    from vggrpo.policy import wan", RULES["vggrpo/trainer.py"]) == {
        "vggrpo.policy",
        "vggrpo.policy.wan",
    }
    assert forbidden("from geometry import world", RULES["rewards"]) == {"geometry.world"}
    assert not forbidden("import geometry.cameras", RULES["rewards"])


def loaded(statement: str) -> set[str]:
    """Heavy packages in a fresh interpreter after a statement."""
    code = f"import sys\n{statement}\nprint(*(m for m in {HEAVY!r} if m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("package", ["geometry", "geometry.world", "geometry.distil", "geometry.stored", "rewards"])
def test_light_packages_load_nothing_heavy(package):
    assert loaded(f"import {package}") == set()


def test_a_heavy_import_is_noticed():
    assert loaded("import matplotlib") == {"matplotlib"}


def test_rewards_need_only_torch_and_kornia():
    """Every other third-party package blocked, as on a machine that has only those two and what they bring."""
    block = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {names!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from rewards import REWARDS, motion_smoothness
from geometry import Geometry
c2w = torch.eye(4).repeat(5, 1, 1)
scene = Geometry(c2w, torch.eye(3).repeat(5, 1, 1), torch.ones(5, 4, 4), torch.ones(5, 4, 4, 3))
print(float(motion_smoothness(scene)))
"""
    code = block.replace("{names!r}", repr({*HEAVY, "scipy", "cv2", "pycolmap", "beartype", "pytest", "yaml"}))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) == 1.0


def test_the_command_names_the_extra_that_is_missing():
    code = "import sys; sys.modules['accelerate'] = None; from vggrpo.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "vggrpo: accelerate is not installed: pip install 'vggrpo[train]'\n"
