"""The Triton kernels: correct results (triton_kernel_cases.py, fused_stage_cases.py), used only where they can run."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fresh_commands import child_environment

from segdeconv.switches.ops import load_triton_kernels

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=child_environment(ROOT, OMP_NUM_THREADS="1", **environment),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow  # Triton interprets the kernels
@pytest.mark.parametrize("cases", ["triton_kernel_cases", "fused_stage_cases"])
def test_the_kernels_give_the_results_of_torch(cases):
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/switches/{cases}.py", **interpreted)
    assert done.returncode == 0, done.stdout + done.stderr


COMPILE = """
import warnings
from itertools import product
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from segdeconv.switches import fused_triton, triton_kernels

warnings.simplefilter("ignore")  # Triton's remarks on its own defaults
pointers = {**triton_kernels.POINTERS, **fused_triton.POINTERS}
for name, kernel in sorted({**vars(triton_kernels), **vars(fused_triton)}.items()):
    if not name.endswith("_kernel"):
        continue
    choices = [argument for argument in kernel.arg_names if argument.isupper() and len(argument) > 1]
    choices = [argument for argument in choices if argument not in ("OUTER", "INNER")]
    for values in product((False, True), repeat=len(choices)):
        constants = {"OUTER": 16, "INNER": 64, **dict(zip(choices, values))}
        if name in ("_pool_kernel", "_norm_pool_kernel") and constants["PACKED"] and not constants["CHANNELS_LAST"]:
            continue  # contiguous switches are packed afterwards
        signature = {}
        for argument in kernel.arg_names:
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument in pointers:
                signature[argument] = pointers[argument] or "*bf16"
            else:
                signature[argument] = "i32"
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
        assert "atom" not in compiled.asm["ptx"] and "red.global" not in compiled.asm["ptx"], name
        print(name)
"""


@pytest.mark.slow
def test_every_kernel_compiles_for_an_absent_gpu_and_has_no_atomics(tmp_path):
    done = run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    separate, fused = {"_pool", "_place", "_pick"}, {"_norm_pool", "_norm_pool_sums", "_norm_pool_gradient"}
    assert set(done.stdout.split()) == {f"{name}_kernel" for name in separate | fused}


def test_without_a_gpu_triton_is_not_imported():
    probe = """
import sys, torch
from segdeconv.models import SegNet
before = "triton" in sys.modules
SegNet(3, stages=((4,),))(torch.randn(1, 3, 8, 8)).sum().backward()
names = ("segdeconv.switches.triton_kernels", "segdeconv.switches.fused_triton")
print(before, "triton" in sys.modules, *(name in sys.modules for name in names))
"""
    assert run("-c", probe).stdout.split() == ["False"] * 4


@pytest.fixture
def _forget_the_devices():
    load_triton_kernels.cache_clear()
    yield
    load_triton_kernels.cache_clear()


@pytest.mark.usefixtures("_forget_the_devices")
def test_where_triton_does_not_run_a_warning_is_given_and_torchs_kernels_are_used(monkeypatch):
    from segdeconv.switches import triton_kernels

    def pool(x):
        raise RuntimeError("no kernel image is available for execution on the device\nmore lines follow")

    monkeypatch.setattr(triton_kernels, "pool", pool)  # as on a GPU too old for Triton
    expected = r"Triton does not run on cpu \(RuntimeError: no kernel .* the device\), so pooling .* use torch's slower"
    with pytest.warns(UserWarning, match=expected):
        assert load_triton_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert load_triton_kernels(torch.device("cuda")) is None
